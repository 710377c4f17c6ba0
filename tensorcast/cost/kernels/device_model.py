"""One device's kernel model: per kernel the fitted residual over its formula, where it was measured, how far off it is.

Stored as ``calibration/DEVICE.npz`` beside the device profiles: small integer arrays for the trees and one JSON text
for the rest; no pickle. ``calibration/DEVICE.yaml`` says the same in words for readers (provenance, points, errors).
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorcast.cost.evidence import NORMAL_80
from tensorcast.cost.kernels.trees import Trees, leaf_steps
from tensorcast.cost.kernels.vocabulary import NON_GATED, Columns, Lookup, source_of
from tensorcast.cost.work import Array, Mask, Size
from tensorcast.errors import InputError

FORMAT = 2
"""Layout of the stored file; another number is refused."""

LINES = {
    "gemm": (), "grouped_gemm": ("hidden", "inter", "topk", "experts"),
    "attention_prefill": ("head_dim", "window", "kv_bytes"), "attention_decode": ("head_dim", "window", "kv_bytes"),
    "mla_prefill": ("kv_bytes",), "mla_decode": ("kv_bytes",), "mla_prefill_module": ("kv_bytes",),
    "mla_decode_module": ("kv_bytes",), "moe_exchange": ("ranks", "nodes"),
    **dict.fromkeys(("all_reduce", "all_gather", "reduce_scatter", "all_to_all"), ("ranks",)), "quantize": (),
}
"""Sizes that must equal a measured combination for a shape to count as measured (collectives: the group size); in the
others it must lie between the least and the most that were measured."""

CONFIGURATION = {"grouped_gemm": ("hidden", "inter", "topk", "experts", "moe_tp", "moe_ep", "skew")}
"""Sizes that an engine picks its kernel by once, for all numbers of tokens: measured configurations may run at a level
of their own, which no size explains."""

ATTENTION = ("attention_prefill", "attention_decode", "mla_prefill", "mla_decode")
ATTENDED = ("new", "past")
"""Families that take no less for more tokens, and the sizes that count these."""

SOURCE_OF = ("hidden", "inter", "topk", "experts")
"""Sizes of a model, whose experts an engine runs with a library of its choice: one where ranks hold whole experts
(``moe_ep`` over 1), one else."""

WEIGHTS = (1.0, 1e5 + 3, 1e9 + 7, 1e13 + 9)
"""Weights under which whole sizes have distinct sums."""

UNTUNED = 0.3
"""log of the factor over its like from which on a measured configuration is taken to have run untuned kernels. A third
of some models' under TensorRT-LLM take 2 to 10 times as long as the same split under another routing law or on another
device, at random; most likely because the tables' collector shares tuned kernels between processes and GPUs
(github.com/ai-dynamo/aiconfigurator, ``collector/trtllm/collect_moe.py``). An engine tunes its own."""

GENERATED = (source_of("modular"), source_of("_trtllm_"))
"""vLLM's names of TensorRT-LLM's generated kernels without and with the router in their call: the same products."""

TELL = 2
"""Models that a library must have been timed for to tell what its kernels take for a model that was timed with
another's: of one, its own sizes stand beside everything else."""

UNPACKS = source_of("marlin")
"""Marlin, whose MXFP4 and INT4 experts are one kernel. Either was timed for one model: 896 experts in MXFP4 take 1.1
times what Kimi-K2's in INT4 say of them, 0.8 to 1.4 in four of five rows (vLLM 0.24.0 on H200 and B200)."""

OUTSIDE = 0.055
"""By how much (log) an interval's ends move away per factor of two beyond the measured sizes. Settled on H200 and B200
by leaving the largest values of a size out of the fit; ``make accuracy`` shows on H100 how often that holds."""

FEW = {2: 2.40, 3: 1.47, 4: 1.28, 5: 1.20, 6: 1.15}
"""By how much an interval over models widens where so few were measured: Student's 90 % quantile with one degree of
freedom fewer, over the normal one."""

ONE_MODEL = NORMAL_80 * 0.4
"""Half an interval for other models where one alone was measured: the error of datasheet constants."""


