"""Parameters of a language model worked out from its config by hand: no model is built, nothing of ours is asked."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

LANGUAGE_PARTS = ("text_config", "llm_config", "language_config")


class Form(NamedTuple):
    """What a type's layers have beside the matrices that every layer has.

    ``qkv``, ``out``, ``mlp``: 1 with biases. ``gated``: three matrices in an MLP, not two. ``norms``: of the stream's
    width in a layer; ``heads``: norms of queries and keys: "" none, "each" of a head's width, "all" of all
    heads' width. ``shift``: norms have a bias, too. ``sinks``: a number per query head.
    """

    qkv: int = 0
    out: int = 0
    mlp: int = 0
    gated: bool = True
    norms: int = 2
    heads: str = ""
    shift: bool = False
    head_bias: bool = False
    sinks: bool = False


LLAMA = Form()
FORMS: dict[str, Form] = {
    **dict.fromkeys(("llama", "mistral", "ministral3", "mixtral", "gemma", "phi3", "smollm3"), LLAMA),
    **dict.fromkeys(("mistral3", "deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25"), LLAMA),
    "glm_moe_dsa": LLAMA,
    "nemotron-nas": LLAMA,
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl"), Form(qkv=1)),
    **dict.fromkeys(("qwen3", "qwen3_moe", "qwen3_vl", "qwen3_vl_moe", "bailing_moe"), Form(heads="each")),
    "gemma2": Form(norms=4),
    **dict.fromkeys(("gemma3_text", "gemma3"), Form(norms=4, heads="each")),
    "olmo2": Form(heads="all"),
    "minimax_m2": Form(heads="all"),
    "cohere": Form(norms=1),
    "gpt_oss": Form(qkv=1, out=1, sinks=True),
    "gpt2": Form(qkv=1, out=1, mlp=1, gated=False, shift=True),
    "gpt_bigcode": Form(qkv=1, out=1, mlp=1, gated=False, shift=True),
    "gpt_neox": Form(qkv=1, out=1, mlp=1, gated=False, shift=True),
    "gptj": Form(mlp=1, gated=False, norms=1, shift=True, head_bias=True),
    "phi": Form(qkv=1, out=1, mlp=1, gated=False, norms=1, shift=True, head_bias=True),
    "phimoe": Form(qkv=1, out=1, shift=True, head_bias=True),
    "starcoder2": Form(qkv=1, out=1, mlp=1, gated=False, shift=True),
    **dict.fromkeys(("glm", "glm4_moe"), LLAMA),
    "stablelm": Form(shift=True),
}
"""Types whose layers are written out here; others are not counted by hand."""

TIED = frozenset(
    "gemma gemma2 gemma3_text gemma3 cohere gpt2 gpt_bigcode gemma4 gptj starcoder2 gemma3_text".split()
) - {"gptj"}
"""Whose head is the embedding unless the file says otherwise."""

ROTATED = frozenset({"gpt2", "gpt_bigcode"})
"""Without rotary embedding: positions have a table."""


def parameters(config: dict[str, Any]) -> int | None:
    """All parameters of the language model, tied ones once; None for a type that is not written out here."""
    part = next((config[name] for name in LANGUAGE_PARTS if isinstance(config.get(name), dict)), None)
    kind, values = config["model_type"], config
    if kind == "kimi_k3" and part is not None:
        return _kimi_k3(part)
    if kind == "step3_vl" and part is not None:
        return _step3(part)
    if kind == "deepseek_v41" and part is not None:
        return _deepseek_v41(part)
    if part is not None:
        values = {**part, "tie_word_embeddings": _tied(config, part)}
    form = FORMS.get(values.get("model_type", kind)) or FORMS.get(kind)
    if form is None or "vocab_size" not in values or not {"hidden_size", "n_embd"} & set(values):
        return None
    stream = _of(values, "hidden_size", "n_embd")
    layers = _of(values, "num_hidden_layers", "n_layer")
    norm = stream * (2 if form.shift else 1)
    total = values["vocab_size"] * stream + norm
    if kind in ROTATED:
        total += _of(values, "n_positions", "max_position_embeddings") * stream
    if not values.get("tie_word_embeddings", values.get("model_type", kind) in TIED):
        total += values["vocab_size"] * stream + (values["vocab_size"] if form.head_bias else 0)
    if values.get("block_configs"):
        return total + sum(_block(values, block, stream) for block in values["block_configs"])
    for layer in range(layers):
        total += _attention(values, form, stream, layer) + form.norms * norm + _mlp(values, form, stream, layer)
    return total


def _kimi_k3(values: dict[str, Any]) -> int:
    """Layers of Kimi delta attention and of latent attention with a gate; experts in a stream of their own; norms and
    queries of attention over the sums of blocks (vLLM 0.33.0, models/kimi_k3/nvidia: kda.py, mla.py, model.py)."""
    stream, linear, heads = values["hidden_size"], values["linear_attn_config"], values["num_attention_heads"]
    width, nope, value = linear["num_heads"] * linear["head_dim"], values["qk_nope_head_dim"], values["v_head_dim"]
    low, latent, rope = values["q_lora_rank"], values["kv_lora_rank"], values["qk_rope_head_dim"]
    kda = 5 * stream * width + linear["head_dim"] * (stream + width + 1) + linear["num_heads"] * (stream + 1)
    kda += width * (3 * linear["short_conv_kernel_size"] + 1)
    mla = low * (stream + heads * (nope + rope) + 1) + latent * (heads * (nope + value) + 1)
    mla += stream * (latent + rope + 2 * heads * value)
    inner, narrow = values["moe_intermediate_size"], values.get("routed_expert_hidden_size", stream)
    moe = values["num_experts"] * (stream + 3 * narrow * inner) + 3 * stream * inner * values["num_shared_experts"]
    moe += (2 * stream + 1) * narrow if "routed_expert_hidden_size" in values else 0
    dense, layers = values["first_k_dense_replace"], values["num_hidden_layers"]
    counts = [sum(layer <= layers for layer in linear[name]) for name in ("kda_layers", "full_attn_layers")]
    total = counts[0] * kda + counts[1] * mla + dense * 3 * stream * values["intermediate_size"]
    total += (layers - dense) * moe + (6 * layers + 3) * stream
    return total + (1 if values.get("tie_word_embeddings") else 2) * values["vocab_size"] * stream


def _step3(values: dict[str, Any]) -> int:
    """Queries through a normed latent, one key and value of a head's width (vLLM 0.33.0, models/step3_text.py)."""
    stream, head, low = values["hidden_size"], values["head_dim"], values["share_q_dim"]
    width, sparse = values["num_attention_heads"] * head, len(values["moe_layers_enum"].split(","))
    attention = low * (stream + width + 1) + 2 * values["num_attention_groups"] * head * stream + width * stream
    experts = values["moe_num_experts"]
    moe = experts * stream + 3 * stream * (experts * values["moe_intermediate_size"] + values["share_expert_dim"])
    layers = values["num_hidden_layers"]
    total = layers * (attention + 2 * stream) + (layers - sparse) * 3 * stream * values["intermediate_size"]
    return total + sparse * moe + stream + 2 * values["vocab_size"] * stream


