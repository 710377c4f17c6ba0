"""What users send to a server, and what they meet: the plain data of :mod:`tensorcast.serving.steady_state`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorcast.errors import InputError

Array = NDArray[np.float64]
Rows = NDArray[np.intp]
Mask = NDArray[np.bool_]
Number = float | Array


def steps_waited(interval: float) -> float:
    """Steps that a request waits, in the mean, for a server that looks for requests once in ``interval`` steps."""
    return max(interval - 1.0, 0.0) / 2


def steps_between_looks(waited: float | Array) -> Any:
    """The interval of :func:`steps_waited`, a number or arrays."""
    return 2 * waited + 1.0


def _all(holds: Any) -> bool:
    """Whether what was asked of a number, or of each in an array, holds."""
    return holds if isinstance(holds, bool) else bool(np.all(holds))


@dataclass(frozen=True)
class Traffic:
    """What users send. ``concurrency`` counts requests in flight over the whole deployment; it may be an array, and so
    may, in :meth:`together`, everything else: one entry per deployment.

    ``prefix_cached``: tokens of the prompt that are in the cache already. ``mtp_acceptance``: chance that a drafted
    token is accepted, given that those before it were. ``spread``: replies are between ``1 - spread`` and ``1 +
    spread`` times ``output_len`` long. ``rounds``: requests that each client sends in a measurement that starts with
    all clients at once, so that ``1 / rounds`` of all first tokens wait for that burst; endless by default.
    ``wait_steps``: steps before a first token reaches the client that batching of messages adds.
    """

    input_len: Number
    output_len: Number
    concurrency: Number
    prefix_cached: Number = 0
    mtp_acceptance: Number = 0.8
    spread: Number = 0.0
    rounds: Number = math.inf
    wait_steps: Number = 0.0

    def __post_init__(self) -> None:
        if not _all(self.input_len >= 1):
            raise InputError(f"input_len = {self.input_len}: a prompt has at least 1 token")
        if not _all(self.output_len >= 1):
            raise InputError(f"output_len = {self.output_len}: a reply has at least 1 token")
        if not _all(self.concurrency > 0):
            raise InputError(f"concurrency = {self.concurrency}: must be more than 0 requests in flight")
        if not (_all(self.prefix_cached >= 0) and _all(self.prefix_cached < self.input_len)):
            raise InputError(
                f"prefix_cached = {self.prefix_cached}: must be at least 0 and less than input_len = {self.input_len}"
            )
        if not (_all(self.mtp_acceptance >= 0) and _all(self.mtp_acceptance <= 1)):
            given = f"mtp_acceptance = {self.mtp_acceptance} (--mtp-acceptance)"
            raise InputError(f"{given}: a chance lies between 0 and 1")
        if not _all(self.rounds >= 1):
            raise InputError(f"rounds = {self.rounds}: every client sends at least 1 request")

    @classmethod
    def together(cls, several: Sequence[Traffic]) -> Traffic:
        """Traffic of one entry each as one of arrays."""
        return cls(**{field.name: np.array([getattr(one, field.name) for one in several]) for field in fields(cls)})

    @property
    def reply_in_flight(self) -> Number:
        """Tokens of the reply of whoever decodes at a moment, in the mean: longer ones decode for longer."""
        return self.output_len * (1 + self.spread**2 / 3)

    @property
    def context(self) -> Number:
        """Cached tokens of a decoding sequence, in the mean of a moment."""
        return self.input_len + self.reply_in_flight / 2

    def decode_steps(self, depth: Number | Rows) -> Array:
        """Decode steps of one reply with ``depth`` drafted tokens: each brings 1 + a + ... + a^depth tokens."""
        drafts = range(int(np.max(depth, initial=0)) + 1)
        tokens = sum((np.where(i <= depth, self.mtp_acceptance**i, 0.0)[()] for i in drafts), 0.0)
        steps: Array = np.maximum(self.output_len - 1, 1) / tokens
        return steps


@dataclass(frozen=True, kw_only=True)
class ServingMetrics:
    """What traffic meets. Arrays of one shape, or floats; times are means, in seconds.

    ``batch``: decoding sequences per data-parallel rank. ``ttft_error`` and ``tpot_error``: relative median error that
    the kernels' own errors leave. ``evidence``: share of kernel time that is measured, calibrated or datasheet.
    ``problem``: empty, or why the traffic cannot be served; numbers are NaN then.
    """

    concurrency: Number
    batch: Number
    ttft_s: Number
    tpot_s: Number
    request_s: Number
    output_tokens_per_s: Number
    ttft_error: Number
    tpot_error: Number
    decode_step_s: Number
    prefill_step_s: Number
    exposed_comm_s: Number
    hidden_comm_s: Number
    evidence: dict[str, Number]
    problem: str = ""

    def columns(self) -> dict[str, Array]:
        """Every number by its name, evidence as ``share_measured`` and so on."""
        numbers = {name: np.asarray(v) for name, v in vars(self).items() if name not in ("evidence", "problem")}
        return numbers | {f"share_{kind}": np.asarray(share) for kind, share in self.evidence.items()}

    def one(self, i: int) -> ServingMetrics:
        """Entry ``i`` of arrays."""
        kept = {name: values for name, values in vars(self).items() if name not in ("evidence", "problem")}
        numbers: dict[str, Any] = {name: float(np.asarray(values)[i]) for name, values in kept.items()}
        evidence: dict[str, Number] = {kind: float(np.asarray(share)[i]) for kind, share in self.evidence.items()}
        return replace(self, **numbers, evidence=evidence)
