"""Micro-batches, halves, drafts, chunks: the sizes a step is priced at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from tensorcast.cost.formulas import Context
from tensorcast.cost.rank_load import RankLoad
from tensorcast.cost.work import Size
from tensorcast.deploy.step.price import Where, pick
from tensorcast.trace.dims import Sizes


def _batches(per_octave: Callable[[int], int]) -> np.ndarray:
    """From 1/64 to 2^24; so many between 2^k and 2^(k+1), whole ones from 1 on."""
    every = {k: per_octave(k) if k < 0 else min(2**k, per_octave(k)) for k in range(-6, 24)}
    return np.concatenate([2.0**k * (1 + np.arange(many) / many) for k, many in every.items()])


GRID = _batches(lambda k: 16 if 0 <= k < 9 else 8 if 9 <= k < 13 else 4)
"""Batches at which decode steps are priced; between them lines, as tiles make steps of it. Fixed, so that a batch's
price does not depend on what else is asked. Every whole batch up to 32 is there, then one every 6 % up to 512."""

COARSE = _batches(lambda k: 8 if 0 <= k < 13 else 4)
"""Those of :data:`GRID` at which every variant of a search is priced."""


KV_BYTES = {"bf16": 2.0, "fp8": 1.0}
"""Bytes of a cached number, by dtype."""


class Loads(Protocol):
    """How tokens fall on experts, of one layout or of several."""

    @property
    def local_experts(self) -> Size:
        """Experts on the fullest rank."""

    @property
    def staged(self) -> bool:
        """Whether pipeline stages differ."""

    def at(self, tokens: Size, stages: Size = 1) -> RankLoad:
        """The busiest rank's load, in the busiest of so many pipeline stages, when ``tokens`` in all are routed."""


class Batches(NamedTuple):
    """Micro-batches, parts that each runs in (2 where it is ``dual``), and what the rows of one part are priced at.

    ``contexts``: by :class:`Place` of a row. Rows inside the experts run so many ``chunks``, as tokens pass these in
    parts. Every case is there once: ``own`` says at which case each batch runs (None: they are the cases), ``draft`` at
    which it drafts, if the step drafts. ``pp`` stages and ``mtp_depth`` are those of the step's sizes.
    """

    pp: Size
    mtp_depth: Size
    micro: Size
    dual: Any
    halves: Size
    contexts: tuple[Context, Context, Context, Context]
    chunks: tuple[Size, Size, Size, Size]
    own: Where
    draft: Where

    @property
    def whole(self) -> Context:
        """Of all tokens."""
        return self.contexts[0]

    @property
    def apart(self) -> tuple[int, ...]:
        """By place the first one that is priced at the same sizes."""
        return tuple([next(i for i, one in enumerate(self.contexts) if one is own) for own in self.contexts])


class Place:
    """Where a row stands, bit by bit: among all rows, inside the experts, in layers that run on a prompt's ends
    (:class:`Ends`)."""

    ROWS = 0
    EXPERTS = 1
    ENDS = 2