def widened(low: float, high: float, models: int) -> tuple[float, float]:
    """Ends of an interval over ``models`` models (logs), as wide as so few allow."""
    if models <= 1:
        return min(low, -ONE_MODEL), max(high, ONE_MODEL)
    middle, half = (low + high) / 2.0, (high - low) / 2.0 * FEW.get(models, 1.0)
    return min(low, middle - half), max(high, middle + half)


@dataclass(frozen=True)
class Kernel:
    """One kernel of one engine. Errors are of rows held out of the fit, as log(measured / predicted).

    ``low``, ``high``: 10 % and 90 % quantiles per bin of log2 predicted seconds, bins between ``edges``; ``new_low``,
    ``new_high`` the same over whole shapes (models, weight sizes) left out, for shapes that were not measured, where
    ``extrapolated`` is used if there is one, else the first ``new_trees`` alone; ``ruled`` these two where it is said
    whose kernel runs. ``levels``: measured configurations off the level that their sizes tell, the sizes of
    :data:`CONFIGURATION`, the library where models ran several, and then log of the factor. ``sources``: whose kernels
    ran, the sizes of :data:`SOURCE_OF`, whether experts are spread over ranks, and which library (of
    :data:`~tensorcast.cost.kernels.vocabulary.SOURCES`).
    ``constants``: digest of what the formula rested on.
    ``monotone``: trees for other devices (:mod:`tensorcast.cost.kernels.monotone`), over all but a ``share`` of the
    formula's growth within ``span``, the ends of its log seconds in the fit; ``probes``: the shapes from whose median
    those seconds count.
    """

    family: str
    dtype: str
    engine: str
    variant: str
    trees: Trees
    box: Mapping[str, tuple[float, float]]
    seen: tuple[tuple[float, ...], ...]
    edges: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    new_low: float
    new_high: float
    new_trees: int
    levels: tuple[tuple[float, ...], ...] = ()
    sources: tuple[tuple[float, ...], ...] = ()
    extrapolated: Trees | None = None
    ruled: tuple[float, ...] = ()
    constants: str = ""
    monotone: Trees | None = None
    share: float = 0.0
    span: tuple[float, float] = (0.0, 0.0)
    probes: Mapping[str, Sequence[float]] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)

    def beyond(self, columns: Columns) -> Array:
        """Factors of two by which the sizes lie outside what was measured, added up; of one more where zero was."""
        total = np.zeros(len(next(iter(columns.values()))))
        for name, (low, high) in self.box.items():
            if name not in columns or ((columns[name] >= low) & (columns[name] <= high)).all():
                continue
            more = 1.0 if low <= 0 else 0.0
            value = np.maximum(columns[name] + more, 1e-9)
            total = total + np.log2(np.maximum(value / max(high + more, 1e-9), 1.0))
            total = total + (np.log2(np.maximum(low / value, 1.0)) if low > 0 else 0.0)
        return total

    def longer(self, columns: Columns) -> Mask:
        """Attention over more tokens, or of more new ones, than were measured: no other size is outside."""
        none = np.zeros(len(next(iter(columns.values()))), dtype=bool)
        if self.family not in ATTENTION:
            return none
        sides = [(name in ATTENDED, columns[name], *ends) for name, ends in self.box.items() if name in columns]
        longer = np.any([none, *(values > high for counts, values, _, high in sides if counts)], axis=0)
        inside = [(values >= low) & (counts | (values <= high)) for counts, values, low, high in sides]
        return longer & np.all(inside, axis=0)

    def measured_shape(self, columns: Columns) -> Mask:
        """Whether the sizes of :data:`LINES` are a combination that was measured, one of those ``seen``, and not with
        another library's kernel than the one that runs."""
        size, lines = len(next(iter(columns.values()))), LINES[self.family]
        if not lines or not all(name in columns for name in lines):
            return np.full(size, not lines)
        codes = self._shapes
        if not len(codes):
            return np.zeros(size, dtype=bool)
        mine = np.round(sum((w * columns[name] for w, name in zip(WEIGHTS, lines, strict=False)), np.zeros(1)))
        result: Mask = codes[np.minimum(np.searchsorted(codes, mine), len(codes) - 1)] == mine
        if result.any() and "source" in columns and (runs := self.library(columns)) is not None:
            model = [*(columns[name] for name in SOURCE_OF), (columns["moe_ep"] > 1).astype(float)]
            timed, ran = self._libraries
            result &= ~np.isnan(ran.at([*model, runs])) | np.isnan(timed.at(model))
        return result

    @cached_property
    def _shapes(self) -> Array:
        """Codes of the combinations that were measured, ascending."""
        lines = LINES[self.family]
        seen = np.asarray(self.seen, dtype=float).reshape(len(self.seen), len(lines))
        return np.sort(np.round(seen @ np.array(WEIGHTS[: len(lines)])))

    @cached_property
    def _libraries(self) -> tuple[Lookup, Lookup]:
        """The library that a model was timed with; the same of a model and one of its libraries."""
        table = np.asarray(self.sources)
        return Lookup(table), Lookup(np.column_stack([table, table[:, -1]]))

    @cached_property
    def _leveled(self) -> Lookup:
        return Lookup(np.asarray(self.levels, dtype=float))

    @cached_property
    def known(self) -> tuple[float, ...]:
        """Libraries that were measured for :data:`TELL` models."""
        counts = Counter(code for *_, code in {(*line[: len(SOURCE_OF)], line[-1]) for line in self.sources})
        return tuple(code for code in counts if counts[code] >= TELL)

    def timed(self, source: float, columns: Columns) -> bool:
        """Whether a library was: for :data:`TELL` models, or for those of the calls that it runs."""
        if not self.sources or source in self.known:
            return bool(self.sources)
        some = [columns[name][columns["source"] == source] for name in (*SOURCE_OF, "moe_ep", "source")]
        return bool(np.isfinite(self._libraries[1].at([*some[:-2], (some[-2] > 1) * 1.0, some[-1]])).all())

    def library(self, columns: Columns) -> Array | None:
        """The library whose kernel runs: as the columns say if enough of it was measured, else as was measured for the
        model, else as the columns say, else what most models with such experts (gated or not) ran. None: one alone
        ran."""
        if not self.sources or not all(name in columns for name in (*SOURCE_OF, "moe_ep")):
            return None
        (timed, known), split = self._libraries, columns["moe_ep"] > 1
        said = columns.get("source", np.full(len(split), np.nan))
        model = [*(columns[name] for name in SOURCE_OF), split.astype(float)]
        ran = known.at([*model, np.nan_to_num(said)])
        source = np.where(np.isnan(ran) & np.isin(said, self.known), said, ran)
        if np.isnan(source).any():
            source = np.where(np.isnan(source), timed.at(model), source)
            source = np.where(np.isnan(source) & np.isin(said, timed.table[:, -1]), said, source)
        if not np.isnan(source).any():
            return source
        plain = np.array([tuple(line[:4]) in NON_GATED for line in self.sources])
        ungated = columns.get("gated", np.ones(len(split))) == 0
        for spread, without in ((False, False), (False, True), (True, False), (True, True)):
            same = (timed.table[:, -2] == spread) & (plain == without)
            some = same if same.any() else timed.table[:, -2] == spread
            codes, counts = np.unique(timed.table[some, -1], return_counts=True)
            if len(codes):
                source[np.isnan(source) & (split == spread) & (ungated == without)] = codes[counts.argmax()]
        return np.nan_to_num(source)

    def twin(self, columns: Columns) -> Array:
        """The one of :data:`GENERATED` that a call's model was timed with where the other runs; 0 elsewhere."""
        said = columns["source"]
        result = np.zeros(len(said))
        if np.isin(said, GENERATED).any():
            model = [*(columns[name] for name in SOURCE_OF), (columns["moe_ep"] > 1).astype(float)]
            timed = np.nan_to_num(self._libraries[0].at(model))
            alike = np.isin(said, GENERATED) & np.isin(timed, GENERATED) & (timed != said)
            result = np.where(alike & self.measured_shape({**columns, "source": timed}), timed, result)
        return result

    def correction(self, features: Columns, measured_shape: Mask) -> Array:
        """log of what to multiply the formula by: of shapes that were not measured as learnt from other shapes."""
        if measured_shape.all() or (self.extrapolated is None and self.new_trees >= len(self.trees.feature)):
            return self.trees.values(features)
        result = np.empty(len(measured_shape))
        measured, new = np.flatnonzero(measured_shape), np.flatnonzero(~measured_shape)
        if len(measured):
            result[measured] = self.trees.values({name: features[name][measured] for name in self.trees.names})
        if self.extrapolated is None:
            result[new] = self.trees.values({name: features[name][new] for name in self.trees.names}, self.new_trees)
        else:  # those trees have seen other dtypes' rows too
            known = features | {"own": np.ones(len(result))}
            columns = {name: known[name][new] for name in self.extrapolated.names if name in known}
            result[new] = self.extrapolated.values({"source": np.zeros(len(new)), **columns})
        return result

    def monotone_correction(self, coordinates: Columns, log_formula: Array) -> Array:
        """log of what to multiply the formula by on another device, such that times grow with every size."""
        assert self.monotone is not None
        return self.monotone.values(coordinates) - self.share * np.clip(log_formula, *self.span)

    def level(self, columns: Columns) -> Array:
        """log of the factor by which a measured configuration differs from others of like sizes; 0 if none is known."""
        names = CONFIGURATION.get(self.family, ())
        if not self.levels or not all(name in columns for name in names):
            return np.zeros(len(next(iter(columns.values()))))
        known, sizes = self._leveled, [columns[name] for name in names]
        if known.table.shape[1] > len(names) + 1 and (source := self.library(columns)) is not None:
            sizes.append(source)
        return np.nan_to_num(known.at(sizes))

    def interval(self, seconds: Array, columns: Columns, measured: Mask, outside: Array) -> tuple[Array, Array]:
        """log of the 80 % interval's ends over ``seconds``; ``outside``: :meth:`beyond` of the sizes."""
        part = np.searchsorted(self.edges, np.log2(np.maximum(seconds, 1e-9)))
        ends: tuple[Size, Size] = (self.new_low, self.new_high)
        ruled = (self.ruled[0], self.ruled[1]) if self.ruled else (self.new_low, self.new_high)
        if self.family == "grouped_gemm" and self.seen:
            ends, ruled = (widened(*pair, len(self.seen)) for pair in ((self.new_low, self.new_high), ruled))
        if self.sources and "source" in columns:
            # whether the columns say whose kernel runs, a library that was measured: of few, which numpy looks up fast
            stated = np.isin(columns["source"], list({line[-1] for line in self.sources}))
            ends = np.where(stated, ruled[0], ends[0]), np.where(stated, ruled[1], ends[1])
        low = np.where(measured, np.asarray(self.low)[part], ends[0] - OUTSIDE * outside)
        high = np.where(measured, np.asarray(self.high)[part], ends[1] + OUTSIDE * outside)
        return np.minimum(low, 0.0), np.maximum(high, 0.0)


