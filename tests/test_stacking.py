"""Stacked experts of any names, orientation and activation, called with rows, ids and weights in one's own blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from own_model import Person
from torch import Tensor, nn
from torch.nn import functional as F

from tensorcast.errors import InputError
from tensorcast.modeling.moe.apply import apply_moe
from tensorcast.modeling.moe.listed import ListedExperts
from tensorcast.modeling.moe.reading.stacking import StackedExperts, read_list, read_stacked
from tensorcast.profiles.model import MoEFields

EXPERTS, TOP_K = 6, 2
Tensors = dict[str, tuple[int, ...]]
Run = Callable[[Any, int, Tensor], Tensor]


class _Stacked(nn.Module):
    """``experts(x)`` of tensors as they are named; ``up`` makes gate and up of an expert's rows."""

    def __init__(self, tensors: Tensors, run: Run) -> None:
        super().__init__()
        for name, shape in tensors.items():
            setattr(self, name, nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5))
        self.run = run

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(EXPERTS):
            token, choice = (ids == expert).nonzero(as_tuple=True)
            out.index_add_(0, token, self.run(self, expert, x[token]) * weights[token, choice, None])
        return out


def _separate(m: Any, e: int, x: Tensor) -> Tensor:
    out: Tensor = (F.gelu(x @ m.w1[e].T) * (x @ m.w3[e].T)) @ m.w2[e].T
    return out


def _halves(m: Any, e: int, x: Tensor) -> Tensor:
    gate, up = (x @ m.gate_up_proj[e].T).chunk(2, -1)
    out: Tensor = (F.silu(gate) * up) @ m.down_proj[e].T
    return out


def _turned(m: Any, e: int, x: Tensor) -> Tensor:
    gate, up = (x @ m.gate_up_proj[e]).chunk(2, -1)
    out: Tensor = (F.relu(gate) * up) @ m.down_proj[e]
    return out


def _in_turn(m: Any, e: int, x: Tensor) -> Tensor:
    both = x @ m.gate_up_proj[e].T
    out: Tensor = (F.silu(both[:, ::2]) * both[:, 1::2]) @ m.down_proj[e].T
    return out


def _up_first(m: Any, e: int, x: Tensor) -> Tensor:
    up, gate = (x @ m.wi[e].T).chunk(2, -1)
    out: Tensor = (F.silu(gate) * up) @ m.wo[e].T
    return out


def _plain(m: Any, e: int, x: Tensor) -> Tensor:
    out: Tensor = F.relu(x @ m.wi[e].T) @ m.wo[e].T
    return out


class _Gate(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, hidden) * 0.2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = F.linear(x, self.weight).softmax(-1).topk(TOP_K, -1)
        return ids, weights


class _Block(nn.Module):
    def __init__(self, experts: nn.Module, hidden: int) -> None:
        super().__init__()
        self.gate, self.experts, self.top_k, self.hidden = _Gate(hidden), experts, TOP_K, hidden

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.reshape(-1, self.hidden)
        out: Tensor = self.experts(rows, *self.gate(rows))
        return out.view(hidden_states.shape)


