"""Networks that profiles describe: held to the classes that transformers has, to engines' order, to hand counts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SMALL
from parameter_formula import parameters
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

import tensorcast as tc
from tensorcast.cost.memory import cache_bytes, kv_bytes_per_token
from tensorcast.errors import InputError
from tensorcast.modeling.config import hf_config
from tensorcast.modeling.described.attention import rotary
from tensorcast.modeling.described.model import DescribedLM
from tensorcast.modeling.moe.apply import apply_moe
from tensorcast.profiles.model import ModelProfile, MoEFields
from tensorcast.profiles.network.description import Network
from tensorcast.profiles.store import load_model
from tensorcast.report.catalog import model_record
from tensorcast.trace.cache import traced
from tensorcast.trace.dims import Sizes
from tensorcast.trace.table import OpTable
from tensorcast.trace.tracer import Phase, trace

WHOLE = {
    "source": "transformers", "hidden_size": "hidden_size", "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers", "tie_word_embeddings": "tie_word_embeddings",
}  # fmt: skip
GQA = {
    "kind": "attention", "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim", "rotary_dim": "head_dim",
}  # fmt: skip
MLA = {
    "kind": "mla", "num_heads": "num_attention_heads",
    **{name: name for name in "q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim".split()},
}  # fmt: skip
DENSE = {"kind": "mlp", "intermediate_size": "intermediate_size"}
EXPERTS = {
    "kind": "moe", "num_experts_per_tok": "num_experts_per_tok", "moe_intermediate_size": "moe_intermediate_size",
    "norm_topk_prob": "norm_topk_prob",
}  # fmt: skip
DEEPSEEK = {
    **EXPERTS, "num_experts": "n_routed_experts", "scoring": "sigmoid", "correction_bias": True, "n_group": "n_group",
    "topk_group": "topk_group", "shared_expert_intermediate_size": "n_shared_experts * moe_intermediate_size",
}  # fmt: skip
AFTER_DENSE = [{**DENSE, "layers": {"below": "first_k_dense_replace"}}, DEEPSEEK]
KDA = {
    "kind": "kda", "layers": {"types": "layer_types", "word": "linear_attention"}, "num_heads": "linear_num_heads",
    "head_dim": "linear_head_dim", "conv_kernel": "linear_conv_kernel_dim",
}  # fmt: skip

KIMI_LINEAR: dict[str, Any] = {
    "model_type": "kimi_linear", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 4, "moe_intermediate_size": 48, "num_hidden_layers": 4,
    "num_local_experts": 16, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": None, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 24,
    "n_shared_experts": 1, "linear_num_heads": 4, "linear_head_dim": 16, "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "norm_topk_prob": True, "rms_norm_eps": 1e-6, "routed_scaling_factor": 1.0,
}  # fmt: skip
QWEN3_MOE: dict[str, Any] = {
    **SMALL["qwen3_moe"], "num_hidden_layers": 2, "rope_theta": 1e4, "rms_norm_eps": 1e-6, "norm_topk_prob": True,
}  # fmt: skip
KNOWN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen3_moe": (QWEN3_MOE, {
        "attention": [{**GQA, "qk_norm": True}],
        "ffn": [{**DENSE, "layers": {"listed": "mlp_only_layers"}}, {**EXPERTS, "num_experts": "num_experts"}]}),
    "deepseek_v3": ({**SMALL["deepseek_v3"], "norm_topk_prob": True}, {"attention": [MLA], "ffn": AFTER_DENSE}),
    "kimi_linear": (KIMI_LINEAR, {
        "attention": [KDA, {**MLA, "rotary": False}],
        "ffn": [AFTER_DENSE[0], {**DEEPSEEK, "num_experts": "num_local_experts"}]}),
}  # fmt: skip
"""Types that transformers has a class of: small configs, and how the same network is described."""


def profile(config: dict[str, Any], network: dict[str, Any] | None = None, **more: Any) -> ModelProfile:
    described = None if network is None else Network.model_validate({**WHOLE, **network})
    return ModelProfile(name="x", config=config, network=described, **more)


def both(kind: str, phase: Phase, tp: int = 1) -> tuple[OpTable, OpTable]:
    """A type as it is described, and as its class is traced."""
    config, network = KNOWN[kind]
    return trace(profile(config, network), phase, tp), trace(profile(config), phase, tp)


AT = Sizes(B=3.0, S=64.0, P=448.0, R=96.0, E=4.0, X=1.0)
PRODUCTS = frozenset("mm bmm grouped_matmul mla_absorb mla_expand attention linear_attention causal_conv1d".split())


def work(table: OpTable) -> Counter[tuple[Any, ...]]:
    """Rows that do the work, as multisets of what they read and write, with how many layers have them."""
    found: Counter[tuple[Any, ...]] = Counter()
    for op in table.ops:
        if op.name in PRODUCTS and op.outputs:
            sizes = (tuple(sorted(float(t.numel(AT)) for t in tensors)) for tensors in (op.inputs[:3], op.outputs[:1]))
            found[(op.name, op.shard, *sizes)] += table.layer_kinds.count(op.kind) if op.kind >= 0 else 1
    return found


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("kind", KNOWN)
def test_a_description_does_the_work_of_the_class(kind: str, tp: int, phase: Phase) -> None:
    """Every matmul and scan, whole and cut; parameters, cache, facts."""
    ours, theirs = both(kind, phase, tp)
    assert work(ours) == work(theirs)
    assert ours.total_params() == theirs.total_params()
    assert kv_bytes_per_token(ours) == kv_bytes_per_token(theirs)
    assert cache_bytes(ours, "bf16", 2.0, 100.0) == cache_bytes(theirs, "bf16", 2.0, 100.0)
    assert {**vars(ours.facts), "remarks": ()} == {**vars(theirs.facts), "remarks": ()}


PLAIN = {"pad_token_id": 0, "routed_scaling_factor": 1.0, "rope_interleave": False}
"""What shapes no operation, as a described network has it."""

RENAMED = (("self_attn.forget_gate.", "self_attn."), ("self_attn.g_b_proj.", "self_attn.g_proj."))
"""Names of modules in classes that a described network calls otherwise."""


def stock_and_ours(kind: str) -> tuple[Any, DescribedLM]:
    """transformers' model with random weights, and the described one with the same, in fp32."""
    torch.manual_seed(5)
    config, network = KNOWN[kind]
    values = {**config, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, **PLAIN}
    stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values)).eval()
    ours = DescribedLM(hf_config(profile(config, network))).eval()  # type: ignore[arg-type]
    weights = {}
    for name, tensor in [*stock.named_parameters(), *stock.named_buffers()]:
        if "inv_freq" in name:
            continue
        tensor.data.normal_(0.0 if "norm" not in name else 1.0, 0.2)
        for before, after in RENAMED:
            name = name.replace(before, after)
        weights[name] = tensor.data
    own = {name: weights[name] for name, _ in [*ours.named_parameters(), *ours.named_buffers()]}
    ours.load_state_dict(own)
    return stock, ours