@dataclass(frozen=True)
class DeviceModel:
    """All kernels of a device, by (family, dtype, engine, variant)."""

    device: str
    kernels: Mapping[tuple[str, str, str, str], Kernel]
    provenance: str = ""

    def find(self, family: str, dtype: str, engine: str, variant: str) -> Kernel | None:
        """This engine's kernel, else the plain variant's, else another engine's of the same dtype."""
        return next(self.all_of(family, dtype, engine, variant), None)

    def all_of(self, family: str, dtype: str, engine: str, variant: str) -> Iterator[Kernel]:
        """Kernels that may stand for one, the nearest first."""
        for name in (variant, "") if variant != "eager" else (variant,):
            for who in (engine, "any", *STAND_IN.get(engine, STAND_IN["any"])):
                if (found := self.kernels.get((family, dtype, who, name))) is not None:
                    yield found

    def timed_with(self, source: float, name: tuple[str, str, str, str], columns: Columns) -> Kernel | None:
        """The nearest kernel that a library was timed with for what ``columns`` ask of it."""
        found = [one for one in self.all_of(*name) if one.timed(source, columns)]
        if not found and source == UNPACKS and name[1] == "mxfp4":
            others = self.all_of(name[0], "w4a16", *name[2:])
            found = [one for one in others if any(line[-1] == source for line in one.sources)]
        return found[0] if found else None


