"""Frames of kernel shapes, in the measured tables' words or ours, put into one vocabulary: family, dtype, sizes.

A frame has a column ``family`` (or ``op_family``, ``op``, ``table``) and the shape columns of its rows' families; other
columns are ignored. Sizes are in elements, tokens or ranks as the tables count them, ``payload_bytes`` in bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from tensorcast.cost.kernels.expert_load import skew_of
from tensorcast.cost.kernels.vocabulary import (
    ALIASES,
    COPY_BYTES,
    DTYPE,
    LATENT,
    NON_GATED,
    NOPE,
    SIZES,
    V_DIM,
    Columns,
    source_of,
)
from tensorcast.errors import InputError, unknown_name

FAMILY_COLUMNS = ("family", "op_family", "op", "table")


@dataclass(frozen=True)
class Calls:
    """Rows of one kernel: family, dtype, and a variant (a kernel of the same engine that is told apart).

    ``rows`` are positions in the frame; ``phases`` how many kernels one row stands for (dispatch and combine: 2).
    """

    family: str
    dtype: str
    variant: str
    rows: np.ndarray
    columns: Columns


def _numbers(raw: pd.DataFrame, family: str, *names: str, default: float | None = None) -> np.ndarray:
    """The first of the named columns that is there, as floats; its gaps filled with ``default``."""
    for name in names:
        if name in raw.columns:
            try:
                values = pd.to_numeric(raw[name]).to_numpy(float)
            except (ValueError, TypeError) as error:
                raise InputError(f"{family}: column {name!r} must hold numbers: {error}") from None
            missing = np.isnan(values)
            if not missing.any():
                return values
            if default is not None:
                return np.where(missing, default, values)
    if default is None:
        raise InputError(f"{family}: column {names[0]!r} is missing or empty")
    return np.full(len(raw), default)


def _texts(raw: pd.DataFrame, *names: str, default: str = "") -> pd.Series:
    for name in names:
        if name in raw.columns and raw[name].notna().any():
            return raw[name].astype(str)
    return pd.Series(default, index=raw.index)


def _dtypes(raw: pd.DataFrame, *names: str) -> pd.Series:
    said = _texts(raw, *names, "dtype", default="bf16").str.removeprefix("torch.")
    return said.replace(DTYPE)


Read = tuple[Columns, pd.Series, pd.Series]
"""Sizes, dtype and variant of every row."""


def _gemm(raw: pd.DataFrame, name: str) -> Read:
    if name in ("gemm", "bmm"):
        sizes = {c: _numbers(raw, name, c) for c in ("m", "n", "k")}
        return {**sizes, "batch": _numbers(raw, name, "batch", default=1.0)}, _dtypes(raw, "gemm_dtype"), _plain(raw)
    after = _texts(raw, "op_name", "mla_op", default=name).str.contains("post").to_numpy()
    sizes = {
        "m": _numbers(raw, name, "num_tokens", "m"), "n": np.where(after, V_DIM, LATENT).astype(float),
        "k": np.where(after, LATENT, NOPE).astype(float), "batch": _numbers(raw, name, "num_heads", "batch"),
    }
    return sizes, _dtypes(raw, "bmm_dtype"), pd.Series("absorb", index=raw.index)


def _plain(raw: pd.DataFrame) -> pd.Series:
    return pd.Series("", index=raw.index)


def _experts(raw: pd.DataFrame, name: str) -> Read:
    sizes = {
        "tokens": _numbers(raw, name, "num_tokens", "tokens"), "hidden": _numbers(raw, name, "hidden_size", "hidden"),
        "inter": _numbers(raw, name, "inter_size", "inter"), "topk": _numbers(raw, name, "topk", "top_k"),
        "experts": _numbers(raw, name, "num_experts", "experts"),
        "moe_tp": _numbers(raw, name, "moe_tp_size", "moe_tp", default=1.0),
        "moe_ep": _numbers(raw, name, "moe_ep_size", "moe_ep", default=1.0),
    }
    sizes["slots"] = np.maximum(_numbers(raw, name, "num_slots", "slots", default=0.0), sizes["experts"])
    source = _texts(raw, "kernel_source")
    if "gated" in raw.columns:
        gated = _numbers(raw, name, "gated")
    else:
        gated = 1.0 - source.str.contains("nongated").to_numpy(float)
        for model in NON_GATED:
            known = np.ones(len(raw), dtype=bool)
            for column, value in zip(("hidden", "inter", "topk", "experts"), model, strict=True):
                known &= sizes[column] == value
            gated[known] = 0.0
    sizes["gated"] = gated
    if "skew" in raw.columns:
        sizes["skew"] = _numbers(raw, name, "skew")
    else:
        codes, names = pd.factorize(_texts(raw, "distribution", default="balanced"))
        sizes["skew"] = np.array([skew_of(str(text)) for text in names])[codes]
    variant = {"wideep_context_moe": "contiguous", "moe_context": "contiguous", "wideep_generation_moe": "masked",
               "moe_generation": "masked", "wideep_moe": "wide", "wideep_moe_eplb": "wide"}.get(name, "")
    variants = pd.Series(variant, index=raw.index)
    if "kernel_source" in raw.columns:
        codes, names = pd.factorize(source)
        sizes["source"] = np.array([source_of(str(text)) for text in names])[codes]
    return sizes, _dtypes(raw, "moe_dtype"), variants


def _kv_bytes(raw: pd.DataFrame, name: str) -> np.ndarray:
    if "kv_bytes" in raw.columns:
        return _numbers(raw, name, "kv_bytes", default=2.0)
    return np.where(_texts(raw, "kv_cache_dtype", "dtype", default="bf16").str.startswith("fp8"), 1.0, 2.0)


def _sequences(raw: pd.DataFrame, name: str) -> Columns:
    decode = ALIASES.get(name, name).startswith(("attention_decode", "mla_decode"))
    new = np.ones(len(raw)) if decode else _numbers(raw, name, "isl", "new")
    past = _numbers(raw, name, "step", "past", default=0.0)
    if decode and "isl" in raw.columns:  # some tables count the context in isl, others in step
        past = past + np.maximum(_numbers(raw, name, "isl", default=1.0), 1.0) - 1.0
    return {
        "batch": _numbers(raw, name, "batch_size", "batch"), "new": new, "past": past,
        "q_heads": _numbers(raw, name, "num_heads", "q_heads"), "kv_bytes": _kv_bytes(raw, name),
    }


def _attention(raw: pd.DataFrame, name: str) -> Read:
    sizes = _sequences(raw, name)
    kv_heads = _numbers(raw, name, "num_key_value_heads", "kv_heads", default=0.0)
    sizes["kv_heads"] = np.where(kv_heads > 0, kv_heads, sizes["q_heads"])
    sizes["head_dim"] = _numbers(raw, name, "head_dim", default=128.0)
    sizes["window"] = _numbers(raw, name, "window_size", "window", default=0.0)
    if ALIASES.get(name, name) == "attention_decode":  # decode kernels are chosen by what the cache holds
        return sizes, pd.Series(np.where(sizes["kv_bytes"] < 1.5, "fp8", "bf16"), index=raw.index), _plain(raw)
    return sizes, _dtypes(raw, "attn_dtype"), _plain(raw)


def _mla(raw: pd.DataFrame, name: str) -> Read:
    sizes = _sequences(raw, name)
    return sizes, pd.Series(np.where(sizes["kv_bytes"] < 1.5, "fp8", "bf16"), index=raw.index), _plain(raw)


def _mla_module(raw: pd.DataFrame, name: str) -> Read:
    sizes, cache, _ = _mla(raw, name)
    variant = "fp8_kv" if name.startswith("wideep") else ""
    kernel = _texts(raw, "kernel_source", default="").where(lambda s: s.isin(["fa3", "flashinfer"]), variant)
    return sizes, _dtypes(raw, "gemm_type", "mla_dtype"), kernel.where(cache == "bf16", kernel.replace("", "fp8_kv"))


def _linear(raw: pd.DataFrame, name: str) -> Read:
    """States as wide as the engine keeps them for the models of the tables (Qwen3.5, whose file says float32):
    TensorRT-LLM in bf16, without which its decode would be faster than the memory."""
    engine = _texts(raw, "framework").str.lower()
    sizes = {
        "batch": _numbers(raw, name, "batch_size", "batch"), "new": _numbers(raw, name, "seq_len", "new", default=1.0),
        "heads": _numbers(raw, name, "num_v_heads", "heads"),
        "key_heads": _numbers(raw, name, "num_k_heads", "key_heads"),
        "head_dim": _numbers(raw, name, "head_k_dim", "head_dim"),
    }
    if "state_bytes" in raw.columns:
        sizes["state_bytes"] = _numbers(raw, name, "state_bytes")
    else:
        sizes["state_bytes"] = np.where(engine.to_numpy() == "trtllm", 2.0, 4.0)
    return sizes, pd.Series("bf16", index=raw.index), _plain(raw)


def _convolution(raw: pd.DataFrame, name: str) -> Read:
    """Over queries, keys and values of linear attention, or over what a state-space layer scans."""
    if "channels" in raw.columns:
        channels = _numbers(raw, name, "channels")
    elif "num_v_heads" in raw.columns:
        keys = _numbers(raw, name, "num_k_heads") * _numbers(raw, name, "head_k_dim")
        channels = 2.0 * keys + _numbers(raw, name, "num_v_heads") * _numbers(raw, name, "head_v_dim")
    else:
        groups = _numbers(raw, name, "n_groups") * _numbers(raw, name, "d_state")
        channels = _numbers(raw, name, "nheads") * _numbers(raw, name, "head_dim") + 2.0 * groups
    sizes = {
        "batch": _numbers(raw, name, "batch_size", "batch"), "new": _numbers(raw, name, "seq_len", "new", default=1.0),
        "channels": channels, "width": _numbers(raw, name, "d_conv", "width"),
    }
    return sizes, pd.Series("bf16", index=raw.index), _plain(raw)


def _quantise(raw: pd.DataFrame, name: str) -> Read:
    sizes = {"m": _numbers(raw, name, "m"), "k": _numbers(raw, name, "k")}
    return sizes, pd.Series("bf16", index=raw.index), _plain(raw)


def _collective(raw: pd.DataFrame, name: str) -> Read:
    """``message_size`` counts elements: of all ranks together for gather and scatter, else of one rank's buffer."""
    if "payload_bytes" in raw.columns:
        payload = _numbers(raw, name, "payload_bytes")
    else:
        kind = _texts(raw, "nccl_dtype", "allreduce_dtype", "dtype", default="half")
        payload = _numbers(raw, name, "message_size") * np.where(kind == "int8", 1.0, 2.0)
    sizes = {"ranks": _numbers(raw, name, "num_gpus", "ranks"), "payload_bytes": payload}
    source = _texts(raw, "kernel_source", "algorithm", default="custom" if name == "custom_allreduce" else "nccl")
    variant = np.where(source.str.lower().isin(["nccl", "oneccl", "ring", "direct"]), "nccl", "custom")
    variant = np.where(source.str.contains("eager"), "eager", variant)
    return sizes, pd.Series("any", index=raw.index), pd.Series(variant, index=raw.index)


