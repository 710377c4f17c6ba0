"""DeepSeek-V4.1-Flash as it is described: against a network told token by token, counts by hand, engines' records."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from parameter_formula import parameters
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from tensorcast.cost.formulas import Context, work_of
from tensorcast.cost.memory import cache_bytes, cache_entries, kv_bytes_per_token, weights_of_stages
from tensorcast.cost.stages import layers_of
from tensorcast.modeling.checkpoint.read import from_config
from tensorcast.modeling.config import hf_config
from tensorcast.modeling.described.csa2 import turned
from tensorcast.modeling.described.model import DescribedLM
from tensorcast.profiles.model import ModelProfile
from tensorcast.profiles.store import load_model
from tensorcast.trace.cache import traced
from tensorcast.trace.dims import Sizes
from tensorcast.trace.precision import by_precision
from tensorcast.trace.table import EVERY_TOKEN, Op, OpTable
from tensorcast.trace.tracer import Phase

NAME = "deepseek-v4.1-flash"
SMALL: dict[str, Any] = {
    "model_type": "deepseek_v41_text", "vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 7,
    "num_attention_heads": 4, "head_dim": 12, "q_lora_rank": 20, "qk_rope_head_dim": 4, "sliding_window": 5,
    "o_groups": 2, "o_lora_rank": 6, "compress_ratios": [0, 2, 2, 1, 1, 1, 1], "kv_source_layer_ids": [1, 3],
    "index_source_layer_ids": [1, 3, 5], "index_n_heads": 12, "index_head_dim": 8, "index_topk": 3,
    "candidate_source_layer_id": 3, "candidate_topk_blocks": 3, "candidate_block_size": 2, "hc_mult": 4,
    "hc_sinkhorn_iters": 3, "engram_layer_ids": [2], "engram_num_embeddings": [61], "engram_max_ngram_size": 3,
    "engram_n_heads": 2, "engram_head_dim": 8, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 16, "norm_topk_prob": True, "tie_word_embeddings": False,
}  # fmt: skip


def small() -> DescribedLM:
    """The shipped description of a small file, with random weights."""
    shipped = load_model(NAME)
    profile = ModelProfile(name="x", config=SMALL, network=shipped.network)
    model = DescribedLM(hf_config(profile)).eval()  # type: ignore[arg-type]
    torch.manual_seed(11)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    return model


def normed(x: Tensor, weight: Tensor | None = None) -> Tensor:
    found = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return found if weight is None else weight * found


def angle(at: int) -> tuple[Tensor, Tensor]:
    rates = 1e4 ** -(torch.arange(0, 4, 2).float() / 4)
    turns = (at * rates).repeat(2)[None, None]
    return turns.cos(), turns.sin()


def told(model: DescribedLM, ids: Tensor) -> Tensor:
    """Logits ``[S,V]`` of one sequence: token after token, layer after layer, in the order of vLLM 0.33.0
    (models/deepseek_v41/nvidia/model.py): a part reads what the mix of the part before made of the streams."""
    layers: Any = model.model.layers
    entries: dict[int, list[Tensor]] = {}
    rows: dict[tuple[str, int], list[Tensor]] = {}
    logits = []
    for at, token in enumerate(ids.tolist()):
        streams = model.model.embed_tokens.weight[token].repeat(4, 1)
        read = torch.tensor([1.0, 0.0, 0.0, 0.0])
        picked: set[int] = set()
        blocks: set[int] = set()
        source = -1
        for i, layer in enumerate(layers):
            if layer.ngrams is not None:
                places = layer.ngrams.places(ids[None, : at + 1], None)[:, -1:]
                streams = layer.ngrams(streams[None, None], places)[0, 0]
            then, shares, among = (t[0, 0] for t in layer.attention_mix(streams[None, None]))
            hidden = normed((read[:, None] * streams).sum(0), layer.input_layernorm.weight)
            part, ratio = layer.self_attn, SMALL["compress_ratios"][i]
            low = normed(part.q_a_proj(hidden), part.q_a_layernorm.weight)
            q = turned(part.q_b_proj(low).view(1, 1, 4, 12), angle(at))[0, 0]
            key = turned(normed(part.kv_proj(hidden), part.kv_norm.weight)[None, None], angle(at))[0, 0]
            rows.setdefault(("window", i), []).append(key)
            if i in SMALL["kv_source_layer_ids"]:
                source = i
                rows.setdefault(("values", i), []).append(part.compressor.kv_proj(hidden))
                if ratio > 1:
                    rows.setdefault(("gates", i), []).append(part.compressor.gate_proj(hidden))
                if (at + 1) % ratio == 0:
                    value = rows["values", i][-1]
                    if ratio > 1:
                        weights = torch.stack(rows["gates", i][-ratio:]).softmax(0)
                        value = (weights * torch.stack(rows["values", i][-ratio:])).sum(0)
                    latent = normed(value, part.compressor.norm.weight)
                    first = angle(at + 1 - ratio)
                    entries.setdefault(i, []).append(turned(latent[None, None], first)[0, 0])
                    own = normed(part.indexer.k_proj(latent), part.indexer.k_norm.weight)
                    rows.setdefault(("keys", i), []).append(turned(own[None, None], first)[0, 0])
            if i in SMALL["index_source_layer_ids"]:
                ask = turned(part.indexer.q_b_proj(low).view(1, 1, 12, 8), angle(at))[0, 0]
                weights = part.indexer.weights_proj(hidden)
                scores = [float((weights * (ask @ k).relu()).sum()) for k in rows.get(("keys", source), [])]
                allowed = set(range(len(scores)))
                if i == SMALL["candidate_source_layer_id"]:
                    best = {n: max(scores[2 * n : 2 * n + 2]) for n in range(-(-len(scores) // 2))}
                    best[(len(scores) - 1) // 2] = float("inf")
                    blocks = set(sorted(best, key=lambda n: -best[n])[:3])
                elif i > SMALL["candidate_source_layer_id"]:
                    allowed = {n for n in allowed if n // 2 in blocks}
                picked = set(sorted(allowed, key=lambda n: -scores[n])[:3])
            seen = rows["window", i][-5:] + ([entries[source][n] for n in sorted(picked)] if ratio else [])
            scores_ = torch.stack(seen) @ q.T * 12**-0.5
            weights = torch.cat((scores_, part.sinks[None])).softmax(0)[:-1]
            out = turned((weights.T @ torch.stack(seen))[None, None], angle(at), back=True)[0, 0]
            narrow = [part.o_a_proj.weight[6 * g : 6 * g + 6] @ out[2 * g : 2 * g + 2].flatten() for g in range(2)]
            streams = shares[:, None] * part.o_b_proj(torch.cat(narrow)) + among.T @ streams
            read, shares, among = (t[0, 0] for t in layer.mlp_mix(streams[None, None]))
            hidden = normed((then[:, None] * streams).sum(0), layer.post_attention_layernorm.weight)
            streams = shares[:, None] * layer.mlp(hidden[None, None])[0, 0] + among.T @ streams
        last = normed((read[:, None] * streams).sum(0), model.model.norm.weight)
        logits.append(model.lm_head(last))
    return torch.stack(logits)


def test_the_network_is_the_one_told_token_by_token() -> None:
    """All at once, and in three steps after what is kept: windows, entries half made, choices among blocks."""
    model, ids = small(), torch.randint(0, 96, (2, 23), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = torch.stack([told(model, one) for one in ids])
        torch.testing.assert_close(model(ids), expected, rtol=1e-3, atol=1e-3)
        cache, found = DynamicCache(config=model.config), []
        for first, last in ((0, 12), (12, 13), (13, 23)):
            found.append(model(ids[:, first:last], torch.arange(first, last)[None], past_key_values=cache))
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-3, atol=1e-3)


def flash(phase: Phase, tp: int = 1) -> OpTable:
    return traced(load_model(NAME), phase, tp)


def test_the_model_holds_what_is_published() -> None:
    """748.5 B parameters by hand to the last one. Published are 763 B: beside these three blocks that draft, each of
    128 experts and an attention, and an encoder (not_built). 16 B run for a token of a reply, 8 B for one of a prompt,
    whose tokens but the last pass 20 of 40 layers (docs.oxen.ai), the embedding not counted."""
    shipped, table = load_model(NAME), flash("decode")
    assert table.total_params() == parameters(shipped.config) == 748_494_654_064
    assert shipped.total_params is not None
    expert, attention = 3 * 5120 * 2304, 5120 * (1280 + 512) + 1280 * 32768 + 8192 * (4096 + 5120)
    drafts = 3 * (129 * expert + attention) + 3 * 5120 * 5120 + 2 * 256 * 129_280
    assert abs(drafts + 0.42e9 - shipped.total_params.not_built) < 0.2e9
    assert abs(table.total_params() + drafts + 0.42e9 - 763e9) < 0.6e9
    assert abs(table.active_params(with_embedding=False) - 16e9) < 0.5e9
    last = sum(
        p.full_numel * (6 / 384 if p.role == "experts" else 1) * sum(kind == p.kind for kind in table.layer_kinds[20:])
        for p in table.params
    )
    assert abs(table.active_params(with_embedding=False, with_head=False) - last - 8e9) < 0.5e9
    tables = sum(p.full_numel for p in table.params if p.role == "tables")
    assert tables == 256 * (384_006_168 + 384_016_682)


@pytest.mark.parametrize("tp", [1, 4])
def test_sequences_keep_what_engines_allocate(tp: int) -> None:
    """Records of vLLM 0.33.0 off SM100 (models/deepseek_v41/attention.py, swa_bytes_per_token and
    _indexer_k_cache_head_dim): 584 bytes of a vector, 132 of a key; three layers keep one of each for two tokens, one
    for each token, on every rank alike; all 40 a window of 128; two fp32 vectors of 512 for each of two tokens."""
    table = flash("decode", tp)
    assert kv_bytes_per_token(table, "fp8") == 40 * 584 + 3 * (584 + 132) / 2 + 584 + 132
    kept = 1000 * (3 * (584 + 132) / 2 + 584 + 132) + 40 * 128 * 584 + 3 * 2 * 2 * 512 * 4
    assert cache_bytes(table, "fp8", 3.0, 1000.0) == pytest.approx(3 * kept)
    assert {entry.kind for entry in cache_entries(table, "fp8") if not entry.limit} == {2, 4, 5}


KINDS = ("0", "1", "2,8", "3-7,9-13,15-19", "14", "20", "21..39 x15", "24-36:4")


def products(table: OpTable, kind: int, *, every: bool = False) -> float:
    """FLOPs of one token's products with weights in a layer of this kind, those of routed experts apart."""
    new = 1.0 if table.phase == "decode" else 64.0
    at = Context(Sizes(B=64.0 / new, S=new, P=0.0), decode=table.phase == "decode")
    rows = [op for op in table.ops if op.kind == kind and (op.name == "mm" or (op.name == "bmm" and op.weights))]
    return sum(
        float(work.flops) / 64 for op in rows if (EVERY_TOKEN in op.module) == every for work in work_of(op, at)
    )


