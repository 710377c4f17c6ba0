"""Measured kernels of one system, kernel by kernel: sizes, seconds, and which rows were left out by which rule.

Constants, kernel models and the accuracy page all read here, so that they rest on the same rows. Reads two layouts of
the same public tables (``aiconfigurator-core``, Apache-2.0): ``SYSTEM/KIND/ENGINE_TABLE.parquet`` in a folder, or
``SYSTEM/KIND/ENGINE/VERSION/TABLE.parquet`` in an installed package's ``systems/data``, of each table the newest
version. Needs pyarrow.
"""

from __future__ import annotations

import importlib.util
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from tensorcast.calibrate.activation_passes import read_passes, reduce_seconds, without_passes
from tensorcast.calibrate.impossible_rows import without_impossible
from tensorcast.calibrate.measured_rows import Key, MeasuredKernel, MeasuredSystem, joined
from tensorcast.calibrate.sibling_engines import as_served
from tensorcast.cost.kernels.shape_tables import calls_of
from tensorcast.cost.kernels.vocabulary import ALIASES, SIZES, Columns
from tensorcast.errors import InputError
from tensorcast.profiles.device import DeviceProfile

SOURCE = "aiconfigurator-core 0.12.0 (Apache-2.0), kernel tables measured on {system}"

COLLECTIVES = ("nccl", "oneccl")
"""Tables of collectives' libraries; ``op_name`` says which collective a row is."""

ANY_ENGINE = (*COLLECTIVES, "wideep_deepep_ll", "wideep_deepep_normal")
"""Tables of libraries that every engine calls."""

NOT_READ = ("computescale", "dsv4_megamoe_module")
"""Tables without a family here: what a scale costs beside the cast
(:mod:`tensorcast.calibrate.activation_passes` reads it); one fused module of one model."""

RECURRENT = ("gdn", "mamba2")
"""Tables of linear attention and state-space layers: ``kernel_source`` and ``phase`` say which kernel a row is."""

MICROSECONDS = ("moe_a2a",)
"""Tables whose ``latency`` is in microseconds; the others' is in milliseconds."""

HASHED = {
    "gemm": ("m", "n", "k"),
    "grouped_gemm": ("tokens", "hidden", "inter", "topk", "experts", "moe_tp", "moe_ep", "distribution", "gated"),
}
"""What tells whether a shape is held out where that is not all of :data:`~tensorcast.cost.kernels.vocabulary.SIZES`."""

LOWEST_S = 1e-6
"""No kernel takes less: launch and drain alone take about 2 us on these devices."""

REPEATS = "repeats of a shape, their median taken"

@dataclass(frozen=True)
class Rule:
    """``drops`` tells which rows of a kernel, also as the table has them, are left out for ``reason``."""

    reason: str
    drops: Callable[[MeasuredKernel, pd.DataFrame], np.ndarray]


def _every(rows: MeasuredKernel, holds: bool) -> np.ndarray:
    return np.full(len(rows), holds)


def _no_time(rows: MeasuredKernel, _: pd.DataFrame) -> np.ndarray:
    return ~(rows.seconds > LOWEST_S)


def _ungraphed(rows: MeasuredKernel, _: pd.DataFrame) -> np.ndarray:
    return _every(rows, rows.key[:3] == ("gemm", "fp8_block", "vllm"))


def _eager(rows: MeasuredKernel, _: pd.DataFrame) -> np.ndarray:
    return _every(rows, rows.key[3] == "eager")


def _tied_routing(rows: MeasuredKernel, _: pd.DataFrame) -> np.ndarray:
    """DeepSeek-V3's shape alone: other models of 256 experts and top-8 gain from EP as their like do (balanced, 4096
    tokens and more on H200: EP8 is 1.7-3.8 times as fast as EP1 on sglang, 2.4-8.6 on vllm, DeepSeek-V3's 1.4)."""
    family, engine, variant = rows.key[0], rows.key[2], rows.key[3]
    if family != "grouped_gemm" or engine not in ("sglang", "vllm") or variant:
        return _every(rows, False)
    c = rows.columns
    return (c["hidden"] == 7168) & (c["experts"] == 256) & (c["topk"] == 8) & (c["moe_ep"] > 1)