def _exchange(raw: pd.DataFrame, name: str) -> Read:
    """Dispatch and combine of a MoE layer; ``variant`` is ``BACKEND:PHASE``, the phase ``both`` where none is said."""
    gpus = np.where(_texts(raw, "system", "device").str.lower().str.contains("gb"), 4.0, 8.0)
    nodes = _numbers(raw, name, "node_num", "nodes", default=1.0)
    ranks = _numbers(raw, name, "ep_size", "moe_ep_size", "ranks", default=0.0)
    backend = {"deepep_ll": "low_latency", "wideep_deepep_ll": "low_latency", "deepep_normal": "high_throughput",
               "wideep_deepep_normal": "high_throughput"}.get(name, "")
    backends = _texts(raw, "comm_backend", "algorithm", default=backend)
    if name == "trtllm_alltoall":
        backends = _texts(raw, "kernel_source", default="NVLinkTwoSided")
    phase = _texts(raw, "phase", default="both")
    if name == "trtllm_alltoall":
        phase = _texts(raw, "op_name", default="both").str.removeprefix("alltoall_")
    dtype = _dtypes(raw, "comm_dtype", "moe_dtype")
    if "copy_bytes" in raw.columns:
        copy = _numbers(raw, name, "copy_bytes")
    else:
        default = np.where((phase == "combine") | (backend == "") , 2.0, COPY_BYTES["fp8"])
        sent = dtype.map(COPY_BYTES).to_numpy(float) if backend == "" else default
        copy = np.where(np.isnan(sent), 2.0, sent)
    sizes = {
        "tokens": _numbers(raw, name, "num_token", "num_tokens", "tokens"),
        "hidden": _numbers(raw, name, "hidden_size", "hidden"), "topk": _numbers(raw, name, "num_topk", "topk"),
        "experts": _numbers(raw, name, "num_experts", "experts"), "nodes": nodes,
        "ranks": np.where(ranks > 0, ranks, gpus * nodes), "copy_bytes": copy,
        "sms": _numbers(raw, name, "dispatch_sms", "sms", default=20.0),
    }
    return sizes, pd.Series("any", index=raw.index), backends + ":" + phase