def test_every_kind_of_layer_multiplies_what_its_weights_say() -> None:
    """By hand, two FLOPs a weight: what all have; entries and their keys; indexers; rows of tables."""
    prefill, decode = flash("prefill"), flash("decode")
    assert prefill.kind_names == decode.kind_names == KINDS
    own = 5120 * (1280 + 512) + 1280 * 32768 + 8192 * (4096 + 5120)
    own += 2 * 24 * 4 * 5120 + 384 * 5120 + 3 * 5120 * 2304
    pairs, single, keys = 2 * 5120 * 512, 5120 * 512, 512 * 128
    index, tables = 32 * (128 * 1280 + 5120), 24 * 256 * 5 * 5120
    expected = [
        own, own + tables, own + pairs + keys + index, own, own + tables + pairs + keys + index,
        own + single + keys + index, own, own + index,
    ]  # fmt: skip
    for kind, weights in enumerate(expected):
        assert products(decode, kind) == 2 * weights, KINDS[kind]
        there = weights - (single + keys if kind == 5 else 0)  # made of every token, with what reads the cache's
        assert products(prefill, kind) == 2 * there
    made = 24 * 4 * 5120 + 5120 * (1280 + 512) + single + keys
    assert products(prefill, 5, every=True) == 2 * made
    assert not any(products(prefill, kind, every=True) for kind in range(8) if kind != 5)