def _deepseek_v41(values: dict[str, Any]) -> int:
    """One key for all heads, outputs narrowed in groups; entries and their keys in some layers, indexers in more;
    weights of four streams twice a layer; two tables (vLLM 0.33.0, models/deepseek_v41)."""
    stream, head, heads, low = (values[n] for n in ("hidden_size", "head_dim", "num_attention_heads", "q_lora_rank"))
    layers, groups, streams = values["num_hidden_layers"], values["o_groups"] * values["o_lora_rank"], values["hc_mult"]
    attention = low * (stream + heads * head + 1) + head * (stream + 1) + heads
    attention += groups * (heads * head // values["o_groups"] + stream)
    experts = values["n_routed_experts"]
    moe = experts * stream + 3 * stream * values["moe_intermediate_size"] * (experts + values["n_shared_experts"])
    mixes = 2 * (streams * (streams + 2) * (streams * stream + 1) + 3)
    total = layers * (attention + moe + mixes + 2 * stream) + stream + 2 * values["vocab_size"] * stream
    width, index = values["index_head_dim"], values["index_n_heads"]
    total += len(values["index_source_layer_ids"]) * index * (low * width + stream)
    for layer in values["kv_source_layer_ids"]:
        vectors = 2 if values["compress_ratios"][layer] > 1 else 1
        total += head * (vectors * stream + 1) + width * (head + 1)
    columns = (values["engram_max_ngram_size"] - 1) * values["engram_n_heads"]
    for rows in values["engram_num_embeddings"]:
        total += values["engram_head_dim"] * (rows + columns * stream * (streams + 1)) + 2 * streams * stream
    return total


def _block(values: dict[str, Any], block: dict[str, Any], stream: int) -> int:
    """A block of Puzzle's: Llama's attention, or none with its norm; an MLP of two thirds of a factor, in 256s."""
    attention, ffn, heads, total = block["attention"], block["ffn"], values["num_attention_heads"], 0
    if not attention["no_op"]:
        kv = heads // attention["n_heads_in_group"]
        total += stream + 2 * stream * stream + 2 * stream * kv * (stream // heads)
    if not ffn["no_op"]:
        total += stream + 3 * stream * 256 * math.ceil(int(ffn["ffn_mult"] * stream * 2 / 3) / 256)
    return total


def _tied(config: dict[str, Any], part: dict[str, Any]) -> bool:
    kind = part.get("model_type", config["model_type"])
    return config.get("tie_word_embeddings", part.get("tie_word_embeddings", kind in TIED))


def _of(values: dict[str, Any], *names: str, default: int = 0) -> int:
    return next((int(values[name]) for name in names if isinstance(values.get(name), int)), default)


def _attention(values: dict[str, Any], form: Form, stream: int, layer: int) -> int:
    heads = _of(values, "num_attention_heads", "n_head")
    if values.get("kv_lora_rank"):
        latent, low = values["kv_lora_rank"], values.get("q_lora_rank")
        nope, rope, value = values["qk_nope_head_dim"], values["qk_rope_head_dim"], values["v_head_dim"]
        query = heads * (nope + rope)
        total = stream * low + low + low * query if low else stream * query
        total += stream * (latent + rope) + latent + latent * heads * (nope + value) + heads * value * stream
        indexers = values.get("indexer_types") or ["full"] * (layer + 1)
        if values.get("index_n_heads") and indexers[layer] == "full":  # queries from the low rank, a key, its norm
            total += low * values["index_n_heads"] * values["index_head_dim"]
            total += stream * values["index_head_dim"] + 2 * values["index_head_dim"] + stream * values["index_n_heads"]
        return total
    kv = 1 if values.get("multi_query") else _of(values, "num_key_value_heads", default=heads)
    width = _of(values, "head_dim", default=stream // heads)
    bias = values.get("attention_bias")
    qkv, out = (form.qkv, form.out) if not isinstance(bias, bool) or form.qkv else (int(bias), int(bias))
    if isinstance(bias, bool) and form.out:
        qkv = out = int(bias)
    if values.get("model_type") in ("glm", "glm4_moe"):
        out = 0
    if values.get("model_type") == "stablelm":
        qkv = int(values.get("use_qkv_bias", False))
    if values.get("model_type") == "starcoder2":
        qkv = out = int(values.get("use_bias", True))
    total = stream * (heads + 2 * kv) * width + heads * width * stream
    total += qkv * (heads + 2 * kv) * width + out * stream
    norms = "each" if values.get("use_qk_norm") and not form.heads else form.heads
    total += {"": 0, "each": 2 * width, "all": (heads + kv) * width}[norms]
    return total + (heads if form.sinks else 0)


def _mlp(values: dict[str, Any], form: Form, stream: int, layer: int) -> int:
    experts = _of(values, "n_routed_experts", "num_local_experts", "num_experts")
    dense_before = _of(values, "first_k_dense_replace")
    step = _of(values, "decoder_sparse_step", "moe_layer_freq", default=1)
    dense = layer in (values.get("mlp_only_layers") or ())
    sparse = experts and layer >= dense_before and (layer + 1) % step == 0 and not dense
    width = _of(values, "intermediate_size", "n_inner", default=4 * stream)
    if not sparse:
        return _matrices(form, stream, width)
    expert = _of(values, "moe_intermediate_size", default=width)
    total = experts * stream + experts * _matrices(form, stream, expert)
    if form.sinks:  # gpt-oss: biases of every expert and of its router
        total += experts + experts * (2 * expert + stream)
    shared = _of(values, "n_shared_experts", "num_shared_experts") * expert
    total += _matrices(form, stream, shared) if shared else 0
    if gate := _of(values, "shared_expert_intermediate_size"):
        total += _matrices(form, stream, gate) + stream
    return total


def _matrices(form: Form, stream: int, width: int) -> int:
    return (3 if form.gated else 2) * stream * width + form.mlp * (width + stream)