class Ends(NamedTuple):
    """Layers of a model that run on the last ``tokens`` of what a step reads of each prompt, in steps of more than
    ``above`` tokens."""

    tokens: float
    above: float


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """From a batch to what a step's rows are priced at.

    Numbers, or arrays: columns ``[members, 1]`` of ``dp``, ``etp`` and the load where several deployments are priced
    as one; one entry per batch of ``pp``, ``kv_bytes``, ``mtp_depth`` and ``dual``.
    """

    decode: bool
    dp: Size
    etp: Size
    pp: Size
    kv_bytes: Size
    mtp_depth: Size
    dual: bool | np.ndarray
    """Whether a batch runs as two halves (dual-batch overlap), if a rank has ``least_halved`` tokens."""
    least_halved: float
    load: Loads | None
    chunk_tokens: int
    backend: str
    has_fp4: bool
    mxfp4: str
    """Kernels' dtype of MXFP4 weights."""
    masked_skips: bool
    pcp: int = 1
    """Data-parallel ranks that read each prompt together."""
    ends: Ends | None = None
    divided: bool = True
    """Whether a batch is divided into micro-batches where there are pipeline stages; else it is one of them."""

    def batches(self, batch: Size, new: Size, past: Size, some: Where = None) -> Batches:
        """What to price for ``batch`` sequences per data-parallel rank, ``new`` tokens each after ``past`` cached.

        Of the batches ``some`` are wanted; what rows are priced at is that of all.
        """
        micro: Size = 1
        if self.divided and np.any(np.greater(self.pp, 1)):
            # of each candidate by itself: its price must not depend on what is priced beside it
            micro = np.clip(np.floor(np.asarray(batch, dtype=float)), 1.0, self.pp)
        whole, dual = np.asarray(batch, dtype=float) / micro, self.dual
        if self.least_halved and np.any(dual):
            dual = np.logical_and(dual, whole * self.verify * new >= self.least_halved)
        halves = 1 + dual
        stages: Size = self.pp if self.load is not None and self.load.staged else 1
        asked = [(whole / halves, new, past, self.verify, self.kv_bytes, stages)]
        if self.decode and np.any(self.mtp_depth):
            asked.append((whole, 1.0, past, 1.0, self.kv_bytes, stages))
        (*columns, stages), cases = _cases(asked)
        wanted: list[Any] = [one if some is None else some if one is None else pick(one, some) for one in cases]
        (rows, inside, chunks) = ends = self._chunked(columns, stages)
        if self.ends is not None:
            ends = self._chunked(self._at_ends(self.ends, columns), stages)
        return Batches(
            pp=pick(self.pp, some), mtp_depth=pick(self.mtp_depth, some), micro=pick(micro, some),
            dual=pick(dual, some), halves=pick(halves, some), contexts=(rows, inside, *ends[:2]),
            chunks=(1.0, chunks, 1.0, ends[2]), own=wanted[0], draft=wanted[1] if len(wanted) > 1 else None,
        )

    def _chunked(self, columns: Sequence[Size], stages: Size) -> tuple[Context, Context, Size]:
        """What rows are priced at, those inside the experts, and how often these run."""
        context = self.context(*columns, stages=stages)
        if not self.chunk_tokens:
            return context, context, 1.0
        chunks = np.maximum(np.ceil(np.asarray(context.sizes.tokens) / self.chunk_tokens), 1.0)
        return context, self.context(*columns, stages=stages, chunks=chunks), chunks

    @staticmethod
    def _at_ends(ends: Ends, columns: Sequence[Size]) -> list[Size]:
        batch, new, past, *rest = columns
        last = np.where(np.asarray(batch) * new > ends.above, np.minimum(new, ends.tokens), new)[()]
        return [batch, last, past + (new - last), *rest]

    @property
    def verify(self) -> Size:
        """Tokens of each sequence that a step checks: the last one and drafted ones."""
        return 1.0 + self.mtp_depth if self.decode else 1.0

    def context(
        self, batch: Size, new: Size, past: Size, verify: Size | None = None, kv_bytes: Size | None = None, *,
        stages: Size = 1, chunks: Size = 1.0,
    ) -> Context:
        """What formulas may ask at these sizes, of one of so many ``chunks``, in the busiest of so many ``stages``;
        ``verify`` and ``kv_bytes`` are the step's own unless given."""
        verify = self.verify if verify is None else verify
        sequences = batch * verify
        if self.pcp > 1 and not self.decode:  # queries of its part, over the beginnings of all parts on average
            new, past = new / self.pcp, past + (new - new / self.pcp) / 2
        loaded: dict[str, Any] = {}
        rows: Size = 0.0
        experts: Size = 0.0
        if self.load is not None:
            every = sequences * new / chunks * self.dp  # tokens that are routed
            load = self.load.at(every, stages)
            rows, experts = load.rows, 1.0 * self.load.local_experts
            loaded = {"hit": load.hit, "capacity": every, "points": load.points, "stages": stages}
        return Context(
            Sizes(B=sequences / chunks, S=new, P=past, R=rows, E=experts, X=1.0 / self.etp), decode=self.decode,
            kv_bytes=self.kv_bytes if kv_bytes is None else kv_bytes, has_fp4=self.has_fp4, mxfp4=self.mxfp4,
            backend=self.backend, masked_skips=self.masked_skips, verify=verify, **loaded,
        )


def _cases(asked: Sequence[tuple[Size, ...]]) -> tuple[list[Size], Sequence[Where]]:
    """Sizes side by side on the last axis, and where those of each of ``asked`` stand.

    Of plain lists of batches every case is there once: parts of many batches, and what they draft, are of the same
    sizes. Whatever broadcasts (more axes) is left as it is.
    """
    axes = max(np.ndim(value) for sizes in asked for value in sizes)
    width = max((np.shape(value)[-1] for sizes in asked for value in sizes if np.ndim(value)), default=1)
    columns = []
    for values in zip(*asked, strict=True):
        first = values[0]
        same = all(value is first for value in values) or (not any(map(np.ndim, values)) and len(set(values)) == 1)
        if len(values) > 1 and not (same and (np.ndim(first) == 0 or np.shape(first)[-1] == 1)):
            # each as wide as all batches; what is the same number or column for all stays as it is
            first = np.concatenate([np.broadcast_to(v, (*np.shape(v)[:-1], width)) for v in values], axis=-1)
        columns.append(first)
    if not axes:
        return columns, range(len(asked))
    where = np.arange(width * len(asked))
    if axes == 1:
        first, cases = distinct(columns)
        if len(first) < len(cases):
            columns, where = [pick(value, first) for value in columns], cases
        elif len(asked) == 1:
            return columns, [None]
    elif len(asked) == 1:
        return columns, [None]
    return columns, np.split(where, len(asked))


def distinct(columns: Sequence[Size]) -> tuple[np.ndarray, np.ndarray]:
    """Where every combination of the columns' values first stands, and which combination every entry is."""
    code = np.zeros(1, dtype=int)
    for values in columns:
        if np.ndim(values):
            found, where = np.unique(values, return_inverse=True)
            code = code * len(found) + where
    _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
    return first, inverse
