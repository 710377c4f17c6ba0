"""Measured kernel tables, read and made tidy: one frame per family, times in seconds, bad rows out with a reason.

A directory holds ``SYSTEM/KIND/ENGINE_TABLE.parquet``, the layout in which the public package ``aiconfigurator-core``
(Apache-2.0) ships what was measured on real GPUs. Needs pyarrow (an optional extra).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from tensorcast.cost import work
from tensorcast.errors import InputError

SHAPE = {
    "gemm": ("m", "n", "k"),
    "grouped_gemm": ("tokens", "hidden", "inter", "topk", "experts", "moe_tp", "moe_ep", "distribution", "gated"),
    "attention_prefill": ("batch", "new", "past", "q_heads", "kv_heads", "head_dim", "window", "kv_bytes"),
    "attention_decode": ("batch", "new", "past", "q_heads", "kv_heads", "head_dim", "window", "kv_bytes"),
    "mla_prefill": ("batch", "new", "past", "q_heads", "kv_bytes"),
    "mla_decode": ("batch", "new", "past", "q_heads", "kv_bytes"),
    "quantize": ("m", "k", "read_bytes", "written_bytes"),
    "all_reduce": ("ranks", "payload_bytes"),
    "all_gather": ("ranks", "payload_bytes"),
    "reduce_scatter": ("ranks", "payload_bytes"),
    "all_to_all": ("ranks", "payload_bytes", "copies", "experts"),
}
"""Columns that say how large the work of one row is."""

ID = ["system", "engine", "engine_version", "family", "dtype", "algorithm"]

DTYPE = {
    "bfloat16": "bf16", "half": "bf16", "fp8": "fp8", "fp8_block": "fp8_block", "nvfp4": "nvfp4", "sq": "int8",
    "int8_wo": "w8a16", "int4_wo": "w4a16", "w4a16_mxfp4": "mxfp4", "w4a8_mxfp4_mxfp8": "w4a8", "fp4": "nvfp4",
}
"""Names of the tables in our words; ``sq`` is SmoothQuant W8A8, ``_wo`` weight-only."""

LATENT, ROPE, NOPE, V_DIM = 512, 64, 128, 128
"""Head sizes of the MLA tables (DeepSeek-V3)."""

PRECISION = {
    "bf16": work.Precision(),
    "fp8": work.Precision("fp8", "fp8", 1.0, 1.0),
    "fp8_block": work.Precision("fp8_block", "fp8", 1.0 + 4 / 128**2, 1.0 + 4 / 128),
    "int8": work.Precision("int8", "int8", 1.0, 1.0),
    "nvfp4": work.Precision("nvfp4", "fp4", 0.5 + 1 / 16, 0.5 + 1 / 16),
    "w8a16": work.Precision("w8a16", "bf16", 1.0, 2.0),
    "w4a16": work.Precision("w4a16", "bf16", 0.5 + 2 / 128, 2.0),
    "mxfp4": work.Precision("mxfp4", "bf16", 0.5 + 1 / 32, 2.0),
    "w4a8": work.Precision("w4a8", "fp8", 0.5 + 1 / 32, 1.0 + 1 / 32),
}
"""Bytes per element with scales: 128 x 128 blocks (fp8_block), 16 (nvfp4), 32 (mx), 128 (int4, usual group size)."""

SLOWER = "slower kernel or repeat of the same engine for the same shape"

NON_GATED = [(1024, 2688, 22, 512), (2048, 5120, 22, 512), (8192, 5120, 22, 512), (2688, 1856, 6, 128)]
"""(hidden, inter, top-k, experts) of Nemotron models, whose experts have no gate; one engine's tables say so."""

LOWEST_S = 1e-6
"""No kernel takes less: launch and drain alone take about 2 us on these devices."""


@dataclass
class Tables:
    """Tidy frames per family and, per (system, family, rule), how many rows a rule dropped."""

    frames: dict[str, pd.DataFrame] = field(default_factory=dict)
    dropped: dict[tuple[str, str, str], int] = field(default_factory=dict)

    def family(self, name: str) -> pd.DataFrame:
        """Rows of one family; an empty frame where nothing was measured."""
        empty = pd.DataFrame(columns=[*ID, *SHAPE.get(name, ()), "seconds"])
        return self.frames.get(name, empty)