@pytest.mark.parametrize("kind", KNOWN)
def test_a_described_network_gives_the_logits_of_the_class(kind: str) -> None:
    """The same weights on real tokens: a prompt at once, and its last token alone after what is kept of the others."""
    stock, ours = stock_and_ours(kind)
    ids = torch.randint(0, 512, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = stock(ids, use_cache=False).logits
        torch.testing.assert_close(ours(ids), expected, rtol=1e-3, atol=1e-3)
        cache = DynamicCache(config=ours.config)
        ours(ids[:, :-1], past_key_values=cache)
        last = ours(ids[:, -1:], torch.tensor([[11]]), past_key_values=cache)
    torch.testing.assert_close(last, expected[:, -1:], rtol=1e-3, atol=1e-3)


def test_routed_experts_of_a_description_are_rewritten_and_stay_equal() -> None:
    """In a stream of their own with a norm behind them, beside a gated shared one: on the MoE layer."""
    part = {**DEEPSEEK, "latent_size": 32, "latent_norm": True, "shared_expert_gate": True, "n_group": 1}
    config = {**SMALL["deepseek_v3"], "num_hidden_layers": 1}
    model = DescribedLM(hf_config(profile(config, {"attention": [MLA], "ffn": [part]})))  # type: ignore[arg-type]
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.2)
    ids = torch.arange(24).reshape(2, 12) * 7 % 512
    with torch.no_grad():
        expected = model(ids)
        assert apply_moe(model, fields=MoEFields(after=("routed_norm",))) == ["model.layers.0.mlp"]
        torch.testing.assert_close(model(ids), expected, rtol=1e-3, atol=1e-3)


