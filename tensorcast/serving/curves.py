"""A deployment's step times as functions of load: decode steps over the batch, prefill steps over prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensorcast.cost.evidence import EVIDENCE, LEVELS
from tensorcast.deploy.deployment import Deployment
from tensorcast.deploy.plan.moe_blocks import EXPERT_STAGES
from tensorcast.deploy.plan.plan import Collective, Row
from tensorcast.deploy.step.price import StepPrice, seconds_of, total
from tensorcast.deploy.step.sizes import GRID
from tensorcast.profiles.engine import UnderLoad
from tensorcast.serving.load import Load

PER_SEQUENCE = ("attention", "indexer_scores", "linear_attention", "ssm_scan", "causal_conv1d")
"""Ops that run per sequence: in a step with prompts they run once for the prompts and once for the decoding rows."""


class DecodeCurve:
    """Decode steps of ``deployment`` at ``context`` cached tokens, over sequences per data-parallel rank."""

    def __init__(self, deployment: Deployment, context: float, largest: float, smallest: float = 0.0) -> None:
        end = int(np.searchsorted(GRID, largest)) + 1
        self.batch = GRID[int(np.searchsorted(GRID, smallest)) : end]
        self.columns = decode_columns(deployment.step.price(self.batch, 1.0, context), deployment)

    def at(self, column: str, batch: Any) -> Any:
        values = np.broadcast_to(np.asarray(self.columns[column], dtype=float), self.batch.shape)
        return np.interp(batch, self.batch, values)


class PrefillLine:
    """Prefill steps of ``deployment`` in a server under load.

    Seconds are ``fixed_s + prompt_s * prompts`` with ``per_step`` prompts at most.

    A prompt longer than a step's ``chunk`` tokens runs as equal chunks; ``per_step`` is below 1 then, and a chunk is
    priced at the mean of the tokens cached before it. ``token_s``: what one more token adds. Every data-parallel rank
    has as many prompts; ``expert_s`` is what experts and exchange take of ``prompt_s`` or, with one prompt per step, of
    ``fixed_s``: a rank with a prompt where others have none needs its part of that.
    """

    def __init__(self, deployment: Deployment, new: int, prefix: int, chunk: int) -> None:
        self.asked = self._cut(new, prefix, chunk)
        price = deployment.step.price(self.asked, self.tokens, self.past)
        self._read(price.seconds, price.error, evidence_shares(price), expert_seconds(price), under_load(deployment))

    def _cut(self, new: int, prefix: int, chunk: int) -> np.ndarray:
        """How prompts are cut into steps; the batches to price."""
        chunks = -(-new // chunk)
        self.tokens, self.past = new / chunks, prefix + (new - new / chunks) / 2
        most = max(1.0, chunk // new) if chunks == 1 else 1.0
        self.per_step = most if chunks == 1 else 1.0 / chunks
        return np.array([0.5, 1.0, most])

    def _read(self, seconds: Any, error: Any, evidence: dict[str, Any], experts: Any, load: UnderLoad) -> None:
        """Take prices of the three batches asked for, on the last axis, as they are under ``load``."""
        seconds, experts, error = load.factor * seconds, load.factor * experts, np.hypot(error, load.error)
        half, one, full = np.moveaxis(_over(seconds, 3), -1, 0)
        if self.per_step > 1:
            self.prompt_s = np.clip((full - one) / (self.per_step - 1), 0.0, one)
            self.token_s = self.prompt_s / self.tokens
        else:
            self.prompt_s = np.zeros_like(one)
            self.token_s = np.maximum(one - half, 0.0) / (self.tokens / 2)
        self.fixed_s, self.step_s = one - self.prompt_s, one
        some, more = _over(experts, 3)[..., 0], _over(experts, 3)[..., 1]
        # with pipeline stages another prompt takes one more turn, less than its way through all stages
        self.expert_s = np.clip(2 * (more - some), 0.0, self.prompt_s if self.per_step > 1 else one)
        self.error = _over(error, 3)[..., 1]
        self.evidence = {kind: _over(share, 3)[..., 1] for kind, share in evidence.items()}

    @property
    def most_per_s(self) -> float:
        """Prompts per second of one data-parallel rank that does nothing else."""
        return self.per_step / (self.fixed_s + self.prompt_s * np.maximum(self.per_step, 1.0))

    def at_rate(self, rate: Any) -> tuple[Any, Any]:
        """Seconds in service of a prompt when ``rate`` per second come to a rank, and how many such times it waits.

        Prompts that came while a step ran share the next (a gated queue): in the mean ``n`` of them where
        ``n = rate * (fixed + prompt_s * n)``. A new one meets a longer step than the mean, waits for half of it, and
        rides with those that came in all of it; near the limit it waits for those before it that did not fit, too.
        With one prompt per step this is an M/D/1 queue.
        """
        most = np.maximum(self.per_step, 1.0)
        added = np.minimum(rate * self.prompt_s, 1 - 1e-9)  # prompts that come during one prompt more
        mean = np.clip(rate * self.fixed_s / (1 - added), 1.0, most)
        step = (self.fixed_s + self.prompt_s * mean) / np.minimum(self.per_step, 1.0)
        busy, full = np.minimum(rate * step / mean, 1.0), rate / self.most_per_s
        varied = np.where(most > 1, busy * self.prompt_s**2 * mean / (1 - added**2), 0.0)
        met = step + varied / step
        rides = np.minimum(1 + busy * rate * met, most)
        service = (self.fixed_s + self.prompt_s * rides) / np.minimum(self.per_step, 1.0)
        crowd = full ** (most + 1) / (2 * most * np.maximum(1 - full, 1e-9))
        return service, np.where(full < 1, (busy * met / 2 + crowd * step) / service, np.inf)


def under_load(prefill: Deployment) -> UnderLoad:
    """How steps with prompts of ``prefill`` slow down in a server under load."""
    return prefill.engine.under_load(prefill.device.name)


def _over(value: Any, points: int) -> Any:
    """One entry per priced batch on the last axis."""
    return np.broadcast_to(value, (*np.shape(value)[:-1], points))


def decode_columns(price: StepPrice, deployment: Deployment) -> dict[str, Any]:
    """What decode curves hold, from decode steps of ``deployment`` priced over batches."""
    per_step = deployment.engine.overhead(deployment.device.name).step_s
    attention = _sum(price, lambda row: getattr(row, "name", "") in PER_SEQUENCE)
    return {
        "seconds": price.seconds,
        "attention_s": attention + price.overhead_s - per_step,
        "error": price.error,
        "exposed_comm_s": price.exposed_comm_s,
        "hidden_comm_s": price.hidden_comm_s,
        **evidence_shares(price),
    }


def evidence_shares(price: StepPrice) -> dict[str, Any]:
    """Share of kernel seconds behind which each kind of evidence stands."""
    seconds: dict[str, Any] = dict.fromkeys(EVIDENCE, 0.0)
    for level, kind in enumerate(LEVELS):
        # of arrays, levels are per candidate, or per member of a fleet that spans more or fewer tiers
        seconds[kind] = price.sum(
            lambda p: p.seconds * (p.level == level), lambda p: not isinstance(p.level, int) or p.level == level  # noqa: B023
        )
    whole = np.maximum(total(seconds.values()), 1e-30)
    return {kind: value / whole for kind, value in seconds.items()}


def expert_seconds(price: StepPrice) -> Any:
    """Seconds that the tokens of all data-parallel ranks take: experts, dispatch and combine, less what overlaps."""

    def of_all_ranks(row: Row) -> bool:
        return row.group in ("dp", "ep") if isinstance(row, Collective) else row.stage in EXPERT_STAGES

    return _sum(price, of_all_ranks) - price.hidden_s


def _sum(price: StepPrice, wanted: Callable[[Row], bool]) -> Any:
    return price.sum(seconds_of, lambda p: wanted(p.row))


Array = np.ndarray
LINE = ("fixed_s", "prompt_s", "token_s", "expert_s", "step_s", "error")
"""Numbers of a prefill line."""


class CurvesAt:
    """Decode curves of many variants, read at one batch per entry of ``rows``. Stands in for a :class:`DecodeCurve`."""

    def __init__(self, grid: Array, columns: dict[str, Array], rows: Array) -> None:
        self.grid, self.columns, self.rows = grid, columns, rows
        self._found: tuple[Array, Array, Array] | None = None

    def at(self, column: str, batch: Array) -> Array:
        """Linear between the grid's batches, flat beyond its ends, as ``numpy.interp``."""
        if self._found is None or self._found[0] is not batch:  # most batches are read in several columns
            inside = np.clip(batch, self.grid[0], self.grid[-1])
            right = np.clip(np.searchsorted(self.grid, inside, side="right"), 1, len(self.grid) - 1)
            before = self.grid[right - 1]
            share = (inside - before) / (self.grid[right] - before)
            self._found = batch, self.rows * len(self.grid) + right - 1, share
        _, left, share = self._found
        values = self.columns[column].ravel()
        low = values[left]
        return low + (values[left + 1] - low) * share


