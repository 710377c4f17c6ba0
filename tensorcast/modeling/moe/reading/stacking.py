"""Experts of any shape as two stacked matmuls, where that is what they compute; a reading is tried and compared.

Names and order of an expert's matrices, and its activation, come from the profile or are found: every order that the
shapes allow is tried on a small twin with random weights until one gives what the experts' own ``forward`` gives.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from tensorcast.errors import InputError
from tensorcast.modeling.experts import describe_stacked
from tensorcast.modeling.moe.experts import count_of, held_experts
from tensorcast.modeling.moe.listed import ListedExperts
from tensorcast.modeling.moe.reading.probe import (
    BOUND,
    difference,
    probe_rows,
    small_twin,
    structure,
    twins_of,
)
from tensorcast.modeling.moe.rounding import hidden_of
from tensorcast.profiles.model import MoEFields

Activation = Callable[[Tensor], Tensor]

TRIED = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
"""Activations, by transformers' names, that are tried where an expert shows none of its own."""

Split = Literal["halves", "in turn", "up first"]


@dataclass(frozen=True)
class Reading:
    """Paths of an expert's matrices, gate and up before down, and where its activation is: a path, or transformers'
    name of one.

    Of stacked tensors also which are ``turned`` (to outputs by inputs), and how gate and up lie in one tensor.
    """

    matrices: tuple[str, ...]
    activation: str
    turned: tuple[bool, ...] = ()
    split: Split = "halves"


_found: dict[Any, Reading | bool | None] = {}


def read_list(experts: nn.ModuleList, fields: MoEFields = MoEFields()) -> nn.Module:
    """A list of experts as stacked weights; where they are no such matmuls, as :class:`ListedExperts`."""
    every = list(experts)
    shapes = structure(every[0])
    if any(structure(expert) != shapes for expert in every[1:]):
        return ListedExperts(every, grouped=False)
    key = (shapes, fields.matrices, fields.activation)
    if key not in _found:
        _found[key] = _read_expert(every[0], every[-1], fields)
    found = _found[key]
    if isinstance(found, Reading):
        return _stack_list(every, found)
    return ListedExperts(every, grouped=bool(found))


def _read_expert(first: nn.Module, last: nn.Module, fields: MoEFields) -> Reading | bool:
    """How an expert is read, or whether its own ``forward`` can run for all experts at once."""
    _check_names(first, fields, "expert")
    twins = [small_twin(first, 0), small_twin(last, 1)]
    linears = {path: m for path, m in twins[0].named_modules() if isinstance(m, nn.Linear)}
    widths = {m.in_features for m in linears.values()} | {m.out_features for m in linears.values()}
    for width in sorted(widths):
        rows = probe_rows(width)
        try:
            with torch.no_grad():
                expected = torch.cat([twin(rows) for twin in twins])
        except Exception:
            continue
        if expected.shape[-1] != width:
            continue
        for reading in _list_readings(twins[0], linears, width, fields):
            if _error(_stack_list(twins, reading), rows, expected) < BOUND:
                return reading
        if fields.matrices:
            found = _read_expert(first, last, fields.model_copy(update={"matrices": ()}))
            if isinstance(found, Reading):
                raise InputError(
                    f"moe.matrices = {', '.join(fields.matrices)}: gate, up and down projection of an expert are "
                    f"{', '.join(found.matrices)} in its own forward"
                )
        return _error(ListedExperts(twins, grouped=True), rows, expected) < BOUND
    return False


def _list_readings(
    expert: nn.Module, linears: dict[str, nn.Linear], width: int, fields: MoEFields
) -> Iterator[Reading]:
    orders: Iterator[tuple[str, ...]] = iter(
        (fields.matrices,) if fields.matrices else itertools.permutations(linears, len(linears))
    )
    for order in orders:
        *ups, down = (linears.get(path) for path in order)
        if down is None or down.out_features != width or not 1 <= len(ups) <= 2:
            continue
        if all(up is not None and up.in_features == width for up in ups):
            yield from (Reading(order, activation) for activation in _activations(expert, fields))


def _check_names(module: nn.Module, fields: MoEFields, what: str) -> None:
    """Raise :class:`InputError`, one line, on a name that the module has not."""
    for path in (*fields.matrices, *filter(None, (fields.activation,))):
        if path != fields.activation or path not in ACT2FN:
            _lookup(module, path, what)


def _activations(module: nn.Module, fields: MoEFields) -> list[str]:
    if fields.activation:
        return [fields.activation]
    shown = [path for path, child in module.named_modules() if path and not isinstance(child, nn.Linear)
             and not list(child.parameters())]  # fmt: skip
    shown += [name for name, value in vars(module).items() if callable(value) and "act" in name]
    return [*shown, *TRIED]


