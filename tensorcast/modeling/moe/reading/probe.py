"""A module's small twin with random weights, and how far two functions of it are apart.

A rewritten block is held against the block itself before it takes its place. On meta there is no data, and full widths
are slow; but what a block computes does not hang on how wide it is. So the same modules are copied with every large
width replaced by a small one, wherever it occurs, and filled with random numbers in fp32.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

LARGEST = 64
"""Widths up to this stay."""
ROWS = 12
"""Random rows that two functions are compared on; the second half is much larger, for limits and clamps to bite."""
LARGE = 16.0
BOUND = 1e-5
"""Largest difference, relative to the largest value, that rounding in fp32 explains."""


WHOLE = 1 << 26
"""Numbers up to which a module is copied at its own widths, where its code does not run at small ones."""


def twins_of(module: nn.Module) -> Iterator[Any]:
    """Twins to try a module's own code on: at small widths, then at its own, which some code states as numbers."""
    yield small_twin(module)
    if sum(p.numel() for p in module.parameters()) <= WHOLE:
        yield small_twin(module, narrow=False)


def small_twin(module: nn.Module, seed: int = 0, *, narrow: bool = True) -> Any:
    """A copy of ``module`` on the CPU, in fp32, with small widths (if ``narrow``) and random weights. The module is
    left as it is."""
    generator = torch.Generator().manual_seed(seed)
    held = {id(t): t for part in module.modules() for t in (*part._parameters.values(), *part._buffers.values())
            if t is not None}  # fmt: skip
    small = _small_widths(module, list(held.values())) if narrow else {}
    experts = max((t.shape[0] for t in held.values() if t.dim() == 3), default=2)
    memo: dict[int, Any] = {
        key: _filled(tensor, [small.get(n, n) for n in tensor.shape], experts, generator)
        for key, tensor in held.items()
    }
    twin = copy.deepcopy(module, memo)
    for part in twin.modules():
        vars(part).pop("forward", None)  # the class's own, not what tracing put over it
        for owner in (part, vars(part).get("config")):
            _narrow_attributes(owner, small)
        config = vars(part).get("config")
        if config is not None and hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"
    return twin.eval()


def _filled(tensor: Tensor, shape: list[int], experts: int, generator: torch.Generator) -> Tensor:
    """Random values of the kind that ``tensor`` holds; a buffer that has data and keeps its shape keeps them."""
    is_parameter = isinstance(tensor, nn.Parameter)
    if not is_parameter and not tensor.is_meta and list(tensor.shape) == shape:
        return tensor.detach().cpu().float() if tensor.is_floating_point() else tensor.detach().cpu().clone()
    if not tensor.is_floating_point():  # a table of expert ids: each row's are distinct
        ids = torch.rand((*shape[:-1], experts), generator=generator).argsort(-1)
        return ids[..., : shape[-1]].to(tensor.dtype) if shape and shape[-1] <= experts else torch.zeros(shape)
    if len(shape) < 2:
        values = torch.rand(shape, generator=generator) * 0.5 + 0.25
    else:
        values = torch.randn(shape, generator=generator) * (2.0 / max(shape[-1], 1) ** 0.5)
    return nn.Parameter(values, requires_grad=False) if is_parameter else values


def _integers(module: nn.Module) -> Iterator[tuple[str, int]]:
    for part in module.modules():
        for name, value in vars(part).items():
            if isinstance(value, int) and not isinstance(value, bool):
                yield name, value


def _small_widths(module: nn.Module, tensors: list[Tensor]) -> dict[int, int]:
    """Large width -> small one. Numbers of experts stay; twice a width stays twice it, and so for E times it."""
    lists = {len(part) for part in module.modules() if isinstance(part, nn.ModuleList)}
    integers = list(_integers(module))
    kept = {t.shape[0] for t in tensors if t.dim() == 3} | lists | {n for name, n in integers if "expert" in name}
    sizes = {n for t in tensors for n in t.shape}
    folded = [] if any(t.dim() == 3 for t in tensors) else sizes  # [E*a, b] in the place of [E, a, b]
    inner = {n // e for n in folded for e in kept if e > 1 and n % e == 0 and n // e in {v for _, v in integers}}
    large = sorted(n for n in sizes | inner if n > LARGEST and n not in kept)
    # twice the number of experts, which only first dimensions have, is a width like any other
    halves = inner | (sizes - kept) | {n for t in tensors for n in t.shape[1:]}
    free = (n for n in range(40, 10_000, 8) if n not in sizes)
    small: dict[int, int] = {}
    for n in large:
        of_experts = next((e for e in kept if e > 1 and n % e == 0 and n // e in inner), None)
        if n % 2 == 0 and n // 2 in halves:
            small[n] = 2 * small.get(n // 2, n // 2)
        elif of_experts is not None:
            small[n] = of_experts * small.get(n // of_experts, n // of_experts)
        else:
            small[n] = next(free)
    return small


def _narrow_attributes(owner: Any, small: dict[int, int]) -> None:
    for name, value in list(getattr(owner, "__dict__", {}).items()):
        if isinstance(value, int) and not isinstance(value, bool) and value in small:
            new: Any = small[value]
        elif isinstance(value, tuple) and value and all(type(n) is int for n in value):
            new = tuple(small.get(n, n) for n in value)
        else:
            continue
        with contextlib.suppress(AttributeError, TypeError):
            object.__setattr__(owner, name, new)


def probe_rows(width: int, seed: int = 1) -> Tensor:
    """``[ROWS, width]`` of random numbers, the second half of them large."""
    rows = torch.randn((ROWS, width), generator=torch.Generator().manual_seed(seed))
    rows[ROWS // 2 :] *= LARGE
    return rows


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest value; infinite where shapes differ or a value is not finite."""
    if found.numel() != expected.numel() or not bool(expected.isfinite().all() and found.isfinite().all()):
        return float("inf")
    gap = (found.reshape(expected.shape).float() - expected.float()).abs().max()
    return float(gap / expected.float().abs().max().clamp(min=1e-30))


def structure(module: nn.Module) -> tuple[Any, ...]:
    """Equal for two modules that compute the same function of their weights: classes, scalars, functions, shapes."""
    rows: list[Any] = []
    for name, part in module.named_modules():
        plain = ((k, str(v)) for k, v in vars(part).items() if _is_plain(v))
        scalars = tuple(sorted((k, v) for k, v in plain if "layer" not in k and k != "training"))
        shapes = tuple((k, tuple(t.shape)) for k, t in (*part._parameters.items(), *part._buffers.items())
                       if t is not None)  # fmt: skip
        functions = ((k, getattr(v, "__func__", v)) for k, v in vars(part).items() if _is_function(v))
        rows.append((name, type(part), scalars, tuple(sorted(functions, key=lambda one: one[0])), shapes))
    return tuple(rows)


def _is_plain(value: Any) -> bool:
    """Whether it is a scalar, or holds only scalars."""
    every = value if isinstance(value, tuple | list) else [value]
    return all(isinstance(one, int | float | str) for one in every)


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, nn.Module | type) and isinstance(value, Hashable)
