"""What drafts tokens: sizes of published heads, rows counted by hand, acceptance from published tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensorcast as tc
from tensorcast.deploy.deployment import Deployment, deploy
from tensorcast.deploy.engine_limits import engine_can_run
from tensorcast.deploy.layout import parse_layout
from tensorcast.deploy.options import DRAFTING, Options
from tensorcast.deploy.plan.plan import Collective
from tensorcast.deploy.step.drafter import Drafter, draft_sizes
from tensorcast.errors import InputError
from tensorcast.launch.launch import launch
from tensorcast.profiles.drafting import acceptance, acceptances, published
from tensorcast.profiles.store import load_device, load_engine, load_model

H200, VLLM = load_device("h200"), load_engine("vllm")

EAGLE3_LLAMA = {  # config.json of yuhuili/EAGLE3-LLaMA3.1-Instruct-8B, 0.42 billion numbers (850 MB in bf16)
    "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 1,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "draft_vocab_size": 32000, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip


def deployed(method: str, layout: str = "tp1", model: str = "llama-3.1-8b", **more: Any) -> Deployment:
    options = Options(mtp_depth=more.pop("depth", 3), speculative_method=method, **more)
    return deploy(load_model(model), H200, VLLM, parse_layout(layout), "decode", options=options)


def drafter_of(deployment: Deployment) -> Drafter:
    assert deployment.step.drafter is not None
    return deployment.step.drafter


def test_an_eagle3_head_is_as_large_as_the_published_one(tmp_path: Path) -> None:
    """fc 3H*H, QKV of 2H, O, the MLP and 32,000 logits; the embedding is the model's. By hand, and unasked the same."""
    (tmp_path / "config.json").write_text(json.dumps(EAGLE3_LLAMA))
    by_hand = 3 * 4096**2 + 8192 * (4096 + 2 * 1024) + 4096**2 + 3 * 4096 * 14336 + 4096 * 32000
    assert by_hand == pytest.approx(0.425e9, rel=0.01)
    read = drafter_of(deployed("eagle3", draft_model=str(tmp_path)))
    assumed = drafter_of(deployed("eagle3"))
    # the layer's QKV reads the embedding beside the hidden state: another H, counted once more
    assert read.weight_bytes == assumed.weight_bytes == 2 * by_hand
    assert read.sizes is not None and not read.sizes.assumed and assumed.sizes is not None and assumed.sizes.assumed
    assert read.cache_numbers == 2 * 8 * 128


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_an_eagle3_heads_matmuls_by_hand(tp: int) -> None:
    """FLOPs of a step of 8 sequences and 3 drafts: fc and one layer on 4 checked tokens each, two more layers and three
    heads on one; the cut divides all but fc."""
    run = deployed("eagle3", f"tp{tp}")
    price = run.step.price(8.0, 1.0, 1000.0)
    found = sum(
        float(row.flops) * count for row, count in price.calls
        if row.row.module.startswith("draft.") and getattr(row.row, "name", "") == "mm"
    )
    h, q, kv, wide, vocab = 4096, 4096 // tp, 1024 // tp, 14336 // tp, 32000 // tp
    layer = 2 * h * (q + 2 * kv) + q * h + 3 * h * wide
    assert found == 2.0 * (8 * 4 * (3 * h * h + layer) + 2 * 8 * layer + 3 * 8 * h * vocab)
    sums = [row.row for row, _ in price.calls if isinstance(row.row, Collective) and row.row.module == "draft"]
    assert bool(sums) == (tp > 1)