def rows(phase: Phase, name: str) -> dict[int, Op]:
    return {op.kind: op for op in flash(phase).ops if op.name == name}


@pytest.mark.parametrize(("kind", "ratio"), [(0, 0), (2, 2), (3, 2), (4, 2), (5, 1), (6, 1), (7, 1)])
@pytest.mark.parametrize(("new", "past"), [(1, 4000), (700, 300), (128, 60_000)])
def test_queries_see_their_window_and_512_entries(kind: int, ratio: int, new: int, past: int) -> None:
    """A query and a vector of 512 numbers, key and value at once, for each of 64 heads: 2048 FLOPs."""
    op = rows("decode" if new == 1 else "prefill", "attention")[kind]
    at = Context(Sizes(B=3.0, S=float(new), P=float(past)), decode=new == 1)
    pairs = sum(
        min(p + 1, 128) + (min((p + 1) / ratio, 512) if ratio else 0) for p in range(past, past + new)
    )  # fmt: skip
    found = sum(float(work.flops) for work in work_of(op, at))
    assert found == pytest.approx(3 * 64 * 2048 * pairs, rel=1e-6 if not ratio else 2e-3)


def test_indexers_behind_the_first_choose_among_blocks() -> None:
    """2048 blocks of 8 entries: 16,384 entries are scored where an engine scores no others, else all."""
    found = rows("decode", "sparse_indexer")
    assert sorted(found) == [2, 4, 5, 7]
    assert [found[kind].attrs.get("within", 0) for kind in sorted(found)] == [0, 0, 0, 2048 * 8]
    at = Context(Sizes(B=1.0, S=1.0, P=99_999.0), decode=True)
    flops = {kind: float(work_of(op, at)[0].flops) for kind, op in found.items()}
    assert flops[2] == 2 * 50_000 * 32 * 128 and flops[5] == 2 * 100_000 * 32 * 128
    assert flops[7] == 2 * 16_384 * 32 * 128


