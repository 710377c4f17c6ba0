"""Seconds of a step at the very batch that a scheduler composed, read from a table of the product's own prices.

A table is priced once, in one call per phase: decode steps over sequences and cached tokens, prefill steps over new and
cached tokens of one prompt. Between its points times are linear, as they are between the batches of decode curves.
What is told apart is what batches share and what they do not: experts (and the exchange) see the tokens of all
data-parallel ranks, attention sees each sequence, everything else a rank's own tokens.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from tensorcast.deploy.deployment import Deployment
from tensorcast.deploy.step.price import StepPrice
from tensorcast.deploy.step.sizes import GRID
from tensorcast.deploy.step.step import Step
from tensorcast.serving.traffic import Array

LEAST_CONTEXT = 32.0
"""Cached tokens from which on tables have points, four in an octave; below, lines from 0."""


MOST_CHUNKS = 4096
"""Prompts by new and cached tokens whose attention is kept."""


@dataclass(slots=True)
class Stretch:
    """Steps under way: the first begins at ``start_s`` and takes ``first_s``, each after it ``slope_s`` longer; the
    last is done at ``end_s``. ``mixed``: with prompts."""

    start_s: float
    first_s: float
    slope_s: float
    steps: int
    end_s: float
    mixed: bool = False

    def cut(self, steps: int) -> None:
        """It ends after so many steps."""
        self.steps, self.end_s = steps, self.after(steps)

    def after(self, steps: float) -> float:
        """When so many of its steps are done."""
        return self.start_s + steps * self.first_s + self.slope_s * steps * (steps - 1) / 2

    def done_by(self, now_s: float) -> int:
        """Steps that are done at ``now_s``."""
        low = (now_s - self.start_s) / self.first_s
        if self.slope_s > 0:
            half = self.first_s / self.slope_s - 0.5
            low = math.sqrt(half * half + 2 * (now_s - self.start_s) / self.slope_s) - half
        return min(max(int(low + 1e-9), 0), self.steps)


@dataclass(frozen=True)
class Bilinear:
    """Values at points of two axes, linear between them, on their last lines beyond the ends of ``across``.

    Read one number at a time: plain lists are several times as fast for that as arrays.
    """

    down: list[float]
    across: list[float]
    values: list[list[float]]
    """``[down][across]``"""

    @classmethod
    def of(cls, down: Array, across: Array, values: Array) -> Bilinear:
        return cls(down.tolist(), across.tolist(), np.broadcast_to(values, (len(down), len(across))).tolist())

    def first(self, across: float) -> float:
        """The value on the first line."""
        columns, values = self.across, self.values[0]
        j = bisect_right(columns, across, 1, len(columns) - 1)
        left, low = columns[j - 1], values[j - 1]
        return low + (values[j] - low) * ((across - left) / (columns[j] - left))

    def at(self, down: float, across: float) -> float:
        """The value at one point; flat beyond the ends of ``down``."""
        rows, columns = self.down, self.across
        i = bisect_right(rows, down, 1, len(rows) - 1)  # which point ends the cell; the first or the last one outside
        j = bisect_right(columns, across, 1, len(columns) - 1)
        low, left = rows[i - 1], columns[j - 1]
        v = (across - left) / (columns[j] - left)
        above = self.values[i - 1]
        first = above[j - 1] + (above[j] - above[j - 1]) * v
        if down <= low:
            return first
        below = self.values[i]
        u = (down - low) / (rows[i] - low) if down < rows[i] else 1.0
        return first + (below[j - 1] + (below[j] - below[j - 1]) * v - first) * u


@dataclass(frozen=True)
class DecodeTimes:
    """Decode steps: ``own`` of a rank over sequences and their mean cached tokens, ``shared`` of all ranks' experts at
    the mean of their sequences, ``attention`` that part of ``own`` which runs per sequence; seconds."""

    own: Bilinear
    shared: Bilinear
    attention: Bilinear


@dataclass(frozen=True)
class EndTimes:
    """Seconds, as of :class:`PromptTimes`, by which a step is longer whose layers for the ends of prompts see more than
    ``tokens``, those of one prompt's end; in steps of more than ``above`` tokens."""

    tokens: float
    above: float
    own: Bilinear
    shared: Bilinear

    def of(self, step: float, seen: float) -> tuple[float, float]:
        """Both, in a step of so many tokens whose layers for ends have ``seen`` of them."""
        if step <= self.above or seen <= self.tokens:
            return 0.0, 0.0
        return self.own.first(seen), self.shared.first(seen)