class PromptsAt(PrefillLine):
    """Prefill lines of many variants, one per entry of ``rows``."""

    def __init__(self, lines: Prompts, rows: Array) -> None:
        self.per_step, self.tokens, self.past = lines.line.per_step, lines.line.tokens, lines.line.past
        for name in LINE:
            setattr(self, name, lines.columns[name][rows])
        self.evidence = {kind: lines.columns[kind][rows] for kind in EVIDENCE}


class Line(PrefillLine):
    """A prefill line whose prices are still to be read."""

    def __init__(self, new: int, prefix: int, chunk: int) -> None:
        self.asked = self._cut(new, prefix, chunk)


@dataclass
class Prompts:
    """Prefill lines of all variants at one chunk size, and sequences that fit beside a full step."""

    line: Line
    columns: dict[str, Array]
    fits: Array

    @classmethod
    def of(cls, load: Load, chunk: int, count: int) -> Prompts:
        columns = {name: np.empty(count) for name in (*LINE, *EVIDENCE)}
        return cls(Line(load.new, load.prefix_cached, chunk), columns, np.zeros(count))

    def keep(self, line: Line, rows: Array) -> None:
        """Take over the ``line`` of a fleet; ``rows``: the members' positions, -1: none."""
        there = rows >= 0
        for name in LINE:
            self.columns[name][rows[there]] = getattr(line, name)[there]
        for kind in EVIDENCE:
            self.columns[kind][rows[there]] = line.evidence[kind][there]