class _Model(nn.Module):
    def __init__(self, experts: nn.Module, hidden: int) -> None:
        super().__init__()
        self.block = _Block(experts, hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return out


@pytest.mark.parametrize(("hidden", "width"), [(64, 96), (96, 64), (128, 128), (32, 32)])
@pytest.mark.parametrize("kind", ["separate", "halves", "turned", "in turn", "up first", "plain"])
def test_stacked_experts_are_read_whatever_their_names_and_order(kind: str, hidden: int, width: int) -> None:
    """Widths of which the small twin's order is another, and square ones, whose shapes tell nothing."""
    both: Tensors = {"gate_up_proj": (EXPERTS, 2 * width, hidden), "down_proj": (EXPERTS, hidden, width)}
    kinds: dict[str, tuple[Tensors, Run]] = {
        "separate": (
            {"w1": (EXPERTS, width, hidden), "w2": (EXPERTS, hidden, width), "w3": (EXPERTS, width, hidden)}, _separate,
        ),
        "halves": (both, _halves),
        "turned": ({"gate_up_proj": (EXPERTS, hidden, 2 * width), "down_proj": (EXPERTS, width, hidden)}, _turned),
        "in turn": (both, _in_turn),
        "up first": ({"wi": (EXPERTS, 2 * width, hidden), "wo": (EXPERTS, hidden, width)}, _up_first),
        "plain": ({"wi": (EXPERTS, width, hidden), "wo": (EXPERTS, hidden, width)}, _plain),
    }  # fmt: skip
    tensors, run = kinds[kind]
    model, x = _Model(_Stacked(tensors, run), hidden), torch.randn(2, 9, hidden)
    with torch.no_grad():
        expected = model(x)
        assert apply_moe(model, fields=MoEFields(experts="experts")) == ["block"]
        assert float((model(x) - expected).abs().max() / expected.abs().max()) < 1e-6


def test_functions_that_modules_hold_tell_them_apart() -> None:
    """Of one class and one size: each is read by what it computes."""
    tensors: Tensors = {"gate_up_proj": (EXPERTS, 96, 64), "down_proj": (EXPERTS, 64, 48)}
    for run in (_halves, _in_turn):
        model, x = _Model(_Stacked(tensors, run), 64), torch.randn(1, 9, 64)
        with torch.no_grad():
            expected = model(x)
            apply_moe(model)
            assert float((model(x) - expected).abs().max() / expected.abs().max()) < 1e-6


def test_an_activation_is_named_as_transformers_names_it() -> None:
    shapes: Tensors = {"w1": (EXPERTS, 48, 32), "w2": (EXPERTS, 32, 48), "w3": (EXPERTS, 48, 32)}
    experts = _Stacked(shapes, _separate)
    named: Any = read_stacked(experts, MoEFields(matrices=("w1", "w3", "w2"), activation="gelu"))
    assert float((named.act_fn(torch.tensor(1.0)) - F.gelu(torch.tensor(1.0))).abs()) == 0
    for fields, message in (
        (MoEFields(matrices=("w1", "w3", "w2"), activation="silu"), "no order of w1, w2, w3"),
        (MoEFields(matrices=("w3", "w1", "w2"), activation="gelu"), "no order of w1, w2, w3"),
        (MoEFields(activation="glu"), "'glu' is not on the module of experts; it has w1, w2, w3"),
    ):
        with pytest.raises(InputError, match=message):
            read_stacked(experts, fields)


def test_matrices_of_listed_experts_in_another_order_are_corrected() -> None:
    """Where no order holds (an expert with limits), its own code runs and no order is wrong."""
    experts = nn.ModuleList(Person(64, 48, "plain") for _ in range(EXPERTS))
    with pytest.raises(InputError, match=r"moe\.matrices = w3, w1, w2: .* are w1, w3, w2 in its own forward"):
        read_list(experts, MoEFields(matrices=("w3", "w1", "w2")))
    assert isinstance(read_list(experts, MoEFields(matrices=("w1", "w3", "w2"))), StackedExperts)
    limited = nn.ModuleList(Person(64, 48, "limited") for _ in range(EXPERTS))
    assert isinstance(read_list(limited, MoEFields(matrices=("w3", "w1", "w2"))), ListedExperts)


class _Folded(nn.Module):
    def __init__(self, count: int | None) -> None:
        super().__init__()
        for name in ("w1", "v1", "w2"):
            setattr(self, name, nn.Parameter(torch.randn(EXPERTS * 96, 64) * 0.1))
        if count:
            self.num_experts = count

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """At its own widths alone: they are numbers of its code."""
        gate, up, down = (part.view(EXPERTS, 96, 64) for part in self.parameters())
        out = torch.zeros_like(x)
        for expert in range(EXPERTS):
            token, choice = (ids == expert).nonzero(as_tuple=True)
            found = (F.silu(x[token] @ gate[expert].T) * (x[token] @ up[expert].T)) @ down[expert]
            out.index_add_(0, token, found * weights[token, choice, None])
        return out


def test_code_with_widths_as_numbers_is_tried_at_those() -> None:
    model, x = _Model(_Folded(EXPERTS), 64), torch.randn(2, 9, 64)
    with torch.no_grad():
        expected = model(x)
        apply_moe(model, fields=MoEFields(experts="experts"))
        assert float((model(x) - expected).abs().max() / expected.abs().max()) < 1e-6
    with pytest.raises(InputError, match="w1, v1, w2 may hold all experts one below another, but no num_experts"):
        apply_moe(_Model(_Folded(None), 64), fields=MoEFields(experts="experts"))
