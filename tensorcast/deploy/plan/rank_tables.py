"""Op tables of a rank, made once in a process: traced, shared experts placed, quantised, fused.

Layouts of one tensor-parallel size and most options share a table, so a search reads and fuses each of them once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from tensorcast.deploy.layout import Layout
from tensorcast.deploy.options import EXCHANGES, Options
from tensorcast.deploy.plan.moe_blocks import Whole, with_whole_shared
from tensorcast.modeling.quantization import Quantization
from tensorcast.profiles.model import ModelProfile
from tensorcast.trace.cache import traced
from tensorcast.trace.fuse import fuse
from tensorcast.trace.precision import by_precision
from tensorcast.trace.quantize import apply_quantization
from tensorcast.trace.table import OpTable

LARGEST = 512
"""Tables kept; the oldest is dropped first."""

_made: dict[Hashable, tuple[Any, OpTable]] = {}


def _once(source: Any, key: tuple[Hashable, ...], make: Callable[[], OpTable]) -> OpTable:
    """``make()``, remembered for this very ``source`` object (kept alive, so that its id stays its own)."""
    full = (id(source), *key)
    if full not in _made:
        if len(_made) >= LARGEST:
            _made.pop(next(iter(_made)))
        _made[full] = (source, make())
    return _made[full][1]


def traced_table(model: ModelProfile, phase: str, tp: int = 1) -> OpTable:
    """:func:`tensorcast.trace.cache.traced`, read once in a process."""
    return _once(model, ("traced", phase, tp), lambda: traced(model, phase, tp))


def shared_form(options: Options, layout: Layout, all2all: str) -> Whole | None:
    """How shared experts run where they are not cut over tp; None where they are."""
    if options.external_shared_experts:
        return Whole(layout.dp / options.external_shared_experts, resident=False)
    if options.shared_expert_tp or layout.tp == 1:
        return None
    return Whole(1.0 / layout.tp if all2all in EXCHANGES else 1.0)


def rank_tables(
    model: ModelProfile,
    phase: str,
    tp: int,
    quantization: Quantization,
    *,
    fusions: tuple[str, ...],
    apart: tuple[tuple[str, ...], ...],
    shared: Whole | None,
) -> tuple[OpTable, OpTable]:
    """A rank's table as it holds weights and cache, and as it runs. ``shared``: shared experts not cut over tp."""
    traced_raw = traced_table(model, phase, tp)
    raw = _once(traced_raw, ("precision", quantization), lambda: by_precision(traced_raw, quantization))
    if shared is not None:
        narrow, whole = raw, shared
        raw = _once(narrow, ("shared", whole), lambda: with_whole_shared(narrow, whole))
    held = raw
    key = ("runs", quantization, fusions, apart)
    return held, _once(held, key, lambda: fuse(apply_quantization(held, quantization), fusions, apart))
