"""A serving load, and what it meets: the plain data of :mod:`tensorcast.serving.steady_state`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from tensorcast.errors import InputError


@dataclass(frozen=True)
class Load:
    """What users send. ``concurrency`` counts requests in flight over the whole deployment; it may be an array, and so
    may, in :meth:`together`, everything else: one entry per load.

    ``prefix_cached``: tokens of the prompt that are in the cache already. ``mtp_acceptance``: chance that a drafted
    token is accepted, given that those before it were. ``spread``: replies are between ``1 - spread`` and ``1 +
    spread`` times ``output_len`` long. ``rounds``: requests that each client sends in a measurement that starts with
    all clients at once, so that ``1 / rounds`` of all first tokens wait for that burst; endless by default.
    ``wait_steps``: steps before a first token reaches the client that batching of messages adds.
    """

    input_len: Any
    output_len: Any
    concurrency: Any
    prefix_cached: Any = 0
    mtp_acceptance: Any = 0.8
    spread: Any = 0.0
    rounds: Any = math.inf
    wait_steps: Any = 0.0

    def __post_init__(self) -> None:
        if np.any(self.input_len < 1):
            raise InputError(f"input_len = {self.input_len}: a prompt has at least 1 token")
        if np.any(self.output_len < 1):
            raise InputError(f"output_len = {self.output_len}: a reply has at least 1 token")
        if not np.all(np.asarray(self.concurrency, dtype=float) > 0):
            raise InputError(f"concurrency = {self.concurrency}: must be more than 0 requests in flight")
        if not np.all((self.prefix_cached >= 0) & (self.prefix_cached < self.input_len)):
            raise InputError(
                f"prefix_cached = {self.prefix_cached}: must be at least 0 and less than input_len = {self.input_len}"
            )
        if not np.all((self.mtp_acceptance >= 0) & (self.mtp_acceptance <= 1)):
            raise InputError(f"mtp_acceptance = {self.mtp_acceptance}: a chance lies between 0 and 1")
        if np.any(self.rounds < 1):
            raise InputError(f"rounds = {self.rounds}: every client sends at least 1 request")

    @classmethod
    def together(cls, loads: Sequence[Load]) -> Load:
        """Loads of one entry each as one load of arrays."""
        return cls(**{field.name: np.array([getattr(load, field.name) for load in loads]) for field in fields(cls)})

    @property
    def new(self) -> Any:
        """Prompt tokens to compute."""
        return self.input_len - self.prefix_cached

    @property
    def context(self) -> Any:
        """Cached tokens of a decoding sequence, mean over its reply."""
        return self.input_len + self.output_len / 2

    def tokens_per_step(self, depth: Any) -> Any:
        """Tokens that a decode step brings a sequence with ``depth`` drafted: 1 + a + ... + a^depth."""
        return sum((np.where(i <= depth, self.mtp_acceptance**i, 0.0)[()] for i in range(int(np.max(depth)) + 1)), 0.0)


@dataclass(frozen=True)
class Served:
    """What a load meets. Floats, or arrays in the shape of ``concurrency``; times are means, in seconds.

    ``batch``: decoding sequences per data-parallel rank. ``ttft_error`` and ``tpot_error``: relative median error that
    the kernels' own errors leave. ``evidence``: share of kernel time that is measured, calibrated or datasheet.
    ``problem``: empty, or why the load cannot be served; numbers are NaN then.
    """

    concurrency: Any
    batch: Any
    ttft_s: Any
    tpot_s: Any
    request_s: Any
    output_tokens_per_s: Any
    ttft_error: Any
    tpot_error: Any
    decode_step_s: Any
    prefill_step_s: Any
    exposed_comm_s: Any
    hidden_comm_s: Any
    evidence: dict[str, Any]
    problem: Any

    def one(self, i: int) -> Served:
        """Entry ``i`` of arrays."""
        numbers = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "evidence"}
        evidence = {kind: value[i] for kind, value in self.evidence.items()}
        return Served(**{name: value[i] for name, value in numbers.items()}, evidence=evidence)
