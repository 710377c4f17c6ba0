"""Rows whose kernels differ in sizes alone, of any layers, layouts and steps, priced as one row of many sizes.

NumPy takes as long for a few numbers as for hundreds, and a search has hundreds of rows at hundreds of batches.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from tensorcast.cost.formulas import (
    FORMULAS,
    REDUCES,
    Context,
    embedding,
    grouped_matmul,
    matmul,
    mla_absorb,
    traffic,
)
from tensorcast.cost.kernels.corrections import BatchedCorrections, Corrections
from tensorcast.deploy.step.price import RowPrice, one_level, spending_of, untold
from tensorcast.deploy.step.row_prices import Pending, RowPricer, Works
from tensorcast.trace.dims import Dim, Sizes, product
from tensorcast.trace.moe import EXPERT_STAGES
from tensorcast.trace.table import DTYPE_BYTES, Op, Tensor, per_op, shape_number

OF_DIMS = (traffic, embedding, matmul, mla_absorb, grouped_matmul)
"""Formulas that ask for no sizes but those in an op's dims, and for tokens that are routed."""

NUMBERS = ("heads", "joined_tokens")
"""Attributes that formulas take as sizes."""


class Content(NamedTuple):
    """``number``: for all that an op's price depends on beside the sizes; equal ops of any layer or table share it.

    ``routed``: whether the sizes depend on how tokens fall on experts, and so on the layout; ``cached``: whether the
    price may depend on how many tokens are cached. ``like``: for what ops have in common that differ in ``coefs``
    alone, those in ``op`` of dims and monomials, and ``numbers`` among its attributes. ``by_phase``: whether the kernel
    may be another one by phase and by what the cache holds.
    """

    number: int
    routed: bool
    cached: bool
    like: int
    op: Op
    coefs: tuple[float, ...]
    numbers: tuple[str, ...]
    by_phase: bool


_numbers: dict[tuple[object, ...], int] = {}
_contents: dict[tuple[object, ...], Content] = {}
"""By all that an op says: tables of other layouts have many of the same."""
_by_number: dict[int, Content] = {}


def numbered(number: int) -> Content:
    """The content of this number."""
    return _by_number[number]


@per_op
def content_of(op: Op) -> Content:
    """What an op is priced by."""
    tensors = [(shape_number(t.dims), t.dtype, bool(t.weight), t.expanded) for t in (*op.inputs, *op.outputs)]
    attrs = sorted([(name, repr(value)) for name, value in op.attrs.items()])
    key = (op.name, op.stage, len(op.inputs), *tensors, *attrs)
    if (known := _contents.get((op.parts, *key))) is not None:
        return known
    dims = [dim for tensor in (*op.inputs, *op.outputs) for dim in tensor.dims]
    routed = op.stage in EXPERT_STAGES or any(dim.R or dim.E or dim.X for dim in dims)
    sizes = [*dims, *(value for value in op.attrs.values() if isinstance(value, Dim))]
    by_phase = FORMULAS.get(op.name, traffic) not in OF_DIMS
    cached = by_phase or any(dim.P or dim.L for dim in sizes)
    plain = op
    if FORMULAS.get(op.name, traffic) is traffic:
        # of what only moves data no more is asked than the bytes that it reads and those that it writes: one tensor
        # of each for each combination of atoms
        moved = []
        for some in (op.inputs, op.outputs):
            amounts: dict[tuple[Dim, ...], float] = {}
            for t in some:
                first, *others = product(t.dims, t.expanded)
                form = first._replace(coef=1.0), *others
                amounts[form] = amounts.get(form, 0.0) + float(first.coef) * DTYPE_BYTES[t.dtype]
            moved.append(tuple([
                Tensor((first._replace(coef=coef), *others), "uint8")
                for (first, *others), coef in sorted(amounts.items())
            ]))
        parts = tuple(sorted({name for name in op.parts if name in REDUCES or name == "stream_mix"}))
        plain = op.but(inputs=moved[0], outputs=moved[1], parts=parts)
    every = (*plain.inputs, *plain.outputs)
    numbers = tuple([n for n in NUMBERS if n in op.attrs and not isinstance(op.attrs[n], Dim)])
    held = [pair for pair in attrs if pair[0] not in numbers and (plain is op or pair[0] in NUMBERS)]
    forms = [(t.dtype, bool(t.weight), t.expanded, *(dim[1:] for dim in t.dims)) for t in every]
    like = plain.name, plain.stage, plain.parts, len(plain.inputs), *forms, *held, *numbers
    coefs = [dim.coef for t in every for dim in (*t.dims, *product(t.dims, t.expanded))]
    coefs += [op.attrs[name] for name in numbers]
    found = _contents[(op.parts, *key)] = Content(
        _numbers.setdefault(key, len(_numbers)), routed, cached, _numbers.setdefault(like, len(_numbers)), plain,
        tuple(coefs), numbers, by_phase,
    )
    _by_number[found.number] = found
    return found


