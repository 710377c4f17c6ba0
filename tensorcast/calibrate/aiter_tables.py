"""AMD's tuned kernels, as ROCm/aiter (MIT) ships them: the time of the best kernel of every shape that was tuned.

A checkout's ``aiter/configs`` holds a CSV per kernel and model, a line per shape: the kernel that its tuner found
fastest, and the mean of 101 calls of it over arrays that change, so that none stays in a cache: its own time, by the
profiler (``aiter/test_common.py``: ``perftest``, ``get_trace_perf``). What a replayed graph adds is ``graph_gap_s`` of
the device's profile. A server that has these files runs that kernel for that shape, so its time is the price; being the
least of many means it is some percent on the fast side. A GEMM's inputs are quantised beforehand, and experts' rows
sorted. vLLM and SGLang call the same kernels: they are any engine's.

Its page on attention (``op_tests/cpp/mha/README.md``) states how many FLOP/s prompts reach on MI300X and MI355X in
BF16, half of all products counted where a mask is causal, as engines' are (``benchmark_mha_fwd.cpp``).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from tensorcast.calibrate.measured_rows import MeasuredKernel, MeasuredSystem
from tensorcast.cost.kernels.vocabulary import SIZES

SOURCE = (
    "ROCm/aiter e404860 (MIT), its tuned GEMMs and fused experts on {system}, the best kernel of each sweep, and its "
    "page on attention"
)

PLACE = Path("aiter") / "configs"
"""In a checkout."""

PROMPTS = Path("op_tests") / "cpp" / "mha" / "README.md"
"""The page on attention, in a checkout; its column of forward TFLOP/s by system."""

PROMPT_COLUMNS = {"gfx942-304": 7, "gfx950-256": 8}
"""After batch, query heads, KV heads, both lengths, head's width and whether a mask is causal."""

SYSTEMS = {"mi300x": "gfx942-304", "mi325x": "gfx942-304", "mi308x": "gfx942-80", "mi355x": "gfx950-256"}
"""Devices by architecture and compute units. MI300X and MI325X differ in memory alone; tables do not say which ran."""

GFX942_UNITS = (80, 304)
"""Compute units of this architecture, where a table does not say; all others' are gfx950's."""

GEMM_DTYPES = {"a8w8_blockscale": "fp8_block", "a4w4": "w4a4", "a8w8": "fp8", "bf16": "bf16"}
"""By what a file's name holds, the first that fits; INT8 stands in a column."""

EXPERT_DTYPES = {  # activations, weights, what shares a scale
    ("bfloat16", "bfloat16", "No"): "bf16", ("float8", "float8", "per_Token"): "fp8",
    ("float8", "float8", "per_Tensor"): "fp8", ("float8", "float8", "per_1x32"): "fp8",
    ("float8", "float8", "per_1x128"): "fp8_block", ("bfloat16", "float4", "per_1x32"): "mxfp4",
    ("float8", "float4", "per_1x32"): "w4a8", ("float4", "float4", "per_1x32"): "w4a4",
    ("bfloat16", "int4", "per_1x32"): "w4a16", ("int8", "int8", "per_Token"): "int8",
}

LOWEST_S = 2e-6
"""Nothing runs for less; some lines hold 1 us."""

FALLS = 0.95
"""Of the time of a call with at most half the tokens (rows): a kernel tuned for more runs for fewer, too, padded."""

TIMES = ["us1", "us2", "us"]
MODEL = ["model_dim", "inter_dim", "expert", "topk", "dtype"]

NO_TIME = "no time or under 2 us"
ON_INPUT = "router weights on the input (Llama 4 alone)"
COPIED = "one time for several numbers of tokens: copied"
TWINS = "one time for several models' experts: kept for most choices"
SLOWER = "slower entries of a shape: the library takes the fastest"
QUICKER = "over 5 % quicker than half the tokens or rows"


def holds(folder: Path) -> bool:
    """Whether a folder is such a checkout."""
    return (Path(folder) / PLACE).is_dir()


