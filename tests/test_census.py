"""Every MoE family of transformers through our trace, counted again from its config and its parameters."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from typing import Any

import census
import pytest
from torch import nn

from tensorcast.trace.dims import Sizes
from tensorcast.trace.fuse import fold
from tensorcast.trace.table import Op, OpTable
from tensorcast.trace.tracer import Phase

PASSING = [(family, phase) for family in census.families() for phase in census.PHASES if census.traces(family, phase)]
MATMULS = frozenset("mm addmm bmm mla_absorb mla_expand".split())

ONE_MORE_TOKEN = {("zaya", "prefill"): "v_proj_delayed"}
"""Linears that also run on a token of zeros before each sequence."""


def sizes_of(table: OpTable) -> Sizes:
    """Random sizes of one rank that holds all experts, so its rows are its own tokens' choices."""
    generator = random.Random(f"{table.model} {table.phase}")
    block = int(table.facts.block)
    new = 1 if table.phase == "decode" else block * generator.randint(5, 2000 // block)
    batch, past = generator.randint(2, 40), block * generator.randint(5, 3000 // block)
    return Sizes(batch, new, past, R=batch * new * table.facts.top_k, E=table.facts.num_experts)


def regions(table: OpTable) -> Iterator[list[Op]]:
    """The rows of each MoE layer kind, from the permute of tokens to the unpermute."""
    rows: list[Op] = []
    for op in table.ops:
        if op.stage in ("permute", "experts", "unpermute"):
            rows.append(op)
        if op.stage == "unpermute":
            yield rows
            rows = []
    assert not rows, "a permute without its unpermute"


def shape(tensor: Any, sizes: Sizes) -> list[float]:
    return [float(dim.at(sizes)) for dim in tensor.dims]


def matmul_flops(op: Op, sizes: Sizes) -> float:
    """``2 * elements of the output * contracted width``; of a matmul's operands the last two are multiplied."""
    if op.name == "grouped_matmul":
        return 2.0 * math.prod(shape(op.outputs[0], sizes)) * float(op.inputs[0].dims[-1].at(sizes))
    return 2.0 * math.prod(shape(op.outputs[0], sizes)) * float(op.inputs[-2].dims[-1].at(sizes))


def test_most_families_pass() -> None:
    both = [f for f in census.families() if all((f, phase) in PASSING for phase in census.PHASES)]
    assert len(both) >= 60
    assert set(census.EXCEPTIONS) <= {*census.families()}


@pytest.mark.parametrize(("family", "phase"), PASSING, ids=str)
def test_each_moe_layer_is_the_pipeline_at_the_configs_sizes(family: str, phase: Phase) -> None:
    """Permute, grouped up, activation, grouped down, unpermute: rows T*k, experts E and the widths of the config."""
    table = census.table(family, phase)
    said, sizes = census.said(family), sizes_of(table)
    rows, (experts, chosen, width, hidden) = sizes.R, said
    assert rows == sizes.tokens * chosen
    found = list(regions(table))
    assert found
    for region in found:
        tokens = [op for op in region if op.name != "init_routing_v2" or op.outputs[0].dims[-1].coef > 1]
        names = [op.name for op in tokens]
        up, down = (i for i, name in enumerate(names) if name == "grouped_matmul")
        assert names[0] == "init_routing_v2"
        assert up < down - 1, "an activation lies between the two"
        assert names[-1] == "unpermute_tokens"
        assert shape(tokens[0].outputs[0], sizes) == [rows, hidden]
        assert shape(tokens[up].inputs[0], sizes) == [rows, hidden]
        wide = shape(tokens[up].outputs[0], sizes)
        assert wide in ([rows, width], [rows, 2 * width])
        weight = sorted(shape(tokens[up].inputs[1], sizes)[1:])
        assert weight == sorted([wide[1], hidden])
        assert shape(tokens[up].inputs[1], sizes)[0] == experts
        assert shape(tokens[down].inputs[0], sizes) == [rows, width]
        assert shape(tokens[down].outputs[0], sizes) == [rows, hidden]
        assert shape(tokens[-1].outputs[0], sizes) == [sizes.tokens, chosen, hidden]


@pytest.mark.parametrize(("family", "phase"), PASSING, ids=str)
def test_as_many_moe_layers_as_the_model_has_experts(family: str, phase: Phase) -> None:
    table = census.table(family, phase)
    layers = sum(table.count(region[0]) for region in regions(table))
    assert layers == sum(census.runs(family, path) for path, _ in census.experts_modules(family))


@pytest.mark.parametrize(("family", "phase"), PASSING, ids=str)
def test_experts_flops_follow_from_their_parameters(family: str, phase: Phase) -> None:
    """Each chosen expert multiplies each of its parameters (biases aside) once per token: ``2 * T * k * numel / E``."""
    table = census.table(family, phase)
    sizes = sizes_of(table)
    counted = sum(table.count(op) * matmul_flops(op, sizes) for op in table.ops if op.name == "grouped_matmul")
    per_row = sum(
        census.runs(family, path) * weight.numel() / weight.shape[0]
        for path, experts in census.experts_modules(family)
        for weight in experts.parameters(recurse=False)
        if weight.dim() == 3
    )
    assert counted == 2.0 * sizes.R * per_row


@pytest.mark.parametrize(("family", "phase"), PASSING, ids=str)
def test_linear_flops_follow_from_their_parameters(family: str, phase: Phase) -> None:
    """Each linear of the text path multiplies its weight with each token once: ``2 * T * numel``, over all layers.

    The head sees the last token of each sequence; latent attention's up-projection sees cached tokens again in prefill.
    """
    table, model = census.table(family, phase), census.model(family)
    sizes = sizes_of(table)
    name_of = {id(weight): name for name, weight in model.named_parameters()}
    linears = {
        path: (name_of[id(module.weight)], module.weight.numel())
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    found: dict[str, float] = {}
    again: set[str] = set()
    for op in fold(table.ops):
        if op.name in MATMULS and op.weights:
            found[op.weights[-1]] = found.get(op.weights[-1], 0.0) + matmul_flops(op, sizes)
            again |= {op.weights[-1]} if op.name == "mla_expand" else set()

    def expected(path: str, weight: str, numel: int) -> float:
        name = path.rpartition(".")[2]
        rows = sizes.B if path == "lm_head" else sizes.B * sizes.L if weight in again else sizes.tokens
        return float(2.0 * numel * (rows + (sizes.B if name == ONE_MORE_TOKEN.get((family, phase)) else 0)))

    standing = {param.name for param in table.params}
    if any(census.runs(family, path) > 1 for path in linears):  # in passes of several kinds, which share their weights
        names = {weight for weight, _ in linears.values()}
        rows = [op for op in fold(table.ops) if op.name in MATMULS and set(op.weights) & names]
        total = sum(census.runs(family, path) * expected(path, *linear) for path, linear in linears.items())
        assert sum(table.count(op) * matmul_flops(op, sizes) for op in rows) == total
        return
    for path, (weight, numel) in linears.items():
        if weight in standing:
            assert found.get(weight) == pytest.approx(expected(path, weight, numel), rel=1e-12), path
    kinds = {param.name: table.count(param) for param in table.params}
    counted = sum(numel * kinds[weight] for weight, numel in linears.values() if weight in standing)
    assert counted == sum(numel for _, numel in linears.values())  # the kinds' layers are all layers


@pytest.mark.parametrize(("family", "phase"), PASSING, ids=str)
def test_attention_spans_are_those_of_the_configs_layer_types(family: str, phase: Phase) -> None:
    """A layer that the config calls full reads every cached token; one that it calls sliding, a window of them."""
    table = census.table(family, phase)
    types = getattr(census.model(family).config, "layer_types", None) or ()
    for op in table.ops:
        for layer, kind in enumerate(types) if op.name == "attention" else ():
            if table.layer_kinds[layer] != op.kind:
                continue
            if kind == "full_attention":
                assert (op.attrs["window"], op.attrs["chunk"], op.attrs["selected"]) == (0, 0, 0), op.module
            if kind == "sliding_attention":
                assert op.attrs["window"] == census.SHRINK["sliding_window"], op.module


@pytest.mark.parametrize(("family", "phase"), PASSING, ids=str)
def test_every_parameter_is_counted_once(family: str, phase: Phase) -> None:
    table = census.table(family, phase)
    held = {name: weight.numel() for name, weight in census.model(family).named_parameters()}
    if zero := table.facts.zero_experts:  # transformers stacks up projections for experts that have no weights
        every = zero + table.facts.num_experts
        stacked = {name: held[name] for name in held if name.endswith("experts.gate_up_proj")}
        held |= {name: numel // every * table.facts.num_experts for name, numel in stacked.items()}
    assert table.total_params() == sum(held.values())


@pytest.mark.parametrize(
    ("family", "phase"), [(f, phase) for f, row in census.EXCEPTIONS.items() for phase in row[0].split()], ids=str
)
def test_exceptions_still_fail(family: str, phase: Phase) -> None:
    """A family that has come to trace belongs in the census, not in its list of exceptions."""
    with pytest.raises(Exception, match=census.EXCEPTIONS[family][1]):
        census.table(family, phase)


def test_the_page_is_what_the_census_finds() -> None:
    """``docs/families.md`` is generated; only its date may differ."""

    def dateless(text: str) -> str:
        return re.sub(r"\d{4}-\d\d-\d\d", "DATE", text)

    committed = census.PAGE.read_text(encoding="utf-8")
    assert dateless(committed) == dateless(census.page()), f"run {census.COMMAND}"