STORED_AS = {"trees": "trees", "extrapolated": "carry", "monotone": "rising"}
"""Fields of a kernel that are trees, and their names in the file; all but the first may be missing."""

STAND_IN = {
    "vllm": ("sglang", "trtllm"), "sglang": ("vllm", "trtllm"), "trtllm": ("vllm", "sglang"),
    "any": ("trtllm", "vllm", "sglang"),
}
"""Whose kernel to take where an engine's own was not measured (or not soundly): vLLM and SGLang share most kernels."""


def pack(model: DeviceModel) -> bytes:
    """The stored form: leaves as bytes with one scale per tree, questions as small integers."""
    heads, borders, feature, border, leaves, scales = [], [], [], [], [], []
    for kernel in model.kernels.values():
        head = {part.name: getattr(kernel, part.name) for part in fields(kernel) if part.name not in STORED_AS}
        for name, stored in STORED_AS.items():
            trees: Trees | None = getattr(kernel, name)
            if trees is None:
                continue
            head[stored] = {"names": trees.names, "bias": trees.bias, "trees": len(trees.feature),
                          "depth": trees.feature.shape[1], "borders": [len(b) for b in trees.borders]}
            borders += [np.asarray(b, dtype=np.float32) for b in trees.borders]
            feature.append(trees.feature.ravel())
            border.append(trees.border.ravel())
            scale = leaf_steps(trees.leaves)
            leaves.append(np.round(trees.leaves / scale[:, None]).astype(np.int8).ravel())
            scales.append(scale.astype(np.float32))
        heads.append(head)
    about = {"format": FORMAT, "device": model.device, "provenance": model.provenance, "kernels": heads}
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, about=np.frombuffer(json.dumps(about).encode(), dtype=np.uint8), borders=_joined(borders, np.float32),
        feature=_joined(feature, np.uint8), border=_joined(border, np.uint8), leaves=_joined(leaves, np.int8),
        scales=_joined(scales, np.float32),
    )
    return buffer.getvalue()


