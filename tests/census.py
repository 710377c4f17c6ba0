"""Every MoE family of the installed transformers as a small model, and ``docs/families.md`` from tracing them.

A family is a model folder whose modeling file has a class of experts. Its small config starts from the config class's
own defaults and is shrunk by field name (``SHRINK``), keeping structure such as layer types; what a family needs beside
that is data in ``OVERRIDES``. Run ``python tests/census.py --write docs/families.md`` to write the page.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rewriting
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from tensorcast.modeling.build import build
from tensorcast.modeling.config import hf_config
from tensorcast.profiles.model import ModelProfile
from tensorcast.profiles.store import load_engine
from tensorcast.trace.fuse import fuse
from tensorcast.trace.table import OpTable
from tensorcast.trace.tracer import Phase, trace

logging.set_verbosity_error()  # small configs provoke warnings about token ids and the like

PHASES: tuple[Phase, ...] = ("prefill", "decode")
PAGE = Path(__file__).resolve().parent.parent / "docs" / "families.md"
COMMAND = "python tests/census.py --write docs/families.md"

BOTH = "prefill decode"
EXCEPTIONS: dict[str, tuple[str, str, str]] = {
    "jetmoe": (BOTH, "no data", "splits rows by expert counts read off the tensor; attention heads are experts "
               "too; neither vLLM 0.33.0 nor SGLang 0.5.23 has it"),
    "nllb_moe": (BOTH, "is_encoder_decoder", "encoder-decoder; a ModuleDict of experts with capacities"),
    "openai_privacy_filter": (BOTH, "no causal LM", "token classifier: bidirectional, no cache, no decoding"),
    "switch_transformers": (BOTH, "is_encoder_decoder", "encoder-decoder; a ModuleDict of experts with capacities"),
}
"""Family -> phases that do not trace, text of the error, reason."""

SHRINK: dict[str, int] = {
    **dict.fromkeys("hidden_size d_model".split(), 64),
    **dict.fromkeys("vocab_size vocab_size_per_layer_input ngram_vocab_size_base".split(), 512),
    **dict.fromkeys("intermediate_size ffn_hidden_size dense_intermediate_size intermediate_size_mlp".split(), 112),
    "prefix_dense_intermediate_size": 104,
    **dict.fromkeys("moe_intermediate_size expert_ffn_hidden_size".split(), 48),
    **dict.fromkeys("shared_expert_intermediate_size moe_shared_expert_intermediate_size".split(), 80),
    **dict.fromkeys("shared_intermediate_size shared_experts_intermediate_size share_expert_dim".split(), 80),
    "moe_hidden_size": 40,
    **dict.fromkeys("num_attention_heads n_heads num_sliding_attention_heads swa_num_attention_heads".split(), 4),
    **dict.fromkeys("num_key_value_heads num_global_key_value_heads swa_num_key_value_heads kv_n_heads".split(), 2),
    **dict.fromkeys("head_dim global_head_dim kv_channels swa_head_dim".split(), 16),
    **dict.fromkeys("num_experts num_local_experts n_routed_experts moe_num_experts".split(), 16),
    **dict.fromkeys("num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts moe_top_k".split(), 4),
    **dict.fromkeys("n_group num_expert_group".split(), 4),
    "topk_group": 2,
    "zero_expert_num": 8,
    **dict.fromkeys("first_k_dense_replace num_dense_layers".split(), 1),
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    **dict.fromkeys("qk_rope_head_dim qk_nope_head_dim".split(), 16),
    "v_head_dim": 24,
    **dict.fromkeys("index_n_heads index_topk indexer_n_heads".split(), 8),
    **dict.fromkeys("index_head_dim indexer_head_dim".split(), 32),
    **dict.fromkeys("index_topk_blocks o_groups hc_mult".split(), 2),
    "index_block_size": 4,
    **dict.fromkeys("sliding_window sliding_window_size attention_chunk_size".split(), 32),
    **dict.fromkeys("linear_num_key_heads n_groups".split(), 2),
    **dict.fromkeys("linear_num_value_heads linear_num_heads mamba_dt_rank".split(), 4),
    **dict.fromkeys("linear_key_head_dim linear_value_head_dim linear_head_dim".split(), 16),
    **dict.fromkeys("mamba_d_state ssm_state_size mamba_d_head mamba_head_dim o_lora_rank hc_lowrank".split(), 16),
    **dict.fromkeys("mamba_n_heads mamba_num_heads".split(), 8),
    "router_hidden_size": 24,
    "hidden_size_per_layer_input": 12,
}
"""Field name -> small value, where a config's default sets the field. Widths differ: none passes for another."""