def test_a_block_drafts_in_one_pass() -> None:
    """DFlash: five layers once over the block, whatever its length; keys and values of the context come from fc."""
    found = drafter_of(deployed("dflash", model="qwen3-8b"))
    assert found.sizes == draft_sizes("dflash", load_model("qwen3-8b"), None)
    h, layers = 4096, 5
    layer = h * (4096 + 2 * 1024) + 4096 * h + 3 * h * 12288
    assert found.weight_bytes == 2 * (layers * layer + layers * h * h)  # embedding and head are the model's
    assert found.layer_passes(3) == found.layer_passes(15) == layers and found.layer_passes(0) == 0
    assert not found.again and not found.heads
    spark = drafter_of(deployed("dspark", model="qwen3-8b"))
    assert spark.weight_bytes - found.weight_bytes == 2 * 256 * 2 * 151936  # V x r and r x V
    assert [row.module for row, _ in spark.heads] == ["draft.markov_w1", "draft.markov_w2"]


def test_a_look_up_costs_nothing_on_the_gpu() -> None:
    """An n-gram step is the step that checks as many tokens, and no weight or cache more."""
    looked_up, plain = deployed("ngram"), deployed("mtp", depth=0)
    assert looked_up.stages.weights[0] == plain.stages.weights[0]
    assert looked_up.held(8.0, 4096) == plain.held(8.0, 4096)
    price, checked = (run.step.price(8.0, 1.0, 4096.0) for run in (looked_up, plain))
    assert not any(row.row.module.startswith("draft") for row, _ in price.calls)
    matmuls = [sum(float(row.flops) * n for row, n in one.calls if row.family == "gemm") for one in (price, checked)]
    assert matmuls[0] == pytest.approx(4 * matmuls[1])


def test_a_small_model_drafts() -> None:
    """Qwen3-0.6B's own 596 million parameters and cache, beside those of Qwen3-8B."""
    run = deployed("draft_model", model="qwen3-8b", draft_model="qwen3-0.6b")
    assert drafter_of(run).weight_bytes / 2 == pytest.approx(596e6, rel=1e-3)
    held = [one.held(4.0, 1000)[1] for one in (run, deployed("mtp", model="qwen3-8b", depth=0))]
    assert held[0] - held[1] == 4 * 1000 * 28 * 2 * 8 * 128 * 2
    passes = [count for row, count in run.step.price(4.0, 1.0, 1000.0).calls if row.row.module == "draft.o_proj"]
    assert passes == [28, 2 * 28]


@pytest.mark.parametrize("method", DRAFTING)
def test_arrays_of_batches_are_priced_as_numbers(method: str) -> None:
    more = {"draft_model": "qwen3-0.6b"} if method == "draft_model" else {}
    step = deployed(method, "tp2", "qwen3-next-80b-a3b", depth=2, **more).step
    batches = np.array([1.0, 7.0, 64.0])
    together = np.asarray(step.seconds(batches, 1.0, 500.0))
    assert together == pytest.approx([float(np.asarray(step.seconds(b, 1.0, 500.0))) for b in batches], rel=1e-12)