READERS: dict[str, Callable[[pd.DataFrame, str], Read]] = {
    "gemm": _gemm, "grouped_gemm": _experts, "attention_prefill": _attention, "attention_decode": _attention,
    "mla_prefill": _mla, "mla_decode": _mla, "mla_prefill_module": _mla_module, "mla_decode_module": _mla_module,
    "linear_prefill": _linear, "linear_decode": _linear, "conv_prefill": _convolution, "conv_decode": _convolution,
    "quantize": _quantise, "all_reduce": _collective, "all_gather": _collective, "reduce_scatter": _collective,
    "all_to_all": _collective, "moe_exchange": _exchange,
}


def _family_names(frame: pd.DataFrame) -> pd.Series:
    for column in FAMILY_COLUMNS:
        if column in frame.columns:
            names = frame[column].astype(str).str.lower().str.removesuffix("_perf")
            if "op_name" in frame.columns:  # nccl, oneccl: the collective stands in op_name
                names = names.mask(names.isin(["nccl", "oneccl"]), frame["op_name"].astype(str))
            return names
    raise InputError(f"the frame needs a column 'family': one of {', '.join(SIZES)}, or a table's name")


def calls_of(frame: pd.DataFrame) -> Iterator[Calls]:
    """The frame's rows by kernel. Raises :class:`InputError` for an unknown family or a missing column."""
    frame = frame.reset_index(drop=True)
    names = _family_names(frame)
    for name, rows in names.groupby(names, sort=True).indices.items():
        family = ALIASES.get(str(name), str(name))
        if family not in READERS:
            raise unknown_name("op family", str(name), sorted({*SIZES, *ALIASES}))
        part = frame if len(rows) == len(frame) else frame.iloc[rows]
        columns, dtypes, variants = READERS[family](part, str(name))
        if "variant" in part.columns:
            variants = part["variant"].fillna("").astype(str)
        kinds = dtypes.to_numpy(object) + ("|" + variants.to_numpy(object))
        codes, uniques = pd.factorize(kinds)
        for code, kind in enumerate(uniques):
            dtype, _, variant = str(kind).partition("|")
            at = np.flatnonzero(codes == code) if len(uniques) > 1 else slice(None)
            yield Calls(family, dtype, variant, np.asarray(rows)[at], {c: v[at] for c, v in columns.items()})