def _few_warps(rows: MeasuredKernel, _: pd.DataFrame) -> np.ndarray:
    exchange = rows.key[0] == "moe_exchange" and rows.key[3].startswith("low_latency")
    return rows.columns["experts"] < 32 if exchange else _every(rows, False)


def _absorbed(rows: MeasuredKernel, raw: pd.DataFrame) -> np.ndarray:
    """SGLang's Hopper table timed FlashAttention over latents, which takes 3.3 times as long on long prompts as
    TensorRT-LLM's over expanded heads: (576 + 512) / (192 + 128) of its arithmetic. SGLang 0.5.14 expands prompts
    (models/deepseek_common/attention_backend_handler.py: ``MHA_CHUNKED_KV``, ``MHA_ONE_SHOT``), and vLLM does."""
    if rows.key[0] != "mla_prefill" or rows.key[2] != "sglang" or "kernel_source" not in raw:
        return _every(rows, False)
    return raw["kernel_source"].to_numpy(str) == "flash_attention"


def _libraries(rows: MeasuredKernel, raw: pd.DataFrame) -> dict[str, np.ndarray]:
    """Which rows are whose, of attention that several libraries were timed at; the one with most rows first."""
    if not rows.key[0].startswith("attention") or "kernel_source" not in raw:
        return {}
    source = raw["kernel_source"].to_numpy(str)
    names, counts = np.unique(source, return_counts=True)
    return {str(name): source == name for name in names[np.argsort(-counts, kind="stable")]}


