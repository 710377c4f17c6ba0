"""The closed-form table against full concrete traces and a symbolic-shape trace: the same ops, the same sizes."""

from __future__ import annotations

import collections
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from families import SMALL
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tensorcast.errors import InputError
from tensorcast.modeling.attention import masks, past_length, trace_cache
from tensorcast.modeling.build import build
from tensorcast.modeling.config import hf_config
from tensorcast.modeling.recurrent import hub_kernels_as_ops
from tensorcast.profiles.model import ModelProfile
from tensorcast.profiles.store import load_model
from tensorcast.trace.closed_form import DECODE, PREFILL, NoClosedForm, Probe, solve
from tensorcast.trace.dims import Dim, Sizes
from tensorcast.trace.forward import record_step
from tensorcast.trace.layers import Kinds
from tensorcast.trace.record import ALLOCATIONS, VIEWS, WRITE_ONLY
from tensorcast.trace.stored import from_json, to_json
from tensorcast.trace.table import Op, layer_ranges
from tensorcast.trace.tracer import closed_ops, trace

REAL = ("deepseek-v3", "gpt-oss-20b", "llama-4-maverick", "qwen3.5-35b-a3b", "nemotron-3-nano-30b-a3b")


def profile_of(family: str) -> ModelProfile:
    if family in REAL:
        return load_model(family)
    return ModelProfile(name=family, hf_id=family, description="test", sources={}, config=SMALL[family])


def closed_form(family: str, phase: str) -> tuple[Any, Any, list[Op], Kinds]:
    config = hf_config(profile_of(family))
    model, kinds = build(config), Kinds()
    probes = DECODE if phase == "decode" else PREFILL
    recorded = [
        record_step(model, config, batch=p.B, new=p.S, past=p.P, recurrent_state=phase == "decode", kinds=kinds)
        for p in probes
    ]
    return model, config, closed_ops(model, kinds, recorded, probes), kinds


def multiset(ops: list[Op], kinds: Kinds, sizes: Sizes) -> collections.Counter[Any]:
    counted: collections.Counter[Any] = collections.Counter()
    for op in ops:
        shapes = tuple(tuple(int(d.at(sizes)) for d in t.dims) for t in (*op.inputs, *op.outputs))
        counted[op.name, shapes] += len(kinds.layers(op.kind)) if op.kind >= 0 else 1
    return counted


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("family", [*SMALL, *REAL])
def test_table_equals_full_trace_at_random_sizes(family: str, phase: str) -> None:
    model, config, ops, kinds = closed_form(family, phase)
    generator = random.Random(f"{family}{phase}")
    for _ in range(2):
        batch, past = generator.randint(2, 40), generator.randint(300, 3000)
        new = 1 if phase == "decode" else generator.randint(300, 2000)
        calls = record_step(model, config, batch=batch, new=new, past=past, recurrent_state=phase == "decode")
        full: collections.Counter[Any] = collections.Counter(
            (c.name, tuple(t.shape for t in (*c.inputs, *c.outputs))) for c in calls
        )
        assert multiset(ops, kinds, Sizes(B=batch, S=new, P=past)) == full


