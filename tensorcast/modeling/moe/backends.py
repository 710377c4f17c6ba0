"""Which kernels run a MoE layer's experts: names, what each phase picks, and overrides per phase and sub-config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from tensorcast.errors import InputError

Phase = Literal["prefill", "decode"]

BACKENDS = ("eager", "batched_mm", "grouped_mm", "contiguous", "masked")
"""Loop over hit experts; one GEMM per row on a copy of its expert's weights; one grouped GEMM; a grouped GEMM whose
segments start at a tile; a batched GEMM at fixed capacity per expert. The first three are transformers' own names, the
last two the layouts of serving kernels (github.com/deepseek-ai/DeepGEMM)."""

_OWN: dict[str, Callable[..., Any]] = {}


def register_backend(name: str, run: Callable[..., Any]) -> None:
    """A backend of one's own, by name, for layers that run (prices are those of the backends above).

    ``run(rows [R,H], counts [E], *, up, activation, down, dtype, capacity) -> [R,H]`` as
    :func:`tensorcast.modeling.moe.kernels.run_experts` is called; every block rewritten from then on is held against
    its stock one with this backend, too. Raises :class:`InputError` for a name that is taken or no identifier.
    """
    if name == "auto" or name in all_backends():
        raise InputError(f"experts backend {name!r} is there already")
    if not name.isidentifier():
        raise InputError(f"experts backend {name!r}: must be an identifier, such as my_kernels")
    _OWN[name] = run


def all_backends() -> tuple[str, ...]:
    """Names of every backend that runs, registered ones last."""
    return (*BACKENDS, *_OWN)


def own_backend(name: str) -> Callable[..., Any] | None:
    """What was registered under this name."""
    return _OWN.get(name)


SERVING: dict[str, str] = {"prefill": "contiguous", "decode": "masked"}
"""What ``auto`` means in a serving pipeline: throughput layout in prefill, graph-capturable layout in decode."""

Wanted = str | Mapping[str, "str | Mapping[str, str]"]
"""A backend, or backends by phase or sub-config, a sub-config's again by phase; the empty key stands for all others."""


def choose_backend(
    wanted: Wanted, phase: Phase, *, part: str = "", device: str = "cuda", auto: Mapping[str, str] = SERVING
) -> str:
    """The backend of one phase and sub-config (``part``, such as ``text_config``; empty: the whole model).

    ``wanted`` may be text: ``masked`` or ``text_config=grouped_mm,decode=masked``. ``auto`` says what "auto" means per
    phase; where it is silent, "auto" is returned. As in transformers' ``generate``, ``grouped_mm`` decodes as
    ``batched_mm``, except on the CPU or where it is named for decode. Raises :class:`InputError` on an unknown name or
    key.
    """
    named = _parse(wanted) if isinstance(wanted, str) else dict(wanted)
    for key, value in named.items():
        by_phase = {"": value} if isinstance(value, str) else value
        for inner, name in by_phase.items():
            _check(name)
            _check_key(inner)
        if not key.endswith("_config"):
            _check_key(key)
    found = named.get(part) if part else None
    for_this_phase = found is None and phase in named
    if found is None:
        found = named.get(phase, named.get("", "auto"))
    if not isinstance(found, str):
        for_this_phase = phase in found
        found = found.get(phase, found.get("", "auto"))
    if found == "auto":
        return auto.get(phase, "auto")
    switched = (found, phase) == ("grouped_mm", "decode") and device != "cpu" and not for_this_phase
    return "batched_mm" if switched else found


def _parse(text: str) -> dict[str, str | Mapping[str, str]]:
    """``masked`` -> all of the model; ``decode=masked,text_config=eager`` -> by key."""
    pairs = (item.rpartition("=") for item in text.split(","))
    return {key.strip(): value.strip() for key, _, value in pairs}


def _check(name: str) -> None:
    if name != "auto" and name not in BACKENDS and name not in _OWN:
        raise InputError(f"unknown experts backend {name!r}: choose one of auto, {', '.join(all_backends())}")


def _check_key(key: str) -> None:
    if key not in ("", "prefill", "decode"):
        raise InputError(f"experts backend of {key!r}: choose prefill, decode or a sub-config such as text_config")