@dataclass(frozen=True)
class PromptTimes:
    """Prefill steps: ``own`` and ``shared`` over a rank's tokens (the second axis has one point less to tell: they are
    the same whatever is cached), ``attention`` over new and cached tokens of one prompt, of which ``least`` is what a
    step pays once for all of its prompts; seconds, those of a server under load. ``beside``: the share of ``own`` and
    ``shared`` that the engine's factor on steps with prompts adds. It was fitted where prompts fill their steps: tokens
    of sequences that decode beside them do not pay it. ``ends``: of a model with layers for the ends of prompts.
    ``host_s``: what the host takes to launch a step of more than ``graph_tokens``, which is no shorter."""

    own: Bilinear
    shared: Bilinear
    attention: Bilinear
    least: float
    beside: float = 0.0
    ends: EndTimes | None = None
    host_s: float = 0.0
    graph_tokens: float = 0.0


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """What steps of a server take. ``decode`` or ``prompts`` is there of a server that runs both; of one pool, one.

    ``tokens_each``: tokens of a decoding sequence that a step checks (more than 1 with drafted ones). ``errors``:
    relative median error of a typical decode step and prefill step.
    """

    decode: DecodeTimes | None
    prompts: PromptTimes | None
    tokens_each: float
    alone: bool
    errors: tuple[float, float]

    def decoding(self, sequences: float, context: float, mean: float) -> float:
        """Seconds of a decode step whose busiest rank has ``sequences`` with ``context`` tokens cached each, where
        ranks have ``mean`` sequences on average."""
        assert self.decode is not None
        own = self.decode.own.at(context, sequences)
        return own + self.decode.shared.at(context, mean) if self._shares else own

    def decoding_line(self, sequences: int, context: float) -> tuple[float, float, float]:
        """:meth:`decoding` of one rank alone, how much longer steps are for every token more that is cached, and up to
        how many of them."""
        line = self._lines.get(sequences)
        if line is None:
            line = self._lines[sequences] = self._line(sequences)
        begins, values, slopes = line
        i = bisect_right(begins, context, 1) - 1
        return values[i] + slopes[i] * (context - begins[i]), slopes[i], begins[i + 1]

    def _line(self, sequences: int) -> tuple[list[float], list[float], list[float]]:
        """Where each piece of :meth:`decoding_line` begins (and an end that is nowhere), its value there, its slope."""
        points = self.contexts
        values = [self.decoding(sequences, point, sequences) for point in points]
        slopes = (np.diff(values) / np.diff(points)).tolist()
        return [0.0, *points, math.inf], [values[0], *values], [0.0, *slopes, 0.0]

    @cached_property
    def _lines(self) -> dict[int, tuple[list[float], list[float], list[float]]]:
        return {}

    def own(self, prompts: Sequence[tuple[int, int]], sequences: float, context: float) -> float:
        """Seconds of one rank in a step with prompts, without its experts: ``prompts`` as (new, cached) tokens, and
        decoding sequences beside them (or, in an engine that runs prompts alone, instead)."""
        tokens = decoding = sequences * self.tokens_each
        if not prompts:
            return self.decode.own.at(context, sequences) if tokens and self.decode is not None else 0.0
        times = self.prompts
        assert times is not None
        known, least = self._attended, times.least
        seconds = least
        if tokens and self.decode is not None:
            seconds += self.decode.attention.at(context, sequences)
        for chunk in prompts:
            if (attended := known.get(chunk)) is None:
                attended = self._attend(chunk)
            seconds += attended
            tokens += chunk[0]
        whole = times.own.first(tokens)
        if times.ends is not None:
            whole += times.ends.of(tokens, self.seen_at_ends(prompts, decoding))[0]
        return seconds + whole * (1.0 - times.beside * decoding / tokens)

    def _attend(self, chunk: tuple[int, int]) -> float:
        """Seconds of attention that a prompt of (new, cached) tokens adds to a step. Kept: loads repeat lengths."""
        assert self.prompts is not None
        (new, past), attention, known = chunk, self.prompts.attention, self._attended
        if len(known) >= MOST_CHUNKS:
            known.clear()
        # the first line is of prompts of which nothing is cached
        known[chunk] = (attention.at(past, new) if past else attention.first(new)) - self.prompts.least
        return known[chunk]

    @cached_property
    def _attended(self) -> dict[tuple[int, int], float]:
        return {}

    def shared(self, tokens: float, decoding: float = 0.0, ends: float = 0.0) -> float:
        """Seconds that experts and their exchange take in a step with prompts, ``tokens`` per rank on average, of which
        so many are ``decoding`` sequences', and so many are seen by layers for the ``ends`` of prompts."""
        times = self.prompts
        assert times is not None
        if not self._shares:
            return 0.0
        whole = times.shared.first(tokens)
        if times.ends is not None:
            whole += times.ends.of(tokens, ends)[1]
        return whole * (1.0 - times.beside * decoding / tokens)

    def seen_at_ends(self, prompts: Sequence[tuple[int, int]], decoding: float) -> float:
        """Tokens of a rank's step that layers for the ends of prompts see; 0 of a model without such."""
        ends = None if self.prompts is None else self.prompts.ends
        return 0.0 if ends is None else decoding + sum(min(new, ends.tokens) for new, _ in prompts)

    @cached_property
    def _shares(self) -> bool:
        """Whether ranks share anything: where there is one, all is its own."""
        tables = [part.shared for part in (self.decode, self.prompts) if part is not None]
        return any(any(row) for table in tables for row in table.values)

    def launched(self, seconds: float, tokens: float) -> float:
        """Seconds of a step with prompts whose busiest rank has so many ``tokens``: as long as its launch at least."""
        prompts = self.prompts
        return seconds if prompts is None or tokens <= prompts.graph_tokens else max(seconds, prompts.host_s)

    @cached_property
    def contexts(self) -> list[float]:
        """Cached tokens between which a decode step's time is one line."""
        return [] if self.decode is None else self.decode.own.down

    def scaled(self, decode: float, prompts: float) -> StepTimes:
        """The same with decode steps and prefill steps so many times as long."""
        def times(part: Any, factor: float) -> Any:
            if part is None:
                return None
            changed = {}
            for name, value in vars(part).items():
                if isinstance(value, Bilinear):
                    whole = (np.array(value.values) * factor).tolist()
                    changed[name] = replace(value, values=whole)
                elif isinstance(value, EndTimes):
                    changed[name] = times(value, factor)
                elif name in ("attention", "least", "host_s"):
                    changed[name] = value * factor
            return replace(part, **changed)

        return replace(self, decode=times(self.decode, decode), prompts=times(self.prompts, prompts))