class _Shapes(TorchDispatchMode):
    """Op names and shapes as sympy expressions."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[str, tuple[tuple[Any, ...], ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name not in VIEWS and name not in ALLOCATIONS:
            read = args[1:] if name in WRITE_ONLY else args
            tensors = [t for t in (*tree_leaves((read, kwargs)), *tree_leaves(out)) if isinstance(t, torch.Tensor)]
            self.rows.append((name, tuple(tuple(_expression(d) for d in t.shape) for t in tensors)))
        return out


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


@pytest.mark.parametrize(
    "family", ["deepseek_v3", "mixtral", "gpt_oss", "qwen3_moe", "ernie4_5_moe", "minimax_m2", "llama"]
)
def test_table_equals_symbolic_shape_trace(family: str) -> None:
    """torch's own symbolic shapes, with no prime numbers involved, give the same closed forms; nothing is pinned.

    Llama-4 is not here: its complex rotary embedding makes torch 2.13 pin the sequence length.
    """
    _, config, ops, kinds = closed_form(family, "prefill")
    past = 384
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    dynamic: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.DYNAMIC])
    with mode:
        model = build(config, device="cpu")
    ids = mode.from_tensor(torch.empty((6, 640), dtype=torch.long), symbolic_context=dynamic)
    batch, new = (_expression(d) for d in ids.shape)
    cache = trace_cache(model, config, past)
    shapes = _Shapes()
    with torch.no_grad(), masks(False), past_length(past), hub_kernels_as_ops(model), mode:
        positions = torch.arange(ids.shape[1]).unsqueeze(0)
        with shapes:
            model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    assert not {batch, new} & set(env.replacements), "torch pinned a size: the oracle proves nothing"
    symbols = {"B": batch, "S": new, "P": sympy.Integer(past), "L": new + past}

    def closed(dim: Dim) -> Any:
        value = sympy.nsimplify(dim.coef)
        for atom, symbol in symbols.items():
            value *= symbol ** getattr(dim, atom)
        return sympy.expand(value + dim.plus)

    expected: collections.Counter[Any] = collections.Counter()
    for op in ops:
        row = (op.name, tuple(tuple(closed(d) for d in t.dims) for t in (*op.inputs, *op.outputs)))
        expected[row] += len(kinds.layers(op.kind)) if op.kind >= 0 else 1
    found = collections.Counter(
        (name, tuple(tuple(sympy.expand(d) for d in s) for s in row)) for name, row in shapes.rows
    )
    assert found == expected


@pytest.mark.parametrize(
    ("family", "phase", "form"),
    [
        ("deepseek_v3", "decode", "mla_absorb"),
        ("deepseek_v3", "prefill", "mla_expand"),
        ("glm_moe_dsa", "prefill", "mla_absorb"),
    ],
)
def test_latent_attention_is_absorbed_where_engines_absorb_it(family: str, phase: str, form: str) -> None:
    table = trace(profile_of(family), phase)  # type: ignore[arg-type]
    found = [op for op in table.ops if op.name in ("mla_absorb", "mla_expand")]
    assert {op.name for op in found} == {form}
    rows = {op.inputs[0].dims[0] for op in found}
    assert rows == {Dim(1, B=1, L=1) if form == "mla_expand" else Dim(1, B=1, S=int(phase == "prefill"))}


@pytest.mark.parametrize("name", ["deepseek-v3", "qwen3-30b-a3b", "gpt-oss-20b"])
def test_table_survives_the_cache(name: str) -> None:
    table = trace(load_model(name), "decode", 2)
    text = json.dumps(to_json(table))
    (read,), (again,) = (from_json(json.loads(text)) for _ in range(2))
    assert read == again == table
    ops = (*read.ops, *again.ops)
    words = [word for op in ops for word in (op.name, op.module, op.stage, *(t.dtype for t in op.inputs))]
    assert len(set(map(id, words))) == len(set(words)), "each once in memory"


def test_solver_finds_random_monomials() -> None:
    generator = random.Random(0)
    for _ in range(300):
        powers = {atom: generator.randint(0, 2) for atom in "BSLP"}
        dim = Dim(generator.choice([1, 2, 3, 7168, 129280, 17]), **powers)
        values = [int(dim.at(Sizes(B=p.B, S=p.S, P=p.P))) for p in PREFILL]
        found = solve(values, PREFILL)
        for _ in range(3):
            at = Sizes(B=generator.randint(1, 99), S=generator.randint(1, 9999), P=generator.randint(1, 9999))
            assert found.at(at) == dim.at(at)


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (lambda p: p.S + 3, Dim(1, S=1, plus=3)),
        (lambda p: 2 * p.L - 5, Dim(2, L=1, plus=-5)),
        (lambda p: p.S // 4, Dim(0.25, S=1, rounded=-1)),
        (lambda p: -(-p.L // 128), Dim(1 / 128, L=1, rounded=1)),
    ],
)
def test_solver_finds_offsets_and_blocks(make: Any, value: Dim) -> None:
    assert solve([make(p) for p in PREFILL], PREFILL) == value


def test_solver_refuses_what_is_no_closed_form() -> None:
    with pytest.raises(NoClosedForm):
        solve([p.B**3 + p.S**2 for p in PREFILL], PREFILL)


def test_probes_share_no_factor_with_each_other() -> None:
    for probe in (*PREFILL, *DECODE):
        primes = [probe.B, probe.half, probe.L] + ([probe.s] if probe.s > 1 else [])
        assert all(sympy.isprime(n) for n in primes)
        assert len(set(primes)) == len(primes)
    assert isinstance(PREFILL[0], Probe)


@pytest.mark.parametrize(
    ("layers", "text"),
    [([3, 4, 5], "3-5"), ([0, 2, 4, 6], "0-6:2"), ([7], "7"), ([0, 1], "0-1"), ([0, 5, 7], "0,5,7")],
)
def test_layer_ranges_read_well(layers: list[int], text: str) -> None:
    assert layer_ranges(layers) == text


LONGCAT: dict[str, Any] = {
    "model_type": "longcat_flash", "hidden_size": 64, "ffn_hidden_size": 128, "expert_ffn_hidden_size": 32,
    "num_layers": 2, "num_hidden_layers": 4, "n_routed_experts": 8, "zero_expert_num": 4, "moe_topk": 3,
    "num_attention_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "head_dim": 8, "vocab_size": 512,
}  # fmt: skip


def test_experts_that_compute_nothing_have_no_rows_and_no_weights(tmp_path: Path) -> None:
    """LongCat: 3 of 8 + 4 choices, so two rows a token on average; transformers stacks up projections for all 12."""
    (tmp_path / "config.json").write_text(json.dumps(LONGCAT))
    table = trace(load_model(str(tmp_path)), "decode")
    assert (table.facts.num_experts, table.facts.zero_experts) == (8, 4)
    assert table.facts.copies_per_token == 2.0
    assert sum(p.full_numel for p in table.params if p.role == "experts") == 8 * 3 * 64 * 32


def test_sizes_that_do_not_go_together_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LONGCAT, "head_dim": 64}))
    with pytest.raises(InputError, match="fails with this config in decode: Attempting to broadcast"):
        trace(load_model(str(tmp_path)), "decode")