@dataclass(frozen=True, slots=True)
class _Several(Tensor):
    """A tensor of several ops at once: coefficients of its dims and ``monomials`` are arrays."""

    monomials: tuple[Dim, ...] = ()

    def numel(self, sizes: Sizes) -> Any:
        """As of one op."""
        return math.prod([dim.at(sizes) for dim in self.monomials])


def joined_op(content: Content, columns: Sequence[Any]) -> Op:
    """Ops like that of ``content`` as one; ``columns``: their :attr:`Content.coefs`, numbers or arrays."""
    one, coefs, tensors = content.op, iter(columns), list[Tensor]()
    for t in (*one.inputs, *one.outputs):
        dims, monomials = (
            tuple([dim._replace(coef=next(coefs)) for dim in some]) for some in (t.dims, product(t.dims, t.expanded))
        )
        tensors.append(_Several(dims, t.dtype, weight=t.weight, expanded=t.expanded, monomials=monomials))
    inputs, outputs = tuple(tensors[: len(one.inputs)]), tuple(tensors[len(one.inputs) :])
    attrs = one.attrs | dict(zip(content.numbers, coefs, strict=True))
    return one.but(inputs=inputs, outputs=outputs, attrs=attrs)


class _Asked(NamedTuple):
    """An op at sizes ``at``, of this ``shape``, which ``place`` tells from others."""

    pricer: RowPricer
    content: Content
    op: Op
    at: Context
    shape: tuple[int, ...]
    place: int


@dataclass(eq=False)
class _Alike:
    """Rows whose kernels are alike. Entries of all are priced as one: along a first axis where all are at the same
    sizes, else one after another, ``spans`` of each."""

    asked: list[_Asked] = field(default_factory=list)
    spans: Sequence[slice] = ()
    works: Works = field(default_factory=list)
    _whole: tuple[Op, Context, RowPricer] | None = None
    _price: RowPrice | None = None

    def ask(self, corrections: BatchedCorrections, joined: dict[tuple[float, ...], _Joined]) -> None:
        """Ask for the corrections of all."""
        first = self.asked[0]
        op, at, pricer = first.op, first.at, first.pricer
        if len(self.asked) > 1:
            places, lengths = tuple([one.place for one in self.asked]), [math.prod(one.shape) for one in self.asked]
            graphs = [one.pricer.graph_tokens for one in self.asked]
            table = np.array([one.content.coefs for one in self.asked]).T
            known: dict[bytes, Any] = {}  # many are the same in all
            columns = [
                known.setdefault(one.tobytes(), one if (one != one[0]).any() else float(one[0])) for one in table
            ]
            if places.count(first.place) == len(places):
                along = (-1, *(1,) * len(first.shape))  # a first axis
                columns = [one.reshape(along) if isinstance(one, np.ndarray) else one for one in columns]
                if graphs.count(graphs[0]) < len(graphs):
                    most: Any = np.array(graphs).reshape(along)  # a joined pricer holds a column for a number
                    pricer = replace(pricer, graph_tokens=most)
            else:
                key = first.op.name == "grouped_matmul", *graphs, *places
                if key not in joined:
                    joined[key] = _joined(self.asked, lengths)
                at, pricer, self.spans = joined[key]
                spread = {id(one): one.repeat(lengths) for one in known.values() if isinstance(one, np.ndarray)}
                columns = [spread.get(id(one), one) for one in columns]
            op = joined_op(first.content, columns)
        self._whole = op, at, pricer
        self.works = pricer.works(op, at, corrections)

    def price(self, i: int) -> RowPrice:
        """Of the row that asked as number ``i``."""
        if self._price is None:
            assert self._whole is not None
            op, at, pricer = self._whole
            took = pricer.seconds(op, at, self.works)
            self._price = RowPrice(
                row=op, seconds=took.seconds, waits_s=took.waits_s, family=took.family, level=one_level(took.level),
                error=took.error, has_formula=op.name in FORMULAS,
                spend=partial(spending_of, took.calls, pricer.device) if pricer.tells else untold,
            )
            self._whole, self.works = None, []  # the sizes of all rows are large
        shape = self.asked[i].shape
        if len(self.asked) == 1:
            return self._price
        if self.spans:
            span = self.spans[i]
            return self._price.each(
                lambda value: value[span].reshape(shape)[()] if np.ndim(value) else value, self.asked[i].op
            )
        return self._price.each(lambda value: value[i] if np.ndim(value) > len(shape) else value, self.asked[i].op)