def step_times(
    prefill: Deployment | None, decode: Deployment | None, *, most_sequences: float, chunk_tokens: int, longest: int,
    graph_sizes: Sequence[int] = (),
) -> StepTimes:
    """Tables for a server that runs ``prefill`` and ``decode`` steps, or one of them.

    ``most_sequences``: per data-parallel rank; ``chunk_tokens``: new tokens of a step per rank; ``longest``: tokens of
    the longest sequence. ``graph_sizes``: sequences that decode steps are padded to; none: they are not. With pipeline
    stages a step is one micro-batch's, of so many sequences, and its time that of a stage.
    """
    engine = (decode or prefill).engine  # type: ignore[union-attr]
    contexts = _contexts(longest)
    errors = [0.0, 0.0]
    decoding = prompting = None
    verify = 1.0
    if decode is not None:
        batch = GRID[decode.layout.dp * GRID >= 1]  # experts are asked about ranks' mean, which may be less than one
        batch = batch[: max(2, int(np.searchsorted(batch, most_sequences)) + 1)]
        if graph_sizes:
            batch, sizes = padded(batch, graph_sizes, most_sequences)
        stages = decode.layout.pp
        price = run = decode.step.price(stages * batch, 1.0, contexts[:, None])
        if graph_sizes:
            run = decode.step.price(stages * sizes, 1.0, contexts[:, None])
        # what the engine takes per sequence stays with decoding where prompts ride along; what pads has no context
        attention, with_pads = (np.asarray(one.tally.attention) + one.request_overhead_s for one in (price, run))
        factor = (engine.overhead.pool_factor if prefill is None else 1.0) / stages
        whole, shared, attention = (
            factor * np.broadcast_to(t, (len(contexts), len(batch)))
            for t in (run.seconds - with_pads + attention, _shared(run, decode), attention)
        )
        decoding = DecodeTimes(
            own=Bilinear.of(contexts, batch, whole - shared),
            shared=Bilinear.of(contexts, batch, shared),
            attention=Bilinear.of(contexts, batch, attention),
        )
        errors[0], verify = float(np.median(run.error)), float(np.asarray(decode.step.sizes.verify))
    if prefill is not None:
        new = GRID[GRID >= 1]
        new = new[: max(3, int(np.searchsorted(new, 2 * chunk_tokens + most_sequences)))]
        price = prefill.step.price(1.0, new, contexts[:, None])
        factor = engine.overhead.prefill_factor / prefill.layout.pp
        among = price  # a prompt as it is in a step of several
        if prefill.step.sizes.ends is not None:
            among = _always_ends(prefill.step).price(1.0, new, contexts[:, None])
        whole, shared, alone, attention = (
            factor * np.broadcast_to(t, (len(contexts), len(new)))
            for t in (
                price.seconds - price.host_s, _shared(price, prefill), price.tally.attention, among.tally.attention
            )
        )
        first = contexts[:2]
        own = whole[:2] - shared[:2] - alone[:2]
        prompting = PromptTimes(
            own=Bilinear.of(first, new, own),
            shared=Bilinear.of(first, new, shared[:2]),
            attention=Bilinear.of(contexts, new, attention),
            least=float(attention[0, 0]),
            beside=1.0 - 1.0 / engine.overhead.prefill_factor,
            ends=_end_times(prefill, new, factor),
            host_s=factor * float(np.max(np.where(np.greater(price.host_s, 0), price.seconds, 0.0))),
            graph_tokens=float(prefill.step.pricer.graph_tokens),
        )
        errors[1] = float(np.hypot(np.median(price.error), engine.overhead.prefill_error))
    return StepTimes(
        decode=decoding, prompts=prompting, tokens_each=verify, alone=engine.prefill_alone,
        errors=(errors[0], errors[1]),
    )