def _error(experts: nn.Module, rows: Tensor, expected: Tensor) -> float:
    """Of the same rows through both experts."""
    both, counts = torch.cat([rows, rows]), torch.tensor([len(rows), len(rows)])
    try:
        with torch.no_grad():
            return difference(held_experts(experts, range(2))(both, counts), expected)
    except Exception:  # whatever a trial of somebody's code raises: this reading is not it
        return float("inf")


class StackedExperts(nn.Module):
    """Stacked weights with the attributes that transformers' experts interface gives: ``[E,N,K]``, gate before up."""

    def __init__(self, up: Tensor, down: Tensor, activation: Activation, *, gated: bool,
                 up_bias: Tensor | None = None, down_bias: Tensor | None = None) -> None:  # fmt: skip
        super().__init__()
        self.has_gate, self.has_bias = gated, up_bias is not None and down_bias is not None
        self.is_transposed, self.is_concatenated, self.has_post_expert_norm = False, True, False
        name = "gate_up_proj" if gated else "up_proj"
        for key, value in ((name, up), ("down_proj", down), (f"{name}_bias", up_bias), ("down_proj_bias", down_bias)):
            if value is not None:
                setattr(self, key, nn.Parameter(value.detach(), requires_grad=False))
        self.act_fn = activation

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up


def _stack_list(experts: Sequence[nn.Module], reading: Reading) -> StackedExperts:
    *ups, down = reading.matrices
    has_bias = any(experts[0].get_submodule(path).bias is not None for path in reading.matrices)

    def bias(expert: nn.Module, path: str) -> Tensor:
        linear = expert.get_submodule(path)
        weight: Any = linear.weight
        return linear.bias if linear.bias is not None else weight.new_zeros(weight.shape[0])  # type: ignore[return-value]

    return StackedExperts(
        torch.stack([torch.cat([_lookup(expert, f"{path}.weight") for path in ups]) for expert in experts]),
        torch.stack([_lookup(expert, f"{down}.weight") for expert in experts]),
        _activation(experts[0], reading),
        gated=len(ups) == 2,
        up_bias=torch.stack([torch.cat([bias(e, path) for path in ups]) for e in experts]) if has_bias else None,
        down_bias=torch.stack([bias(e, down) for e in experts]) if has_bias else None,
    )


def _activation(module: nn.Module, reading: Reading) -> Activation:
    where = reading.activation
    named = where in ACT2FN and not hasattr(module, where)
    found: Activation = ACT2FN[where] if named else _lookup(module, where)
    return found


def is_described(experts: nn.Module) -> bool:
    """Whether ``describe_stacked`` says what these experts compute: gate and up in halves, with their activation."""
    if not (hasattr(experts, "act_fn") or hasattr(experts, "_apply_gate")):
        return False
    if not _is_routed(experts):
        return True
    key = ("described", structure(experts))
    if key not in _found:
        twin = small_twin(experts)
        describe_stacked(twin)
        try:
            _found[key] = routed_error(twin, twin) < BOUND
        except Exception:  # somebody's code on a twin: the block's own proof says why it cannot be
            _found[key] = True
    return bool(_found[key])


def _is_routed(experts: nn.Module) -> bool:
    """Whether experts are called with rows, indices and weights."""
    return len(inspect.signature(type(experts).forward).parameters) >= 4


def read_stacked(experts: nn.Module, fields: MoEFields = MoEFields()) -> nn.Module:
    """A module that stacks experts in any order, orientation or fold, as :class:`StackedExperts`.

    Raises :class:`InputError` where no order of its tensors gives what its ``forward`` gives.
    """
    _check_names(experts, fields, "module of experts")
    key = (structure(experts), fields.matrices, fields.activation)
    if key not in _found:
        readings = (one for twin in twins_of(experts) for one in _stacked_readings(twin, fields))
        _found[key] = next(readings, None)
    found = _found[key]
    if not isinstance(found, Reading):
        folded = [name for name, t in experts.named_parameters() if t.dim() == 2]
        if folded and not _stacked_tensors(experts):
            raise InputError(
                f"experts of type {type(experts).__name__}: {', '.join(folded)} may hold all experts one below "
                "another, but no num_experts on the module says how many"
            )
        raise InputError(
            f"experts of type {type(experts).__name__}: no order of {', '.join(_stacked_tensors(experts)) or 'tensors'}"
            f" as gate, up and down projection gives what its forward gives; name them in moe.matrices"
        )
    return _stack_tensors(experts, found)