_Joined = tuple[Context, RowPricer, Sequence[slice]]
"""Sizes and layouts of several rows, one after another, and where each row's stand."""


def _joined(asked: Sequence[_Asked], lengths: Sequence[int]) -> _Joined:
    """The sizes of all rows, one after another."""
    first, ends = asked[0], np.cumsum(lengths).tolist()
    columns: dict[str, list[Any]] = {name: [getattr(one.at.sizes, name) for one in asked] for name in ("B", "S", "P")}
    columns["verify"] = [one.at.verify for one in asked]
    if first.content.routed:
        columns |= {name: [getattr(one.at.sizes, name) for one in asked] for name in ("R", "E", "X")}
        columns |= {name: [getattr(one.at, name) for one in asked] for name in ("hit", "capacity")}
    if first.op.name == "grouped_matmul":
        columns |= {name: [getattr(one.pricer, name) for one in asked] for name in ("ep", "etp")}
        columns |= {f"{name} ": [one.pricer.sources[name] for one in asked] for name in first.pricer.sources}
    columns["graph_tokens"] = [one.pricer.graph_tokens for one in asked]
    found: dict[str, Any] = {}
    spans = [slice(end - n, end) for end, n in zip(ends, lengths, strict=True)]
    for name, values in columns.items():
        if not any(map(np.ndim, values)) and len({*values}) == 1:
            found[name] = values[0]
            continue
        whole = found[name] = np.empty(ends[-1])
        for value, one, span in zip(values, asked, spans, strict=True):
            whole[span].reshape(one.shape)[...] = value
    sizes = Sizes(**{name: found.pop(name) for name in ("B", "S", "P", "R", "E", "X") if name in found})
    beside = {name: found.pop(name) for name in ("verify", "hit", "capacity") if name in found}
    at, pricer = replace(first.at, sizes=sizes, points=None, **beside), first.pricer
    if found:
        sources = {name.strip(): found.pop(name) for name in [*found] if name.endswith(" ")}
        pricer = replace(pricer, **found, sources=sources)
    return at, pricer, spans


@dataclass(eq=False)
class Questions:
    """What rows of steps ask for, to be answered at once: prices of ops, and corrections of collectives."""

    _alike: dict[tuple[Hashable, ...], _Alike] = field(default_factory=dict)
    corrections: dict[int, BatchedCorrections] = field(default_factory=dict)
    """By identity of those that are asked."""
    _places: dict[Hashable, int] = field(default_factory=dict)
    _shapes: dict[tuple[int, bool], tuple[int, ...]] = field(default_factory=dict)
    """Of rows, routed or not, by identity of what they are priced at, which those that asked keep alive."""

    def op(self, pricer: RowPricer, content: Content, op: Op, at: Context, place: int) -> Pending:
        """The price of an op at sizes ``at``, which ``place`` tells from others, after :meth:`find`."""
        key: tuple[Hashable, ...] = (
            content.like, id(pricer.corrections), id(pricer.engine), id(pricer.device), at.mxfp4,
            content.routed and (True, pricer.held),
        )
        if content.by_phase:
            key = *key, at.decode, at.has_fp4, float(at.kv_bytes) if np.ndim(at.kv_bytes) == 0 else 0.0
        if op.name == "grouped_matmul":
            key = *key, at.backend, at.masked_skips, pricer.balanced, pricer.feed_forward, *pricer.sources
        rows = self._alike.get(key)
        if rows is None:
            rows = self._alike[key] = _Alike()
        shape = self._shapes.get((id(at), content.routed))
        if shape is None:
            sizes = [at.sizes.B, at.sizes.S, at.sizes.P, at.verify]
            if content.routed:
                sizes += [at.sizes.R, at.sizes.E, at.sizes.X, at.hit, at.capacity]
            shape = self._shapes[id(at), content.routed] = np.broadcast_shapes(*map(np.shape, sizes))
        rows.asked.append(_Asked(pricer, content, op, at, shape, place))
        return partial(rows.price, len(rows.asked) - 1)

    def place(self, at: Hashable) -> int:
        """A number for what rows are priced at, the same for equal ones."""
        return self._places.setdefault(at, len(self._places))

    def batched(self, corrections: Corrections) -> BatchedCorrections:
        """What stands in for ``corrections`` until all have asked."""
        if id(corrections) not in self.corrections:
            self.corrections[id(corrections)] = BatchedCorrections(corrections)
        return self.corrections[id(corrections)]

    def find(self) -> None:
        """Ask each kernel's model once."""
        joined: dict[tuple[float, ...], _Joined] = {}
        for rows in self._alike.values():
            rows.ask(self.batched(rows.asked[0].pricer.corrections), joined)
        for later in self.corrections.values():
            later.find()