def test_a_comparison_drafts_by_a_head() -> None:
    """A model without layers of its own: depths are searched, and the best by latency at one user drafts."""
    found = tc.compare(
        "qwen3-8b", device="h200", world_size=1, input_len=512, output_len=256, objective="latency",
        mtp_depth=[0, 3], mtp_acceptance="gsm8k", speculative_method="dflash", modes=["aggregated"],
    )
    assert set(found.candidates["mtp_depth"]) == {0, 3} and found.best is not None and found.best["mtp_depth"] == 3
    assert any(note.startswith("dflash: published: 5 of 16 tokens (gsm8k") for note in found.notes)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"speculative_method": "medusa"}, "speculative_method 'medusa': must be one of mtp, eagle3"),
        ({"speculative_method": "draft_model"}, "speculative_method draft_model: which one?"),
        ({"draft_model": "qwen3-0.6b", "speculative_method": "ngram"}, "draft_model qwen3-0.6b: ngram has none"),
        ({"draft_model": "no-such", "speculative_method": "eagle3"}, "unknown model 'no-such'"),
    ],
)
def test_what_cannot_draft(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as raised:
        tc.simulate("qwen3-8b", device="h200", mtp_depth=2, **given)
    assert str(raised.value).startswith(says)


@pytest.mark.parametrize(
    ("engine", "layout", "method", "says"),
    [
        ("sglang", "tp2-pp2", "eagle3", "drafts in a pipeline"),
        ("sglang", "tp2-dp4-ep8", "ngram", "what drafts: ngram does not draft under attention DP (dp = 4)"),
        ("sglang", "tp8-ep8", "eagle3", ""),
        ("sglang", "tp8-ep8", "dspark", "DSpark drafts: this release has no dspark"),
        ("vllm", "tp8-ep8", "dspark", "DSpark drafts: this release has no dspark"),
        ("trtllm", "tp8-ep8", "dflash", "what drafts: no dflash"),
        ("trtllm", "tp8-ep8", "eagle3", ""),
    ],
)
def test_limits_of_engines(engine: str, layout: str, method: str, says: str) -> None:
    facts, options = load_model("deepseek-v3").stated_facts, Options(mtp_depth=3, speculative_method=method)
    assert engine_can_run(engine, parse_layout(layout), facts, options).startswith(says)
    lifted = load_engine(engine).lifted_rules
    newest = engine_can_run(engine, parse_layout(layout), facts, options, lifted=lifted)
    if engine == "sglang" and "pp2" in layout:
        assert newest.startswith("what drafts: eagle3 does not draft in a pipeline (pp = 2)")
    if method == "dspark":
        assert newest == ""


@pytest.mark.parametrize(
    ("engine", "method", "words"),
    [
        ("vllm", "eagle3", '{"method": "eagle3", "model": "DRAFT_MODEL", "num_speculative_tokens": 3}'),
        ("vllm", "ngram", '{"method": "ngram", "num_speculative_tokens": 3}'),
        ("sglang", "eagle3", "--speculative-algorithm EAGLE3 --speculative-draft-model-path DRAFT_MODEL "
         "--speculative-num-steps 3 --speculative-eagle-topk 1 --speculative-num-draft-tokens 4"),
        ("sglang", "dflash", "--speculative-algorithm DFLASH --speculative-draft-model-path DRAFT_MODEL "
         "--speculative-num-draft-tokens 4"),
        ("sglang", "dspark", "--speculative-algorithm DSPARK --speculative-draft-model-path DRAFT_MODEL "
         "--speculative-dspark-block-size 3"),
        ("sglang", "ngram", "--speculative-algorithm NGRAM --speculative-eagle-topk 1 "
         "--speculative-num-draft-tokens 4"),
    ],
)  # fmt: skip
def test_commands(engine: str, method: str, words: str) -> None:
    options = Options(mtp_depth=3, speculative_method=method)
    found = launch(
        engine, load_model("qwen3-235b-a22b"), parse_layout("tp8-ep8"), options, batch=8, input_len=100, output_len=10,
        device=H200,
    )
    assert not found.problem and words in found.commands[0].replace(" \\\n  ", " ")
    assert ("DRAFT_MODEL" in " ".join(found.notes)) == (method != "ngram")


def test_chances_give_the_published_lengths() -> None:
    assert len(acceptances()) >= 20
    for row in acceptances():
        assert sum(row.chance**i for i in range(row.drafted + 1)) == pytest.approx(row.length, abs=1e-9)
        assert row.source.startswith("https://") and row.model and row.method in DRAFTING
        load_model(row.model)
    assert acceptance("mixed", "deepseek-v3", "mtp") == pytest.approx(0.875)
    chance = acceptance("coding", "kimi-k2.5", "eagle3")  # 2.88 of 4 tokens
    assert 1 + chance + chance**2 + chance**3 == pytest.approx(2.88)
    assert len({(row.model, row.method, row.task) for row in acceptances()}) == len(acceptances())  # one has its say
    assert [row.task for row in published("qwen3-8b", "dflash")] == ["gsm8k", "mt-bench"]
    with pytest.raises(InputError, match="must be a chance from 0 to 1, or a task of published tables; published: gsm"):
        acceptance("chat", "qwen3-8b", "dflash")