def _stacked_tensors(experts: nn.Module) -> dict[str, Tensor]:
    """Tensors ``[E,a,b]`` by path, folded ones ``[E*a,b]`` unfolded."""
    wide = {name: t for name, t in experts.named_parameters() if t.dim() in (2, 3)}
    count = next((t.shape[0] for t in wide.values() if t.dim() == 3), getattr(experts, "num_experts", 0))
    return {name: t if t.dim() == 3 else t.view(count, -1, t.shape[-1])
            for name, t in wide.items() if t.dim() == 3 or (count > 1 and t.shape[0] % count == 0)}  # fmt: skip


def _stacked_readings(twin: nn.Module, fields: MoEFields) -> Iterator[Reading]:
    """Readings that hold against the twin's ``forward``; the only one that is stated, where it has none to call."""
    tensors = _stacked_tensors(twin)
    orders = [fields.matrices] if fields.matrices else [
        order for size in (3, 2) for order in itertools.permutations(tensors, size) if len(tensors) <= 4
    ]  # fmt: skip
    for order in orders:
        for turned, split in _orientations([tensors[name] for name in order if name in tensors]):
            for activation in _activations(twin, fields):
                reading = Reading(order, activation, turned, split)
                try:
                    if not _is_routed(twin) or routed_error(twin, _stack_tensors(twin, reading)) < BOUND:
                        yield reading
                except (InputError, RuntimeError, ValueError, TypeError):
                    continue


def _orientations(tensors: Sequence[Tensor]) -> Iterator[tuple[tuple[bool, ...], Split]]:
    """Ways to turn gate, up and down projection to outputs by inputs, and to split a tensor of gate and up, that their
    sizes allow."""
    for turned in itertools.product((False, True), repeat=len(tensors)):
        *ups, down = ((t.shape[2], t.shape[1]) if turn else tuple(t.shape[1:])
                      for t, turn in zip(tensors, turned, strict=True))  # fmt: skip
        hidden, inner = down
        if ups and all(up == (inner, hidden) for up in ups):
            yield turned, "halves"
        if ups == [(2 * inner, hidden)]:
            yield from ((turned, split) for split in get_args(Split))


def routed_error(stock: Any, experts: nn.Module) -> float:
    """Of experts called with rows, two distinct ids each and their weights, against the module they were made of."""
    number = count_of(experts)
    hidden = hidden_of(experts)
    rows, chosen = probe_rows(hidden), min(2, number)
    generator = torch.Generator().manual_seed(2)
    ids = torch.rand((len(rows), number), generator=generator).argsort(-1)[:, :chosen]
    weights = torch.rand((len(rows), chosen), generator=generator)
    with torch.no_grad():
        expected = stock(rows.clone(), ids, weights)
        order = ids.reshape(-1).argsort(stable=True)
        out = held_experts(experts, range(number))(rows[order // chosen], ids.reshape(-1).bincount(minlength=number))
        back = torch.empty_like(out)
        back[order] = out
        return difference((back.view(len(rows), chosen, -1) * weights.unsqueeze(-1)).sum(1), expected)


def _stack_tensors(experts: nn.Module, reading: Reading) -> StackedExperts:
    """Tensors brought to ``[E,N,K]``, gate before up."""
    tensors = _stacked_tensors(experts)
    *ups, down = (
        tensors[name].detach().transpose(1, 2) if turn else tensors[name].detach()
        for name, turn in zip(reading.matrices, reading.turned, strict=True)
    )
    gated = len(ups) == 2 or ups[0].shape[1] == 2 * down.shape[2]
    if reading.split == "in turn":
        ups = [ups[0][:, ::2], ups[0][:, 1::2]]
    elif reading.split == "up first":
        ups = list(reversed(ups[0].chunk(2, 1)))
    return StackedExperts(
        torch.cat(ups, 1).contiguous(), down.contiguous(), _activation(experts, reading), gated=gated
    )


def _lookup(module: nn.Module, path: str, what: str = "") -> Any:
    """The attribute at a dotted path. With ``what``, a missing one is an :class:`InputError` that lists what exists."""
    found: Any = module
    for part in path.split("."):
        if not hasattr(found, part):
            raise InputError(
                f"moe: {path!r} is not on the {what or type(module).__name__}; it has " + ", ".join(names_on(module))
            )
        found = getattr(found, part)
    return found


def names_on(module: nn.Module) -> list[str]:
    """Names that a profile may use of a module: its children, tensors, and plain values."""
    plain = [name for name, value in vars(module).items() if isinstance(value, int | float | str)]
    plain = [name for name in plain if name[0] != "_" and name != "training"]
    return [*(name for name in module._modules if not name.isdigit()), *module._parameters, *module._buffers, *plain]