AT_MOST = frozenset(
    "n_group num_expert_group topk_group first_k_dense_replace num_dense_layers num_key_value_heads".split()
)
"""Fields whose default stays when it is already smaller: no groups, no dense layers, one shared KV head."""

LAYERS = 4

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
OVERRIDES: dict[str, dict[str, Any]] = {
    "dbrx": {"n_layers": 3, "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 5e5}}
    | {"ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 16, "moe_top_k": 4}},
    "deepseek_ocr2": {"num_experts_per_tok": 4, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "deepseek_v2": {"num_experts_per_tok": 4, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
    | {"first_k_dense_replace": 1},
    "diffusion_gemma": {"num_experts": 16, "top_k_experts": 4, "moe_intermediate_size": 48},
    "dots1": {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_shared_experts": 2, "first_k_dense_replace": 1},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [48, 40], "rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]}},
    "gemma4": {"enable_moe_block": True, "num_experts": 16, "top_k_experts": 4, "moe_intermediate_size": 48},
    "glm4v_moe": {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}},
    "glm5_next": {"index_kpool": 4, "qk_rope_head_dim": 0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 80},
    "granitemoeshared": {"shared_intermediate_size": 80},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 16, "moe_topk": 4},
    "hy_v4_vl": {"rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]}},
    "inkling2_loop": {"n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1, "loop_layer_index_end": 3},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 3},
    "laguna": {"num_attention_heads_per_layer": [4, 4, 4]},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"]},
    "minimax_m3_vl": {"layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"]}
    | {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "phimoe": {"num_experts_per_tok": 2},
    "qwen4_exp": {"indexer_n_heads": 8, "indexer_kv_heads": 1, "indexer_head_dim": 32, "indexer_budget": 8}
    | {"indexer_compress_ratio": 4},
    "step3p7": {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 32}
    | {"mlp_layer_types": ["dense", "sparse", "sparse"]},
}
"""Fields that a family needs beside ``SHRINK``: its defaults are no model, or leave the experts out."""


@functools.cache
def families() -> tuple[str, ...]:
    """Folders of ``transformers.models`` whose modeling file defines experts."""
    root = Path(transformers.__file__).parent / "models"
    found = sorted(root.glob("*/modeling_*.py"))
    return tuple(
        f.parent.name
        for f in found
        if f.stem == f"modeling_{f.parent.name}" and re.search(r"^class \w*Experts\w*\(", f.read_text("utf-8"), re.M)
    )


def _config_classes(family: str) -> list[type[PreTrainedConfig]]:
    file = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    return [
        value
        for value in vars(file).values()
        if inspect.isclass(value) and issubclass(value, PreTrainedConfig) and value.__module__ == file.__name__
    ]


def text_config_class(family: str) -> type[PreTrainedConfig]:
    """The config of the family's text model: the first of its text configs, or its only config."""
    classes = _config_classes(family)
    text = [c for c in classes if c.__name__.endswith("TextConfig")]
    own = [c for c in classes if c.model_type.replace("-", "_") == family]
    return (text or own)[0]


def _values(config: PreTrainedConfig, fields: set[str]) -> dict[str, Any]:
    """The config's fields, under their aliases too; one that varies by layer has its stored, general value."""
    values: dict[str, Any] = {}
    for name in sorted(fields):
        try:
            values[name] = getattr(config, name)
        except (AttributeError, RuntimeError):  # RuntimeError: varies by layer
            values[name] = vars(config).get(name)
    return values


def _depth(values: dict[str, Any]) -> int:
    return int(values.get("num_hidden_layers") or values.get("num_layers") or 0)


def small_fields(family: str) -> dict[str, Any]:
    """Fields of the family's small text config."""
    kind = text_config_class(family)
    override = OVERRIDES.get(family, {})
    fields = {f.name for f in dataclasses.fields(kind)}  # derived attributes are no arguments
    default = _values(kind(), fields)
    small: dict[str, Any] = {}
    for name in fields & set(SHRINK):
        value = default.get(name)
        if isinstance(value, int) and value:
            small[name] = min(value, SHRINK[name]) if name in AT_MOST else SHRINK[name]
    if default.get("num_key_value_heads") == default.get("num_attention_heads") and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]
    for name in ("num_experts_per_tok", "moe_topk"):
        if default.get(name) == 1:  # Llama-4 is a model of one expert per token
            small[name] = 1
    small |= {name: 0 for name in fields if name.endswith("_token_id")}
    per_layer = {k: list(v) for k, v in default.items() if isinstance(v, list | tuple) and len(v) == _depth(default)}
    depth = _enough_layers(per_layer | override)
    small |= {name: depth for name in ("num_hidden_layers", "num_layers") if name in fields and default.get(name)}
    small |= {name: value[:depth] for name, value in per_layer.items()}
    return small | override


def _enough_layers(per_layer: dict[str, Any]) -> int:
    """Layers until every combination of layer types has occurred, at least three."""
    lists = [v for v in per_layer.values() if isinstance(v, list) and all(isinstance(x, str) for x in v)]
    if not lists:
        return LAYERS
    kinds = list(zip(*lists, strict=False))
    return min(len(kinds), max(3, *(kinds.index(kind) + 1 for kind in set(kinds))))


def _wrapped(family: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a model with this text config: as it is, or inside the multimodal config that holds it."""
    kind = text_config_class(family)
    if kind.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or kind.model_type.replace("-", "_") == family:
        return {"model_type": kind.model_type, **fields}
    holder: Any = kind
    values = fields
    while True:
        above = [(c, k) for c in _config_classes(family) for k, sub in _parts(c) if sub is holder]
        if not above:
            return {"model_type": holder.model_type, **values}
        holder, key = above[0]
        values = {key: values}


def _parts(kind: type[PreTrainedConfig]) -> Iterator[tuple[str, Any]]:
    yield from {**getattr(kind, "sub_configs", {}), **getattr(kind, "sub_configs_defaults", {})}.items()


def profile(family: str) -> ModelProfile:
    """A profile as a user would write it: the small model's config.json and nothing else."""
    config = _wrapped(family, small_fields(family))
    return ModelProfile(name=family, hf_id=family, description="census", sources={}, config=config)


def traces(family: str, phase: Phase) -> bool:
    """Whether the family's phase is expected to trace."""
    return phase not in EXCEPTIONS.get(family, ("", "", ""))[0].split()


@functools.cache
def table(family: str, phase: Phase) -> OpTable:
    """The op table of the family's small model."""
    return trace(profile(family), phase)


@functools.cache
def model(family: str) -> nn.Module:
    """The small model on meta, for its modules and parameters."""
    return build(hf_config(profile(family)))


def runs(family: str, path: str) -> int:
    """How often a step runs the module at ``path`` of a decoder layer: some families loop over a few layers, and hand
    messages from each pass to the next."""
    config: Any = model(family).config
    layer = next((int(word) for word in path.split(".") if word.isdigit()), -1)
    looped = range(getattr(config, "loop_layer_index_start", 0), getattr(config, "loop_layer_index_end", 0))
    return int(config.loop_num_passes) - ("_message_gate." in path) if layer in looped else 1


def experts_modules(family: str) -> Iterator[tuple[str, nn.Module]]:
    """Routed experts of the text path: modules of an experts class that hold weights stacked by expert."""
    for path, module in model(family).named_modules():
        stacked = any(weight.dim() == 3 for weight in module.parameters(recurse=False))
        if stacked and type(module).__name__.endswith("Experts") and not re.search("shared|vision", path):
            yield path, module


EXPERTS = "n_routed_experts num_local_experts num_experts moe_num_experts".split()
CHOSEN = "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts moe_top_k".split()
WIDTH = "moe_intermediate_size expert_ffn_hidden_size intermediate_size ffn_hidden_size".split()
HIDDEN = "moe_hidden_size hidden_size d_model".split()


def said(family: str) -> tuple[int, int, int, int]:
    """What the small config says of a MoE layer: experts, chosen per token, intermediate width, hidden width."""
    fields = small_fields(family)
    fields |= fields.get("ffn_config") or {}  # DBRX

    def first(names: list[str]) -> int:
        value = next(fields[name] for name in names if fields.get(name))
        return int(value[0] if isinstance(value, list) else value)

    return first(EXPERTS), first(CHOSEN), first(WIDTH), first(HIDDEN)


def _default(family: str, names: list[str]) -> str:
    whole = text_config_class(family)()
    config = getattr(whole, "ffn_config", whole)  # DBRX
    values = _values(config, {f.name for f in dataclasses.fields(type(config))})
    return next((str(values[name]) for name in names if values.get(name)), "–")


OTHER_MIXERS = {"linear_attention": "linear", "ssm_scan": "SSM", "causal_conv1d": "conv", "convolution": "conv"}


def attention_kinds(family: str) -> list[str]:
    """Kinds of token mixing in the decode table, by the arguments of its ops."""
    found: set[str] = set()
    for op in table(family, "decode").ops:
        if op.name == "attention":
            span = "sliding" if op.attrs["window"] else "chunked" if op.attrs["chunk"] else "full"
            span = "sparse" if op.attrs["selected"] else "compressed" if op.attrs.get("compress") else span
            found.add(f"{span} MLA" if op.attrs["latent"] else span)
        elif op.name in OTHER_MIXERS:
            found.add(OTHER_MIXERS[op.name])
    types = getattr(hf_config(profile(family)), "layer_types", None) or ()
    return sorted(found | {"linear" for kind in types if kind == "linear_attention" and "SSM" not in found})


def _steps(family: str, phase: Phase) -> str:
    """Ops of one step of the small model, as traced and as vLLM's fusions leave them."""
    if not traces(family, phase):
        return "see below"
    raw = table(family, phase)
    fused = fuse(raw, load_engine("vllm").fusions)
    return " → ".join(str(sum(t.count(op) for op in t.ops)) for t in (raw, fused))


def _row(family: str) -> str:
    path, experts = next(experts_modules(family))
    up = getattr(experts, "gate_up_proj", None)
    first = experts.up_proj if up is None else up
    assert isinstance(first, nn.Parameter)
    layer = re.sub(r"(\.\d+\.).*", r"\1", path)
    names = [name.rpartition(".")[2] for name, _ in model(family).named_modules() if name.startswith(layer)]
    shared = [name for name in names if "shared" in name]
    cells = [
        family,
        f"`{text_config_class(family).model_type}`",
        type(experts).__name__,
        _default(family, EXPERTS),
        _default(family, CHOSEN),
        "no" if up is None else "yes",
        "yes" if any("bias" in name for name, _ in experts.named_parameters(recurse=False)) else "no",
        "in × out" if first.shape[1] == said(family)[3] else "out × in",
        "gated" if any("gate" in name for name in shared) else "yes" if shared else "no",
        ", ".join(attention_kinds(family)),
        str(len(table(family, "decode").layer_kinds)),
        *(_steps(family, phase) for phase in PHASES),
    ]
    return "| " + " | ".join(cells) + " |"


def page() -> str:
    """The text of ``docs/families.md``."""
    passing = [f for f in families() if traces(f, "decode")]
    both = [f for f in passing if traces(f, "prefill")]
    heads = "family, model_type, experts, E, k, gated, bias, weights, shared expert, attention, layers, prefill, decode"
    columns = heads.split(", ")
    lines = [
        "# MoE families of transformers",
        "",
        f"Generated by `{COMMAND}`; do not edit.",
        f"transformers {transformers.__version__}, {datetime.date.today().isoformat()}.",
        "",
        f"Of the {len(families())} model folders with a class of experts, {len(both)} trace in prefill and decode"
        f" and {len(passing) - len(both)} in decode",
        "only. Each is traced as a small text model made from its config class's defaults (`tests/census.py`). Shapes",
        "of every MoE layer, FLOPs of experts and linears, and all parameters are checked against the config and the",
        "model's own parameters (`tests/test_census.py`).",
        "",
        "`E` and `k` (experts, chosen per token) are the config class's defaults (– where it has none). *weights* is",
        "the order in which an expert's matrices are stored; every family stacks them in one tensor per projection.",
        "*prefill* and *decode* are the ops of one step of the small model, which has as many *layers*: as traced →",
        "with the fusions of `profiles/engines/vllm.yaml`.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + " --- |" * len(columns),
        *(_row(family) for family in passing),
        "",
        "## What does not trace",
        "",
        "| family | phase | reason |",
        "| --- | --- | --- |",
        *(f"| {f} | {phases.replace(' ', ', ')} | {why} |" for f, (phases, _, why) in EXCEPTIONS.items()),
        "",
        *rewriting.section({family: profile(family) for family in families()}),
        "## Known limits",
        "",
        "- Identity experts (LongCat-Flash's `zero_expert_num`) take their share of the choices and cost nothing.",
        "- Vision experts (ERNIE-4.5-VL) hold parameters but are on no text token's path: not counted as MoE layers.",
        "- Unlimited-OCR's window over decoded tokens (beside all prefilled ones) is read as full attention.",
        "- Talker and code predictor of Qwen3-Omni are not traced; its thinker's text model is.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, required=True, metavar="FILE", help="where the page goes")
    file: Path = parser.parse_args().write
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