def _twice(rows: MeasuredKernel, usual: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Those of ``own`` rows of heads and windows at which the ``usual`` library was timed, too, at some shape."""
    shapes = pd.DataFrame(rows.columns)
    both = shapes[own].drop_duplicates().merge(shapes[usual].drop_duplicates(), on=list(shapes))
    heads = ["head_dim", "window"]
    known = both[heads].drop_duplicates().assign(both=True)
    return own & shapes.merge(known, how="left", on=heads)["both"].notna().to_numpy()


def _not_the_default(rows: MeasuredKernel, raw: pd.DataFrame) -> np.ndarray:
    """Where two libraries were timed at one shape the plain kernel has the one with most rows, SGLang's default for
    most models: on SM100 TensorRT-LLM's. The others are kernels of their own: Triton's for heads of 256 (Qwen3-Next,
    Qwen3.5), up to 9 times as long on prompts and 67 on long contexts, and FlashInfer's for heads of 128 (Nemotron-H).
    """
    usual, *others = _libraries(rows, raw).values() or [_every(rows, False)]
    return np.any([_every(rows, False), *(_twice(rows, usual, own) for own in others)], axis=0)


def _own_kernels(rows: MeasuredKernel, raw: pd.DataFrame) -> Iterator[tuple[MeasuredKernel, pd.DataFrame]]:
    """The kernels of libraries that were timed at another's shapes, each with all of its rows."""
    found = _libraries(rows, raw)
    usual = next(iter(found.values()), None)
    for name, own in found.items():
        if usual is not None and own is not usual and _twice(rows, usual, own).any():
            yield replace(rows.take(own), key=(*rows.key[:3], name)), raw[own]


APART = 1.5
"""Times as long as at two rows, in the median of a kernel's matrices, from which on one row was not timed as it is."""


def _first_token_apart(rows: MeasuredKernel, _: pd.DataFrame) -> np.ndarray:
    """vLLM's FP8 GEMM on every Blackwell server: 13 to 16 us more at one row than at two whatever the matrix, 32 x 32
    as well (15 against 6 us), on B200 at three shapes in four. The other engines' take as long at one row as at two,
    and so did this kernel in its authors' benchmark (github.com/vllm-project/vllm/pull/18778: 6 us at 1 and 16)."""
    c = rows.columns
    if rows.key[0] != "gemm" or not (c["m"] == 1).any():
        return _every(rows, False)
    frame = pd.DataFrame({"m": c["m"], "n": c["n"], "k": c["k"], "batch": c["batch"], "seconds": rows.seconds})
    timed = frame[(frame["m"] <= 2) & (frame["seconds"] > LOWEST_S)]
    both = timed.pivot_table("seconds", ["n", "k", "batch"], "m", "median").dropna()
    apart = both.shape[1] == 2 and len(both) and (both[1] / both[2]).median() > APART
    return (c["m"] == 1) & bool(apart)


RULES = (
    Rule("no time or under 1 us", _no_time),
    Rule("vllm fp8_block timed without graph capture (host-bound floor of 60-400 us)", _ungraphed),
    Rule("one row: a constant beside the kernel, which two rows do not take", _first_token_apart),
    Rule("launched one by one: a captured step runs the graph's kernels", _eager),
    Rule("not the engine's usual library where two were timed at one shape: a kernel of its own", _not_the_default),
    Rule("absorbed latents on prompts, which engines expand (sglang, Hopper)", _absorbed),
    Rule("grouped top-k ties send most choices to rank 0 (sglang, vllm; DeepSeek-V3, EP > 1)", _tied_routing),
    Rule("low-latency exchange with under 32 experts (few warps drive the link: a tenth of its speed)", _few_warps),
)
"""Applied in turn, to every kernel; a row counts for the first that drops it."""


def installed_tables() -> Path:
    """Where an installed ``aiconfigurator-core`` keeps its tables. Raises :class:`InputError` where there is none."""
    found = importlib.util.find_spec("aiconfigurator_core")
    if found is None or not found.submodule_search_locations:
        raise InputError("no aiconfigurator-core is installed: pip install 'tensorcast[silicon]', or give a folder")
    return Path(next(iter(found.submodule_search_locations))) / "systems" / "data"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def table_files(folder: Path, system: str) -> list[tuple[str, str, str, Path]]:
    """(engine, table, version or "", file) of every table of a system, in either layout."""
    flat = [(*p.stem.partition("_")[::2], "", p) for p in sorted(folder.glob(f"{system}/*/*.parquet"))]
    newest: dict[tuple[str, str], tuple[str, str, str, Path]] = {}
    for path in folder.glob(f"{system}/*/*/*/*.parquet"):
        version, engine = path.parts[-2], path.parts[-3]
        key, found = (engine, path.stem), (engine, path.stem, version, path)
        if key not in newest or _version(version) > _version(newest[key][2]):
            newest[key] = found
    return flat + [newest[key] for key in sorted(newest)]


def systems_in(folder: Path) -> list[str]:
    """Names of the systems that a folder of tables holds. Raises :class:`InputError` where there is no folder."""
    if not Path(folder).is_dir():
        raise InputError(f"no folder of measured tables at {folder}")
    return sorted({path.parts[len(Path(folder).parts)] for path in Path(folder).glob("*/*/**/*.parquet")})


def _both_directions(raw: pd.DataFrame) -> pd.DataFrame:
    """DeepEP's tables hold dispatch and combine in one row: one row each."""
    parts = []
    for phase in ("dispatch", "combine"):
        times = next(raw[c] for c in (f"{phase}_avg_t_us", f"{phase}_transmit_us") if c in raw.columns)
        parts.append(raw.assign(phase=phase, latency=times / 1e3))
    return pd.concat(parts, ignore_index=True)


def _recurrent(raw: pd.DataFrame) -> pd.DataFrame:
    """The kernel that each row of such a table is, as its family; ``seq_len`` 1 where a step decodes."""
    decode = raw["phase"].to_numpy(str) == "generation"
    kind = np.where(raw["kernel_source"].str.contains("conv1d"), "conv", "linear")
    return raw.assign(family=[f"{k}_{'decode' if d else 'prefill'}" for k, d in zip(kind, decode, strict=True)],
                      seq_len=np.where(decode, 1, raw["seq_len"]))


def distribution_of(skew: float) -> str:
    """The tables' name of a routing law."""
    return {0.0: "balanced", -1.0: "uniform"}.get(skew, f"power_law_{skew:g}")


def row_hash(frame: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """crc32 of the named columns' text, numbers in one notation: the same wherever a row was read from."""
    text = pd.Series("", index=frame.index)
    for name in columns:
        values = frame[name]
        written = {v: v if isinstance(v, str) else f"{float(v):.10g}" for v in values.unique()}
        text = text + "|" + values.map(written)
    codes = {key: zlib.crc32(key.encode()) for key in text.unique()}
    return text.map(codes).to_numpy(np.int64)


def hashed(family: str, columns: Columns) -> np.ndarray:
    """A hash of every row's shape: the same on every device, dtype and engine, wherever it was read from."""
    frame = pd.DataFrame(columns)
    if "skew" in frame:
        frame["distribution"] = frame["skew"].map(distribution_of)
    return row_hash(frame, HASHED.get(family, SIZES[family]))


def held_out(family: str, columns: Columns, share: int = 4) -> np.ndarray:
    """One shape in ``share``, on every device and engine alike: no fit, of constants or of models, sees it."""
    return hashed(family, columns) % share == 0


def _read(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except ImportError as error:
        raise InputError("reading measured tables needs pyarrow: pip install 'tensorcast[calibrate]'") from error


def _kept(rows: MeasuredKernel, raw: pd.DataFrame, system: MeasuredSystem) -> MeasuredKernel:
    """The rows that no rule drops; the others are counted."""
    keep = np.ones(len(rows), dtype=bool)
    for rule in RULES:
        bad = keep & rule.drops(rows, raw)
        system.drop(rows.key[0], rule.reason, int(bad.sum()))
        keep &= ~bad
    return rows.take(keep)


def _once(found: Sequence[MeasuredKernel], system: MeasuredSystem) -> MeasuredKernel:
    """One row per shape: the median of repeats, counted.

    The fastest would be the better of two readings of one kernel (they differ by 3-5 %), not a faster kernel: where an
    engine has several for a shape, the tables say which ran, and that is a size here (``source``) or a variant.
    """
    whole = joined(found)
    sizes = list(whole.columns)
    frame = pd.DataFrame({**whole.columns, "seconds": whole.seconds})
    single = frame.groupby(sizes, sort=False, as_index=False).median()
    system.drop(whole.key[0], REPEATS, len(whole) - len(single))
    columns = {name: single[name].to_numpy(float) for name in sizes}
    return MeasuredKernel(whole.key, columns, single["seconds"].to_numpy(float), whole.versions)


def _kernels_in(
    path: Path, table: str, engine: str, version: str, system: str
) -> Iterator[tuple[MeasuredKernel, pd.DataFrame]]:
    """Every kernel of one table, all rows, and these as the table has them."""
    raw = _read(path).assign(family=table, system=system)
    if table.startswith("wideep_deepep"):
        raw = _both_directions(raw)
    if table in RECURRENT:
        raw = _recurrent(raw)
    seconds = raw["latency"].to_numpy(float) * (1e-6 if table in MICROSECONDS else 1e-3)
    ran = raw["engine_version"].astype(str).unique() if "engine_version" in raw else [version]
    kind, versions = "any" if table in ANY_ENGINE else engine, tuple(f"{engine} {one}" for one in ran)
    for calls in calls_of(raw):
        key = (calls.family, calls.dtype, kind, calls.variant)
        rows, part = MeasuredKernel(key, calls.columns, seconds[calls.rows], versions), raw.iloc[calls.rows]
        yield rows, part
        yield from _own_kernels(rows, part)


def read_system(
    folder: Path, system: str, families: tuple[str, ...] | None = None, device: DeviceProfile | None = None
) -> MeasuredSystem:
    """Every known table of a system; with its ``device`` without the rows that its datasheet does not allow. Raises
    :class:`InputError` where there is none."""
    result = MeasuredSystem(system, source=SOURCE.format(system=system))
    parts: dict[Key, list[MeasuredKernel]] = {}
    files = table_files(Path(folder), system)
    for engine, stem, version, path in files:
        table = stem.removesuffix("_perf")
        family = ALIASES.get(table, table)
        of_several = table in COLLECTIVES or table in RECURRENT
        if table in NOT_READ or (family not in SIZES and not of_several):
            continue
        if families and family not in families and not of_several:
            continue
        for rows, raw in _kernels_in(path, table, engine, version, system):
            if len(kept := _kept(rows, raw, result)):
                parts.setdefault(rows.key, []).append(kept)
    result.kernels = {key: _once(found, result) for key, found in parts.items()}
    passes = read_passes({(engine, stem.removesuffix("_perf")): path for engine, stem, _, path in files}, _read)
    without_passes(result, passes)
    result.reduce_s = reduce_seconds(passes)
    if device is not None:
        without_impossible(result, device)
    as_served(result)
    if not result.kernels:
        raise InputError(f"no measured tables of {system} below {folder}")
    return result