def _tables(folder: Path, system: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Name and lines of every table of tuned kernels, of one system; not of the few batched ones."""
    for path in sorted((Path(folder) / PLACE).glob("**/*tuned*.csv")):
        if "untuned" in path.name or "batched" in path.name:
            continue
        lines = pd.read_csv(path)
        if not {"cu_num", "us"} <= set(lines):
            continue
        by_units = np.where(lines["cu_num"].isin(GFX942_UNITS), "gfx942", "gfx950")
        lines["gfx"] = lines["gfx"].fillna(pd.Series(by_units)) if "gfx" in lines else by_units
        mine = lines["gfx"] + "-" + lines["cu_num"].map("{:.0f}".format) == system
        if mine.any():
            yield path.name, lines[mine].reset_index(drop=True)


def _gemms(name: str, lines: pd.DataFrame) -> pd.DataFrame:
    """dtype, sizes and seconds of a table's GEMMs."""
    dtype = next((dtype for kind, dtype in GEMM_DTYPES.items() if kind in name), "")
    weights = lines["q_dtype_w"].astype(str) if "q_dtype_w" in lines else pd.Series("", index=lines.index)
    integers = weights.str.contains("int8")
    return lines[["M", "N", "K"]].set_axis(["m", "n", "k"], axis=1).astype(float).assign(
        batch=1.0, dtype=np.where(integers, "int8", dtype), seconds=lines["us"] * 1e-6
    )


def _said(values: pd.Series) -> pd.Series:
    """``torch.float8_e4m3fnuz`` is ``float8``, ``QuantType.per_1x32`` is ``per_1x32``."""
    return values.astype(str).str.rpartition(".")[2].str.replace(r"^(float[48]|int4|int8)_.*", r"\1", regex=True)


def _drop(lines: pd.DataFrame, bad: pd.Series | np.ndarray, reason: str, system: MeasuredSystem) -> pd.DataFrame:
    system.drop("grouped_gemm", reason, int(bad.sum()))
    return lines[~bad]


def _experts(lines: pd.DataFrame, system: MeasuredSystem) -> pd.DataFrame:
    """dtype, sizes and seconds of fused experts; ``lines`` of all tables. Copied times are left out: of several numbers
    of tokens all, as it is not said which ran, of several models' all but that of most choices."""
    kinds = zip(*(_said(lines[name]) for name in ("q_dtype_a", "q_dtype_w", "q_type")), strict=True)
    lines = lines.assign(dtype=[EXPERT_DTYPES.get(kind, "") for kind in kinds])
    lines = lines[(lines["dtype"] != "") & (lines["use_g1u1"] == 1)]
    for name in ("us1", "us2"):
        lines[name] = lines[name].fillna(0.0)
    lines = _drop(lines, lines["doweight_stage1"] != 0, ON_INPUT, system)
    tokens = lines.groupby([*MODEL, *TIMES])["token"].transform("nunique")
    lines = _drop(lines, tokens > 1, COPIED, system)
    most = lines.groupby(["token", *TIMES])["topk"].transform("max")
    lines = _drop(lines, lines["topk"] < most, TWINS, system)
    names = {"token": "tokens", "model_dim": "hidden", "inter_dim": "inter", "expert": "experts"}
    found = lines.rename(columns=names)[[*names.values(), "topk", "dtype"]]
    return found.assign(
        slots=found["experts"], moe_tp=1, moe_ep=1, gated=1, skew=-1, seconds=lines["us"] * 1e-6
    )


def quicker_than_half(lines: pd.DataFrame, size: str) -> np.ndarray:
    """Which lines take under :data:`FALLS` of what another takes with at most half as many tokens or rows, all other
    sizes the same."""
    others = [name for name in lines if name not in (size, "seconds")]
    result = pd.Series(False, index=lines.index)
    for _, part in lines.groupby(others):
        if len(part) > 1:
            part = part.sort_values(size)
            longest = np.maximum.accumulate(part["seconds"].to_numpy())
            half = np.searchsorted(part[size].to_numpy(), part[size].to_numpy() / 2.0, side="right") - 1
            before = np.where(half >= 0, longest[np.maximum(half, 0)], 0.0)
            result[part.index] = part["seconds"].to_numpy() < FALLS * before
    return result.to_numpy()


def _kernels(family: str, lines: pd.DataFrame, system: MeasuredSystem) -> Iterator[MeasuredKernel]:
    """The lines by dtype, the fastest of every shape."""
    size = "m" if family == "gemm" else "tokens"
    timed = lines["seconds"] >= LOWEST_S
    system.drop(family, NO_TIME, int((~timed).sum()))
    ordered = lines[timed].sort_values("seconds", kind="stable")
    sizes = [name for name in ordered if name != "seconds"]
    first = ~ordered.duplicated(sizes)
    system.drop(family, SLOWER, int((~first).sum()))
    fastest = ordered[first].reset_index(drop=True)
    falls = quicker_than_half(fastest, size)
    system.drop(family, QUICKER, int(falls.sum()))
    for dtype, part in fastest[~falls].groupby("dtype"):
        columns = {name: part[name].to_numpy(float) for name in SIZES[family]}
        key = (family, str(dtype), "any", "")
        yield MeasuredKernel(key, columns, part["seconds"].to_numpy(float), ("aiter e404860",))


def _prompts(folder: Path, system: str) -> Iterator[MeasuredKernel]:
    """Causal attention of the page's table; nothing where a checkout has no page or its table not this system."""
    page, column = Path(folder) / PROMPTS, PROMPT_COLUMNS.get(system)
    if column is None or not page.is_file():
        return
    lines = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in page.read_text().splitlines()]
    numbers = [line for line in lines if len(line) > column and line[0].isdigit()]
    table = np.array([[*line[:7], line[column]] for line in numbers], dtype=float).reshape(-1, 8)
    batch, q_heads, kv_heads, new, held, head_dim, _, rate = table[table[:, 6] == 1].T
    if not len(batch):
        return
    columns = {
        "batch": batch, "new": new, "past": held - new, "q_heads": q_heads, "kv_heads": kv_heads,
        "head_dim": head_dim, "window": np.zeros_like(batch), "kv_bytes": np.full_like(batch, 2.0),
    }
    seconds = 4.0 * batch * q_heads * new * held * head_dim / 2.0 / (rate * 1e12)
    yield MeasuredKernel(("attention_prefill", "bf16", "any", ""), columns, seconds, ("aiter e404860",))


def read_system(folder: Path, system: str) -> MeasuredSystem:
    """GEMMs, fused experts and prompts' attention of one of :data:`SYSTEMS`' values."""
    result = MeasuredSystem(system, source=SOURCE.format(system=system))
    gemms: list[pd.DataFrame] = []
    experts: list[pd.DataFrame] = []
    for name, lines in _tables(folder, system):
        if {"M", "N", "K"} <= set(lines):
            gemms.append(_gemms(name, lines))
        elif {"token", "model_dim"} <= set(lines):
            experts.append(lines)
    parts = {"gemm": gemms, "grouped_gemm": [_experts(pd.concat(experts), result)] if experts else []}
    for family, found in parts.items():
        if found:
            result.kernels |= {one.key: one for one in _kernels(family, pd.concat(found), result)}
    result.kernels |= {one.key: one for one in _prompts(folder, system)}
    return result