def test_weights_are_stored_as_the_file_says() -> None:
    """Experts in MXFP4, matrices in MXFP8 (a scale for 32 x 32, which engines spread over rows); entries' projections,
    weights of indexers and of streams as they are; rows of tables with an exponent for 32 numbers, or none on a GPU."""
    profile = load_model(NAME)
    found = from_config(profile.config)
    assert found.describe() == "linear=mxfp8,experts=mxfp4,kv=fp8"
    table = by_precision(flash("decode"), found)
    whole, bare = (
        float(weights_of_stages(
            table, found, 1, 1, layers=layers_of(table.layer_kinds, [slice(None)]), ends=np.ones((2, 1)),
            local_experts=None, padding=(1, 1), tables=share,
        )[0]) for share in (1.0, 0.0)
    )  # fmt: skip
    assert whole - bare == 256 * (384_006_168 + 384_016_682) * 33 / 32
    expert = 3 * 5120 * 2304
    matrices = 40 * (5120 * (1280 + 512) + 1280 * 32768 + 8192 * (4096 + 5120) + expert)
    matrices += 8 * 32 * 128 * 1280 + 2 * 24 * 256 * 5 * 5120
    experts = 40 * 384 * expert
    rest = table.total_params() - experts - matrices - 256 * (384_006_168 + 384_016_682)
    assert bare == pytest.approx(experts * 17 / 32 + matrices * 33 / 32 + 2 * rest, rel=1e-6)