def attended(sources: list[Tensor], mix: Any) -> Tensor:
    """One token after another: the softmax over sources by the product of each one's norm with the query."""
    out = torch.empty_like(sources[-1])
    for place in [(b, s) for b in range(out.shape[0]) for s in range(out.shape[1])]:
        rows = torch.stack([source[place] for source in sources])
        normed = rows / (rows.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mix.norm.weight
        out[place] = torch.softmax(normed @ mix.query, 0) @ rows
    return out


def test_residuals_attend_to_the_sums_of_blocks_as_engines_do() -> None:
    """Held to the order in which vLLM 0.33.0 keeps them (models/kimi_k3/nvidia/model.py, KimiDecoderLayer): a layer
    that opens a block writes the sum so far among the blocks, and its attention's output begins the next sum."""
    config = {**SMALL["deepseek_v3"], "num_hidden_layers": 5}
    network = {"attention": [MLA], "ffn": AFTER_DENSE, "residual": {"kind": "attention", "block_size": 2}}
    model = DescribedLM(hf_config(profile(config, network))).eval()  # type: ignore[arg-type]
    torch.manual_seed(2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    ids = torch.randint(0, 512, (2, 6))
    with torch.no_grad():
        position = rotary(torch.arange(6)[None], 16)
        since, pending, blocks = model.model.embed_tokens(ids), None, list[Tensor]()
        layers: Any = model.model.layers
        for i, layer in enumerate(layers):
            since = since if pending is None else since + pending
            read = attended([*blocks, since], layer.self_attention_res)
            blocks += [since] if i % 2 == 0 else []
            pending = layer.self_attn(layer.input_layernorm(read), position, None)
            since = pending if i % 2 == 0 else since + pending
            pending = layer.mlp(layer.post_attention_layernorm(attended([*blocks, since], layer.mlp_res)))
        last = model.model.norm(attended([*blocks, since + pending], model.model.output_res))
        torch.testing.assert_close(model(ids), model.lm_head(last), rtol=1e-3, atol=1e-3)


def test_kimi_k3_holds_what_its_file_says() -> None:
    """2.8 T parameters of which 104 B run (arXiv 2607.24653), and the count by hand to the last one."""
    shipped = load_model("kimi-k3")
    total = parameters(shipped.config)
    assert total is not None and abs(total - 2.8e12) < 0.05e12
    assert traced(shipped, "decode").total_params() == total
    idle = 92 * (896 - 16) * 3 * 3584 * 3072
    assert abs(total - idle - 163840 * 7168 - 104e9) < 1e9


def test_ling_and_step_hold_what_their_files_say() -> None:
    """To the last parameter; published are 16.26 and 316 B. Step-3 lists its layers with experts in a word."""
    ling, step = load_model("ling-mini-2.0"), load_model("step-3")
    assert traced(ling, "decode").total_params() == parameters(ling.config)
    assert traced(step, "decode").total_params() == parameters(step.config)
    assert kv_bytes_per_token(traced(step, "decode")) == 61 * 2 * 256 * 2


def test_kimi_k3_caches_what_engines_do() -> None:
    """A latent of 576 numbers in 24 layers; in the others states as vLLM 0.33.0 shapes them (mamba_utils.py,
    kda_state_shape): 96 x 128 x 128 in fp32, and 3 inputs of 3 x 12,288 channels in bf16."""
    for tp in (1, 8):
        table = traced(load_model("kimi-k3"), "decode", tp)
        assert kv_bytes_per_token(table) == 24 * 576 * 2
        state = (96 * 128 * 128 * 4 + 3 * 3 * 96 * 128 * 2) / tp
        assert cache_bytes(table, "bf16", 1.0, 1000.0) == 1000 * 24 * 576 * 2 + 69 * state


def test_another_release_of_a_described_type_is_read_from_its_folder(tmp_path: Path) -> None:
    """Half as deep, twice as many choices, without a stream of the experts' own: the description names fields."""
    shipped = load_model("kimi-k3")
    text = {**shipped.config["text_config"], "num_hidden_layers": 2, "num_experts_per_token": 32}
    del text["routed_expert_hidden_size"], text["quantization_config"]
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**shipped.config, "text_config": text}))
    found = load_model(folder)
    assert found.network == shipped.network
    facts = trace(found.model_copy(update={"moe": MoEFields()}), "decode").facts
    assert (facts.layers, facts.top_k, facts.moe_hidden_size) == (2, 32, 7168)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attention": [{**MLA, "num_heads": "heads"}]}, r"attention\[0\].num_heads: config.json does not say heads"),
        ({"attention": [{**MLA, "num_heads": 0}]}, r"attention\[0\].num_heads = 0: must be at least 1"),
        ({"attention": [{**MLA, "num_heads": "rope_scaling_type"}]}, "num_heads = 'linear': must be a whole number"),
        ({"attention": [{**MLA, "layers": {"below": 1}}]}, "attention: layer 1 of 4 has none"),
        ({"attention": [{**MLA, "layers": {"listed": "hidden_size"}}]}, "hidden_size in config.json is no list"),
        ({"attention": [{**MLA, "layers": {"types": "kinds", "word": "x"}}]}, "has no word for each of 4 layers"),
    ],
)
def test_what_cannot_be_read_is_said_by_its_place(change: dict[str, Any], said: str) -> None:
    config = {**SMALL["deepseek_v3"], "rope_scaling_type": "linear"}
    with pytest.raises(InputError, match=said):
        hf_config(profile(config, {"attention": [MLA], "ffn": AFTER_DENSE, **change}))


@pytest.mark.parametrize("layers", [{}, {"below": 1, "every": 2}, {"types": "layer_types"}])
def test_layers_are_said_in_one_way(layers: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        Network.model_validate({**WHOLE, "attention": [{**MLA, "layers": layers}], "ffn": [DENSE]})


def test_a_described_model_says_so_wherever_it_is_priced() -> None:
    found = tc.simulate("kimi-k3", device="b300", world_size=16, tp=16, ep=16, phase="decode", batch=8, context=1000)
    assert any("described by its profile" in note for note in found.notes)
    assert "described" in model_record(load_model("kimi-k3"))["attention"]