def _always_ends(step: Step) -> Step:
    """The step, if it has layers for prompts' ends as it is where it has many tokens."""
    ends = step.sizes.ends
    return step if ends is None else replace(step, sizes=replace(step.sizes, ends=ends._replace(above=0.0)))


def _end_times(prefill: Deployment, new: Array, factor: float) -> EndTimes | None:
    """From prompts that are no longer than their ends beside one prompt of as many tokens as they have together."""
    if (ends := prefill.step.sizes.ends) is None:
        return None
    new = np.concatenate([[ends.tokens], new[new > ends.tokens]])
    one = _always_ends(prefill.step).price(1.0, new, 0.0)
    many = prefill.step.undivided.price(new / ends.tokens, ends.tokens, 0.0)
    shared, more = (factor * np.broadcast_to(_shared(price, prefill), new.shape) for price in (one, many))
    own, whole = (factor * (price.seconds - price.tally.attention - price.request_overhead_s) for price in (one, many))
    more = more - shared
    return EndTimes(
        tokens=ends.tokens, above=ends.above, shared=Bilinear.of(np.zeros(1), new, more),
        own=Bilinear.of(np.zeros(1), new, np.maximum(whole - own - more, 0.0)),
    )


def padded(batch: Array, graph_sizes: Sequence[int], most: float) -> tuple[Array, Array]:
    """Batches with those between which a padded step's time jumps, and the batch that each is run as.

    TensorRT-LLM main at 001541b, _torch/pyexecutor/model_engine.py (_filter_cuda_graph_batch_sizes): a list that goes
    beyond the ``most`` sequences of a step ends with these. Batches beyond a list are run as they are.
    """
    sizes = np.array(sorted(graph_sizes), dtype=float)
    sizes = np.append(sizes[sizes < most], most) if sizes[-1] >= most else sizes
    batch = np.unique(np.concatenate([batch, sizes, sizes + 1.0]))
    at = np.minimum(np.searchsorted(sizes, batch), len(sizes) - 1)
    return batch, np.maximum(sizes[at], batch)


def _contexts(longest: int) -> Array:
    """0 and four points in each octave up to ``longest``."""
    octaves = max(1.0, np.log2(max(longest, 1) / LEAST_CONTEXT))
    points = np.rint(LEAST_CONTEXT * 2.0 ** (np.arange(int(np.ceil(4 * octaves)) + 1) / 4))
    return np.concatenate([[0.0], points])


def _shared(price: StepPrice, deployment: Deployment) -> Array:
    """Seconds of experts, dispatch and combine less what overlaps, as of :func:`prefill_columns`; none where there is
    one data-parallel rank, whose tokens are all tokens."""
    if deployment.layout.dp == 1:
        return np.zeros(1)
    found: Array = np.maximum(np.asarray(price.tally.experts - price.hidden_s), 0.0)
    return found