def row_hash(frame: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """crc32 of the named columns' text, numbers in one notation: the same wherever a row was read from."""
    text = pd.Series("", index=frame.index)
    for name in columns:
        values = frame[name]
        written = {v: v if isinstance(v, str) else f"{float(v):.10g}" for v in values.unique()}
        text = text + "|" + values.map(written)
    codes = {key: zlib.crc32(key.encode()) for key in text.unique()}
    return text.map(codes).to_numpy(np.int64)


def held_out(frame: pd.DataFrame, shape: Sequence[str], share: int = 4) -> np.ndarray:
    """True for one shape in ``share``: by a hash of the shape alone, so the same on every device, dtype and engine."""
    return row_hash(frame, shape) % share == 0


def balanced_rows(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """(rows, hit experts) of the busiest rank under balanced routing: rows go round the experts one by one."""
    local = np.maximum(frame.experts.to_numpy(float) / frame.moe_ep.to_numpy(float), 1.0)
    rows = np.ceil(frame.tokens.to_numpy(float) * frame.topk.to_numpy(float) / frame.moe_ep.to_numpy(float))
    return rows, np.minimum(local, rows)


def works_of(family: str, dtype: str, frame: pd.DataFrame) -> list[work.Work]:
    """The kernels behind one row each: one, or up GEMM, activation and down GEMM for the experts."""
    precision = PRECISION[dtype]
    c = {name: frame[name].to_numpy(float) for name in SHAPE[family] if name != "distribution"}
    if family == "gemm":
        return [work.gemm(c["m"], c["n"], c["k"], precision)]
    if family == "grouped_gemm":
        rows, hit = balanced_rows(frame)
        inter, hidden = c["inter"] / c["moe_tp"], c["hidden"]
        up = work.grouped_gemm(rows, hit, inter * (1.0 + c["gated"]), hidden, precision)
        down = work.grouped_gemm(rows, hit, hidden, inter, precision)
        activation = work.memory(rows * inter * (1.0 + c["gated"]) * 2.0, rows * inter * precision.activation_bytes)
        return [up, activation, down]
    if family.startswith("attention"):
        return [work.attention(
            c["batch"], c["new"], c["past"], c["q_heads"], c["kv_heads"], qk_dim=c["head_dim"], v_dim=c["head_dim"],
            kv_bytes=c["kv_bytes"], window=c["window"], decode=family == "attention_decode", dtype=dtype,
        )]
    if family.startswith("mla"):
        return [work.mla(
            c["batch"], c["new"], c["past"], c["q_heads"], latent=LATENT, rope=ROPE, nope=NOPE, v_dim=V_DIM,
            kv_bytes=c["kv_bytes"], decode=family == "mla_decode", dtype=dtype,
        )]
    return [replace(work.memory(c["read_bytes"], c["written_bytes"]), family="quantize")]


def distinct_ranks(frame: pd.DataFrame) -> np.ndarray:
    """Expected ranks that one token's choices go to: top-k of E experts spread evenly over the ranks."""
    ranks, experts, copies = (frame[c].to_numpy(float) for c in ("ranks", "experts", "copies"))
    miss = np.ones(len(frame))
    for drawn in range(int(copies.max(initial=0))):
        left = np.maximum(experts - drawn, 1.0)
        miss = np.where(drawn < copies, miss * np.maximum(left - experts / ranks, 0.0) / left, miss)
    return ranks * (1.0 - miss)


def wire_bytes(op: str, algorithm: str, frame: pd.DataFrame) -> np.ndarray:
    """Bytes that one rank sends to others, all ranks inside one domain."""
    ranks, payload = frame.ranks.to_numpy(float), frame.payload_bytes.to_numpy(float)
    if algorithm.startswith("high_throughput"):
        payload = payload / frame.copies.to_numpy(float) * distinct_ranks(frame)
    return payload * (ranks - 1) / ranks * (2.0 if op == "all_reduce" else 1.0)


def _gemm(raw: pd.DataFrame) -> pd.DataFrame:
    return raw.assign(dtype=raw.gemm_dtype)


def _moe(raw: pd.DataFrame) -> pd.DataFrame:
    names = {
        "num_tokens": "tokens", "hidden_size": "hidden", "inter_size": "inter", "num_experts": "experts",
        "moe_tp_size": "moe_tp", "moe_ep_size": "moe_ep",
    }
    shape = list(zip(raw.hidden_size, raw.inter_size, raw.topk, raw.num_experts, strict=True))
    gated = ~(raw.kernel_source.str.contains("nongated") | pd.Series(shape, index=raw.index).isin(NON_GATED))
    return raw.rename(columns=names).assign(dtype=raw.moe_dtype, gated=gated.astype(int))


def _attention(raw: pd.DataFrame) -> pd.DataFrame:
    decode = raw.op_name.iloc[0].startswith("generation")
    kv_heads = raw.num_key_value_heads.where(raw.num_key_value_heads > 0, raw.num_heads)
    return raw.assign(
        batch=raw.batch_size, new=raw.isl, past=raw.step, q_heads=raw.num_heads, kv_heads=kv_heads,
        window=raw.window_size if "window_size" in raw else 0, dtype=raw.kv_cache_dtype if decode else raw.attn_dtype,
        kv_bytes=raw.kv_cache_dtype.map({"fp8": 1.0}).fillna(2.0),
    )


def _mla(raw: pd.DataFrame) -> pd.DataFrame:
    return raw.assign(
        batch=raw.batch_size, new=raw.isl, past=raw.step, q_heads=raw.num_heads, dtype=raw.kv_cache_dtype,
        kv_bytes=raw.kv_cache_dtype.map({"fp8": 1.0}).fillna(2.0),
    )


def _quantise(raw: pd.DataFrame) -> pd.DataFrame:
    return raw.assign(dtype="bfloat16", read_bytes=2.0 * raw.m * raw.k, written_bytes=1.0 * raw.m * raw.k)


def _nccl(raw: pd.DataFrame) -> pd.DataFrame:
    """Counts are elements of all ranks together for all-gather and reduce-scatter, else of one rank's buffer."""
    payload = raw.message_size * raw.nccl_dtype.map({"half": 2, "int8": 1})
    family = raw.op_name.replace({"alltoall": "all_to_all"})
    algorithm = np.where(family == "all_to_all", "direct", "ring")
    return raw.assign(
        family=family, dtype="any", engine="any", algorithm=algorithm, ranks=raw.num_gpus, payload_bytes=payload,
        copies=1, experts=0,
    )


def _custom_all_reduce(raw: pd.DataFrame) -> pd.DataFrame:
    graph = ~raw.kernel_source.str.contains("eager")
    return raw[graph].assign(dtype="any", algorithm="custom", ranks=raw.num_gpus, payload_bytes=raw.message_size * 2.0)


def _deepep(raw: pd.DataFrame, kind: str) -> pd.DataFrame:
    """One row per direction: fp8 dispatch with block scales, bf16 combine. One node: 4 GPUs of a GB200, else 8."""
    raw, parts = raw[raw.node_num == 1], []
    ranks = np.where(raw.system.str.startswith("gb"), 4, 8)
    column = "{}_avg_t_us" if kind == "low_latency" else "{}_transmit_us"
    for phase, copy in (("dispatch", raw.hidden_size * (1.0 + 4.0 / 128)), ("combine", raw.hidden_size * 2.0)):
        rows = raw if kind == "low_latency" else raw[raw[f"{phase}_sms"] >= 20]
        parts.append(rows.assign(
            dtype="any", engine="any", algorithm=f"{kind}_{phase}", ranks=ranks[: len(rows)], copies=rows.num_topk,
            experts=rows.num_experts, payload_bytes=rows.num_token * rows.num_topk * copy,
            latency=rows[column.format(phase)] / 1e3,
        ))
    return pd.concat(parts)


Reader = Callable[[pd.DataFrame], pd.DataFrame]
READERS: dict[str, tuple[str, str, Reader]] = {
    # file name after the engine: (folder, family, normaliser); times come out in ms
    "gemm_perf": ("gemm", "gemm", _gemm),
    "moe_perf": ("moe", "grouped_gemm", _moe),
    "context_attention_perf": ("attention", "attention_prefill", _attention),
    "generation_attention_perf": ("attention", "attention_decode", _attention),
    "context_mla_perf": ("mla", "mla_prefill", _mla),
    "generation_mla_perf": ("mla", "mla_decode", _mla),
    "scale_matrix_perf": ("quantize", "quantize", _quantise),
    "nccl_perf": ("comm", "collective", _nccl),
    "custom_allreduce_perf": ("comm", "all_reduce", _custom_all_reduce),
    "wideep_deepep_ll_perf": ("comm", "all_to_all", lambda raw: _deepep(raw, "low_latency")),
    "wideep_deepep_normal_perf": ("comm", "all_to_all", lambda raw: _deepep(raw, "high_throughput")),
}


def _rules(family: str, frame: pd.DataFrame) -> list[tuple[str, pd.Series]]:
    """(reason, rows it drops), applied in turn."""
    rules = [("no time or under 1 us", ~(frame.seconds > LOWEST_S))]
    if family == "gemm":
        rules.append((
            "vllm fp8_block timed without graph capture (host-bound floor of 60-400 us)",
            (frame.engine == "vllm") & (frame.dtype == "fp8_block"),
        ))
    if family == "grouped_gemm":
        rules.append((
            "grouped top-k ties send most choices to rank 0 (sglang, vllm; 256 experts, top-8, EP > 1)",
            frame.engine.isin(["sglang", "vllm"]) & (frame.experts == 256) & (frame.topk == 8) & (frame.moe_ep > 1),
        ))
        rules.append((
            "sglang passes over the choices of other ranks too (EP > 1 without an exchange)",
            (frame.engine == "sglang") & (frame.moe_ep > 1),
        ))
        rules.append((
            "trtllm's min-latency kernel, another backend than the default one in the same table",
            frame.kernel_source.str.contains("min_latency"),
        ))
        rules.append(("skewed routing: not used for kernel constants", frame.distribution != "balanced"))
    if family == "all_to_all":
        rules.append((
            "low-latency exchange with under 32 experts (few warps drive the link: a tenth of its speed)",
            frame.algorithm.str.startswith("low_latency") & (frame.experts < 32),
        ))
    return rules


def _read(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except ImportError as error:
        raise InputError("reading measured tables needs pyarrow: pip install 'tensorcast[calibrate]'") from error


def _repeats(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """One row per shape: the fastest of the kernels that an engine offers for it."""
    return frame.sort_values("seconds", kind="stable").drop_duplicates(keys, keep="first")


def read_tables(
    folder: Path, systems: tuple[str, ...] | None = None, families: tuple[str, ...] | None = None
) -> Tables:
    """Read every known table below ``folder`` (``SYSTEM/KIND/ENGINE_TABLE.parquet``)."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no folder of measured tables at {folder}")
    parts: dict[str, list[pd.DataFrame]] = {}
    tables = Tables()
    for path in sorted(folder.glob("*/*/*.parquet")):
        system, table = path.parts[-3], path.stem.partition("_")[2]
        kind, family, normalise = READERS.get(table, ("", "", _gemm))
        if kind != path.parts[-2] or (systems and system not in systems):
            continue
        if families and family not in families and not (family == "collective" and set(families) & set(SHAPE)):
            continue
        raw = _read(path)
        frame = normalise(raw.assign(system=system, family=family, algorithm=""))
        frame = frame.assign(dtype=frame.dtype.map(DTYPE).fillna(frame.dtype), seconds=frame.latency / 1e3)
        for name, rows in frame.groupby("family"):
            for reason, bad in _rules(str(name), rows):
                bad = bad.reindex(rows.index)
                if bad.any():
                    key = (system, str(name), reason)
                    tables.dropped[key] = tables.dropped.get(key, 0) + int(bad.sum())
                    rows = rows[~bad]
            parts.setdefault(str(name), []).append(rows[[*ID, *SHAPE[str(name)], "seconds"]])
    if not parts:
        raise InputError(f"no measured tables below {folder}: expected SYSTEM/gemm/ENGINE_gemm_perf.parquet and so on")
    for name, frames in parts.items():
        whole = pd.concat(frames, ignore_index=True)
        keys = [*ID, *SHAPE[name]]
        tables.frames[name] = _repeats(whole, keys).reset_index(drop=True)
        fewer = whole.system.value_counts() - tables.frames[name].system.value_counts()
        for slow_system, count in fewer.items():
            if count > 0:
                tables.dropped[str(slow_system), name, SLOWER] = int(count)
    return tables