def _joined(parts: Sequence[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)


def _stored_trees(arrays: Mapping[str, NDArray[Any]], shapes: Sequence[Mapping[str, Any]]) -> Iterator[Trees]:
    """Trees, one after another, of the ``shapes`` that the file tells."""
    counts, depths = [shape["trees"] for shape in shapes], [shape["depth"] for shape in shapes]
    splits = [count * depth for count, depth in zip(counts, depths, strict=True)]
    leaves_each = [count << depth for count, depth in zip(counts, depths, strict=True)]
    sizes = {
        "borders": [n for shape in shapes for n in shape["borders"]],
        "feature": splits, "border": splits, "leaves": leaves_each, "scales": counts,
    }
    every = {name: np.split(arrays[name], np.cumsum(each))[:-1] for name, each in sizes.items()}
    borders = iter(every.pop("borders"))
    parts = zip(shapes, *every.values(), strict=True)
    for shape, feature, border, leaves, scale in parts:
        split = shape["trees"], shape["depth"]
        values = leaves.reshape(split[0], 1 << split[1]) * scale[:, None]
        yield Trees(
            names=tuple(shape["names"]), borders=tuple(next(borders) for _ in shape["borders"]),
            feature=feature.reshape(split), border=border.reshape(split), leaves=values.astype(np.float32),
            bias=shape["bias"],
        )


def read_model(path: Path) -> DeviceModel:
    """A stored model. Raises :class:`InputError` where the file is damaged or of another format."""
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files}
        about = json.loads(arrays["about"].tobytes().decode())
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: not a kernel model ({str(error).splitlines()[0]})") from None
    if about.get("format") != FORMAT:
        raise InputError(f"{path}: format {about.get('format')!r}, this version reads {FORMAT}; calibrate anew")
    kernels: dict[tuple[str, str, str, str], Kernel] = {}
    shapes = [head[stored] for head in about["kernels"] for stored in STORED_AS.values() if stored in head]
    trees = _stored_trees(arrays, shapes)
    for head in about["kernels"]:
        head |= {name: next(trees) for name, stored in STORED_AS.items() if head.pop(stored, None) is not None}
        head["box"] = {name: tuple(ends) for name, ends in head["box"].items()}
        for name in ("edges", "low", "high", "ruled", "span"):
            head[name] = tuple(head.get(name, ()))
        for name in ("seen", "levels", "sources"):
            head[name] = tuple(tuple(line) for line in head[name])
        kernel = Kernel(**head)
        kernels[kernel.family, kernel.dtype, kernel.engine, kernel.variant] = kernel
    return DeviceModel(about["device"], kernels, about["provenance"])
