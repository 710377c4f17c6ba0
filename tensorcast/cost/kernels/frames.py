"""A frame of kernel shapes: what each row takes, and what none may say (sizes that no kernel has, unknown names)."""

from __future__ import annotations

import numpy as np
import pandas as pd

from tensorcast.cost.evidence import LEVELS
from tensorcast.cost.kernels.predictor import predictor_for
from tensorcast.cost.kernels.shape_tables import Calls, calls_of
from tensorcast.cost.kernels.vocabulary import PRECISION, SIZES
from tensorcast.errors import InputError, unknown_name
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.store import list_engines, load_device, load_engine

FROM_ZERO = ("past", "window", "gated", "sms")
"""Sizes that may be zero; ``skew`` (-1: uniform) may be any number from -1 on."""

AT_MOST = (("topk", "experts"), ("moe_ep", "experts"), ("kv_heads", "q_heads"))
"""(size, the size that it cannot exceed)."""

SAID_AS = {
    "tokens": ("num_tokens", "num_token"), "hidden": ("hidden_size",), "inter": ("inter_size",),
    "topk": ("num_topk", "top_k"), "experts": ("num_experts",), "slots": ("num_slots",), "moe_tp": ("moe_tp_size",),
    "moe_ep": ("moe_ep_size",), "batch": ("batch_size",), "new": ("isl",), "past": ("step",),
    "q_heads": ("num_heads",), "kv_heads": ("num_key_value_heads",), "window": ("window_size",),
    "ranks": ("num_gpus", "ep_size"), "payload_bytes": ("message_size",), "nodes": ("node_num",),
    "sms": ("dispatch_sms",), "skew": ("distribution",),
    "dtype": ("gemm_dtype", "bmm_dtype", "moe_dtype", "attn_dtype", "mla_dtype", "gemm_type", "kv_cache_dtype"),
}
"""The tables' columns for a size of ours."""


def predict_kernels(frame: pd.DataFrame, *, device: str | DeviceProfile, engine: str | None = None) -> pd.DataFrame:
    """Seconds of every row's kernel, with an 80 % interval and evidence.

    ``frame``: a column ``family`` (one of :data:`SIZES`, or a measured table's name such as ``moe``) and the shape
    columns of its rows' families, in the measured tables' words (``num_tokens``, ``moe_ep_size``, ...) or ours. A
    column ``engine`` names the engine row by row where ``engine`` is not given. Returns the frame with ``seconds, low,
    high, evidence`` (``measured``: on or between measured points; ``calibrated``: a fitted model carries them further;
    ``datasheet``: nothing was measured). Raises :class:`InputError` for an unknown family, dtype or engine, a missing
    column, and sizes that no kernel has.

    ``measured`` seconds follow the measurements, also where a larger call was the faster one. The others never fall as
    a size of :data:`~tensorcast.cost.kernels.lattice.SIDES` grows, but where a head size or window is one that was
    measured, or where another engine's measurements stand in. None is under what peaks and links allow.
    """
    profile = load_device(device) if isinstance(device, str) else device
    size = len(frame)
    seconds, low, high, level = np.zeros(size), np.zeros(size), np.zeros(size), np.zeros(size, dtype=int)
    if engine is None and "engine" in frame.columns:
        said = frame["engine"].astype(object).fillna("any").astype(str).reset_index(drop=True)
        parts = said.groupby(said).indices
    else:
        parts = {engine or "any": np.arange(size)}
    for name, rows in parts.items():
        predictor = predictor_for(profile, engine_name(str(name)))
        part = frame if len(rows) == size else frame.iloc[rows]
        for calls in calls_of(part):
            check_calls(calls, part)
            at = rows[calls.rows]
            found = predictor.price(calls.family, calls.dtype, calls.variant, calls.columns)
            seconds[at], low[at], high[at], level[at] = found.seconds, found.low, found.high, found.level
    return frame.assign(seconds=seconds, low=low, high=high, evidence=np.array(LEVELS, dtype=object)[level])


def check_calls(calls: Calls, frame: pd.DataFrame) -> None:
    """Raises :class:`InputError`, naming column, row (by its index) and value, for the first call that no kernel can
    be. ``frame``: what ``calls.rows`` count in."""
    known = ("any",) if calls.dtype == "any" else tuple(PRECISION)
    if len(calls.rows) and calls.dtype not in known:
        column = _column(frame, "dtype")
        raise InputError(
            f"{calls.family}: {column} {calls.dtype!r} in row {frame.index[calls.rows[0]]}: "
            f"must be one of {', '.join(PRECISION)}"
        )
    for name in SIZES[calls.family]:
        values = calls.columns[name]
        least, strict = {"skew": (-1.0, False)}.get(name, (0.0, name not in FROM_ZERO))
        fine = np.isfinite(values) & ((values > least) if strict else (values >= least))
        _refuse(calls, frame, name, fine, f"must be {'above' if strict else 'at least'} {least:g} and finite")
    for name, limit in AT_MOST:
        if name in calls.columns and limit in calls.columns:
            fine = calls.columns[name] <= calls.columns[limit]
            most = calls.columns[limit]
            at = int(np.argmin(fine)) if len(fine) else 0
            _refuse(calls, frame, name, fine, f"more than its {limit}, {most[at]:g}" if len(fine) else "")


def _refuse(calls: Calls, frame: pd.DataFrame, name: str, fine: np.ndarray, why: str) -> None:
    if not fine.all():
        at = int(np.argmin(fine))
        value, row = calls.columns[name][at], frame.index[calls.rows[at]]
        raise InputError(f"{calls.family}: {_column(frame, name)} {value:g} in row {row}: {why}")


def _column(frame: pd.DataFrame, name: str) -> str:
    """What the frame calls it."""
    return next((column for column in SAID_AS.get(name, ()) if column in frame.columns), name)


def engine_name(said: str) -> str:
    """The engine's own name for a name or alias; ``any`` and the empty one are any. Raises :class:`InputError`."""
    name = said.strip().lower()
    if name in ("", "any", "nan", "none"):
        return "any"
    if name in list_engines():
        return name
    try:
        return load_engine(name).name
    except InputError:
        raise unknown_name("engine", said, ("any", *list_engines())) from None
