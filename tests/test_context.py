"""A context cut over ranks: the numbers of the whole attention, bytes counted by hand, engines' rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

import tensorcast as tc
from tensorcast.deploy.deployment import Deployment, deploy
from tensorcast.deploy.engine_limits import engine_can_run
from tensorcast.deploy.layout import broken_context, parse_layout
from tensorcast.deploy.options import Options
from tensorcast.deploy.plan.plan import Collective
from tensorcast.errors import InputError
from tensorcast.launch.launch import launch
from tensorcast.ops.context import (
    context_attention,
    part_of_attention,
    prompt_attention,
    prompt_part,
    weighted,
)
from tensorcast.profiles.store import load_device, load_engine, load_model

H200, VLLM = load_device("h200"), load_engine("vllm")
QWEN, DEEPSEEK, LLAMA = load_model("qwen3-235b-a22b"), load_model("deepseek-v3"), load_model("llama-3.1-70b")


def whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """PyTorch's own, of one new token."""
    found = torch.nn.functional.scaled_dot_product_attention(q.unsqueeze(2), k, v, enable_gqa=True)
    return found.squeeze(2)


def tensors(heads: int, kv_heads: int, tokens: int, seed: int) -> tuple[torch.Tensor, ...]:
    made = torch.Generator().manual_seed(seed)
    shapes = (2, heads, 8), (2, kv_heads, tokens, 8), (2, kv_heads, tokens, 8)
    return tuple(torch.randn(shape, generator=made) for shape in shapes)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 9))
def test_parts_weighed_by_log_sum_exps_are_the_whole(lengths: list[int], seed: int) -> None:
    """Any cut of the tokens, empty parts among them."""
    lengths = [*lengths, 1]
    q, k, v = tensors(4, 2, sum(lengths), seed)
    parts = [part_of_attention(q, a, b) for a, b in zip(k.split(lengths, 2), v.split(lengths, 2), strict=True)]
    sums = torch.stack([one for _, one in parts])
    merged = sum(weighted(part, sums, i).nan_to_num() for i, (part, _) in enumerate(parts))
    assert torch.allclose(torch.as_tensor(merged), whole(q, k, v), atol=1e-5)


def run_rank(rank: int, ranks: int, where: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{where}", rank=rank, world_size=ranks)
    q, k, v = tensors(6, 1, 7, seed=3)
    mine = q.chunk(ranks, dim=1)[rank]
    found = context_attention(mine, k[:, :, rank::ranks], v[:, :, rank::ranks])
    assert torch.allclose(found, whole(q, k, v).chunk(ranks, dim=1)[rank], atol=1e-5)
    for tokens in (12, 13, 3, 1):  # an early and a late part each, also uneven ones and empty ones
        made = torch.Generator().manual_seed(tokens)
        q, k, v = (torch.randn((2, heads, tokens, 8), generator=made) for heads in (6, 2, 2))
        mine = prompt_part(tokens, rank, ranks)
        found = prompt_attention(q[:, :, mine], k[:, :, mine], v[:, :, mine], tokens)
        prompt = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        assert torch.allclose(found, prompt[:, :, mine], atol=1e-5)
    dist.destroy_process_group()


@given(st.integers(1, 200), st.integers(1, 8))
def test_parts_of_a_prompt_are_all_of_it_and_as_much_work(tokens: int, ranks: int) -> None:
    parts = [prompt_part(tokens, rank, ranks) for rank in range(ranks)]
    assert sorted(torch.cat(parts).tolist()) == list(range(tokens))
    pairs = [int((part + 1).sum()) for part in parts]
    assert max(pairs) - min(pairs) <= tokens * 2
    if tokens % (2 * ranks) == 0:
        assert len({*pairs}) == 1 == len({len(part) for part in parts})


def test_gloo_ranks_attend_as_one(tmp_path: Path) -> None:
    """Two processes: in decode each with its heads and every other token, of a prompt with its parts."""
    mp.start_processes(run_rank, (2, str(tmp_path / "meet")), nprocs=2, start_method="fork")


def deployed(model: Any, layout: str, dcp: int, phase: str = "decode") -> Deployment:
    return deploy(model, H200, VLLM, parse_layout(layout), phase, options=Options(dcp=dcp))


@pytest.mark.parametrize(
    ("model", "dcp", "heads", "query", "value"),
    [(QWEN, 2, 64 // 8, 128, 128), (DEEPSEEK, 8, 128 // 8, 512 + 64, 512)], ids=["gqa", "latent"],
)
def test_bytes_by_hand(model: Any, dcp: int, heads: int, query: int, value: int) -> None:
    """Per token: queries and results of all heads of the group in bf16, a log-sum-exp of each rank and head in fp32;
    the attention does the FLOPs that it did, over a part of the cache, of which a rank holds as much less."""
    cut, plain = (deployed(model, "tp8-ep8", n) for n in (dcp, 1))
    moved = {row.label: row for row in cut.step.plan.rows if isinstance(row, Collective) and row.group == "dcp"}
    assert {label: row.scale for label, row in moved.items()} == {
        "queries": 2 * dcp * heads * query, "log-sum-exps": 4 * dcp * dcp * heads,
        "parts of a context": 2 * dcp * heads * value,
    }  # fmt: skip
    prices = [
        next(p for p in one.step.price(8.0, 1.0, 8192.0 * dcp - 1.0).rows if getattr(p.row, "name", "") == "attention")
        for one in (cut, plain)
    ]
    assert float(prices[0].flops) == pytest.approx(float(prices[1].flops), rel=2e-3)
    held = [one.held(8.0, 8192)[1] for one in (cut, plain)]
    assert held[0] == held[1] / dcp and cut.largest_batch(1, 8192) > plain.largest_batch(1, 8192)
    prompts = [deployed(model, "tp8-ep8", n, "prefill") for n in (dcp, 1)]
    assert prompts[0].step.seconds(1.0, 2048.0, 0.0) == prompts[1].step.seconds(1.0, 2048.0, 0.0)
    assert prompts[0].held(8.0, 8192)[1] == prompts[1].held(8.0, 8192)[1] / dcp


def test_what_is_left_whole_has_todays_numbers() -> None:
    plain = deploy(QWEN, H200, VLLM, parse_layout("tp8-ep8"), "decode").step
    assert deployed(QWEN, "tp8-ep8", 1).step.plan.rows == plain.plan.rows


@pytest.mark.parametrize(
    ("model", "layout", "dcp", "says"),
    [
        (QWEN, "tp8", 2, ""),
        (QWEN, "tp8", 4, "--dcp 4: tp = 8 has 2 ranks for each of 4 KV heads; it must not be more"),
        (QWEN, "tp2-dp4", 2, "--dcp 2: tp = 2 has 1 ranks for each of 4 KV heads; it must not be more"),
        (QWEN, "tp8", 3, "--dcp 3 does not divide tp = 8"),
        (DEEPSEEK, "tp8", 8, ""),
        (LLAMA, "tp8", 2, "--dcp 2: tp = 8 has 1 ranks for each of 8 KV heads; it must not be more"),
    ],
)
def test_which_ranks_can_share_a_context(model: Any, layout: str, dcp: int, says: str) -> None:
    """vLLM 0.33.0, config/model.py: copies of KV heads, unless the cache holds latents."""
    latent = "kv_lora_rank" in model.config
    assert broken_context(dcp, parse_layout(layout), model.stated_facts, latent=latent) == says
    found = launch("vllm", model, parse_layout(layout), Options(dcp=dcp), batch=4, input_len=100, output_len=10)
    assert found.problem == says and ("--decode-context-parallel-size" in "".join(found.commands)) == (not says)


def test_engines_that_cut_contexts() -> None:
    facts, layout, options = QWEN.stated_facts, parse_layout("tp8-ep8"), Options(dcp=2)
    for engine, can in {"vllm": True, "vllm==0.24.0": True, "sglang": True, "sglang==0.5.14": False}.items():
        profile = load_engine(engine)
        assert (engine_can_run(profile.name, layout, facts, options, lifted=profile.lifted_rules) == "") == can
    found = launch("sglang", QWEN, layout, options, batch=4, input_len=100, output_len=10, device=H200)
    assert "--dcp-size 2" in found.commands[0] and "--dcp-comm-backend ag_rs" in found.commands[0]
    refused = launch("trtllm", QWEN, layout, options, batch=4, input_len=100, output_len=10).problem
    assert refused.startswith("decode context parallelism: ")
    with pytest.raises(tc.InputError, match=r"dcp 2: .* picks or slides over tokens"):
        tc.simulate("gpt-oss-120b", device="h200", world_size=16, tp=16, dcp=2)


def test_the_search_cuts_contexts_where_asked() -> None:
    """Long prompts of few users on one node: tp8 holds more sequences with its four KV heads' copies put to use."""
    found = tc.compare(
        "qwen3-235b-a22b", device="h200", world_size=8, input_len=30000, output_len=500, dcp=[1, 2],
        layouts=["tp8-ep8", "tp4-pp2"], modes=["aggregated"],
    )
    whole_node = found.candidates[found.candidates["layout"] == "tp8-dp1-ep8"]
    by_dcp = {n: frame["batch"].max() for n, frame in whole_node.groupby("dcp")}
    assert set(by_dcp) == {1, 2} and by_dcp[2] > by_dcp[1]
    assert set(found.candidates.loc[found.candidates["layout"] == "tp4-dp1-pp2", "dcp"]) == {1}
    assert whole_node.sort_values("tokens_per_s_per_gpu").iloc[-1]["dcp"] == 2


@pytest.mark.parametrize(("model", "width"), [(DEEPSEEK, 512 + 64), (QWEN, 2 * 4 * 128)])
def test_prompts_are_read_in_parts(model: Any, width: int) -> None:
    """A rank has 1/N of the queries; the pairs of queries and keys of all parts are those of the whole prompt. Keys and
    values, or latents, of the prompt go to all N ranks in bf16, once a layer; each keeps them all."""
    parts, tokens = 4, 16384
    cut, plain = (
        deploy(model, H200, VLLM, parse_layout("dp8-ep8"), "prefill", options=Options(pcp=n)) for n in (parts, 1)
    )
    gathers = [row for row in cut.step.plan.rows if isinstance(row, Collective) and row.group == "pcp"]
    assert {row.scale for row in gathers} == {2 * parts * width} and all(row.ranks == parts for row in gathers)
    sizes, whole = (one.step.sizes.context(1.0, 1.0 * tokens, 1000.0).sizes for one in (cut, plain))
    assert float(sizes.S) == tokens / parts

    def pairs(of: Any) -> float:
        return float(of.S * of.P + of.S**2 / 2)

    assert pairs(sizes) == pytest.approx(pairs(whole) / parts, rel=1e-12)
    steps = [float(one.step.price(1.0, 1.0 * tokens, 0.0).seconds) for one in (cut, plain)]
    assert steps[1] / parts < steps[0] < steps[1] / parts * 1.3
    assert cut.held(1.0, tokens)[1] == plain.held(1.0, tokens)[1]  # "does not increase the KV-cache shard count"


def test_the_search_has_pools_of_prompts_that_read_them_in_parts() -> None:
    """Long prompts, a short wait: of pools alone, as many readers as groups, each as fast as it is deployed alone."""
    found = tc.compare(
        "deepseek-v3", device="h200", world_size=16, input_len=32768, output_len=512, ttft_s=10.0, tpot_s=0.06,
        pcp=[2, 4], layouts=["tp2-dp4-ep8", "tp4-pp2", "tp8"],
    )
    frame = found.candidates
    assert set(frame.loc[frame["mode"] == "aggregated", "pcp"]) == {1}
    assert set(frame.loc[frame["prefill_layout"] != "tp2-dp4-ep8", "pcp"]) == {1}  # one group reads alone
    pools = frame[frame["mode"] == "disaggregated"]
    soonest = pools.groupby("pcp")["ttft_s"].min()
    assert 4 in soonest.index and soonest[4] < soonest[1]
    row = pools[pools["pcp"] == 4].sort_values("tokens_per_s_per_gpu").iloc[-1]
    reads, writes = found.deployments(row["candidate"])
    assert (reads.options.pcp, writes.options.pcp) == (4, 1)
    step = VLLM.tokens_per_step(H200)
    prompt_s = sum(float(reads.step.price(1.0, 1.0 * step, 1.0 * past).seconds) for past in range(0, 32768, step))
    busy = row["output_tokens_per_s"] / 512 * prompt_s / row["prefill_workers"]  # dp4 by fours: one prompt at a time
    assert 0.5 < busy < 0.9


@pytest.mark.parametrize("engine", ["vllm==0.24.0", "sglang==0.5.14", "trtllm"])
def test_the_search_reads_no_prompts_in_parts_where_the_release_cannot(engine: str) -> None:
    found = tc.compare("deepseek-v3", device="h200", world_size=16, engine=engine, input_len=4096, output_len=512,
                       pcp=[4], layouts=["tp2-dp4-ep8", "tp4-pp2"], modes=["disaggregated"])  # fmt: skip
    assert set(found.candidates["pcp"]) == {1}


def test_decoding_groups_hold_each_others_caches() -> None:
    """vLLM 0.33.0, config/parallel.py (pcp_shard_decode_requests): requests are shared out, caches are copies."""
    cut, plain = (
        deploy(DEEPSEEK, H200, VLLM, parse_layout("dp8-ep8"), "decode", options=Options(pcp=n)) for n in (4, 1)
    )
    assert cut.held(8.0, 4096)[1] == 4 * plain.held(8.0, 4096)[1]
    assert float(cut.step.price(8.0, 1.0, 4095.0).seconds) == float(plain.step.price(8.0, 1.0, 4095.0).seconds)


def test_who_reads_prompts_in_parts() -> None:
    with pytest.raises(InputError, match="--pcp 3 does not divide dp = 8"):
        deploy(DEEPSEEK, H200, VLLM, parse_layout("dp8-ep8"), "prefill", options=Options(pcp=3))
    for name in ("qwen3-next-80b-a3b", "gpt-oss-20b", "deepseek-v3.2"):
        with pytest.raises(InputError, match=r"--pcp 2: .* (in parts|picks or slides)"):
            deploy(load_model(name), H200, VLLM, parse_layout("dp8-ep8"), "prefill", options=Options(pcp=2))
    simulated = tc.simulate("deepseek-v3", device="h200", world_size=8, tp=1, dp=8, ep=8, phase="prefill",
                            input_len=4096, pcp=8)  # fmt: skip
    assert simulated.totals()["batch_total"] == 1
    assert simulated.tokens_per_s_per_gpu == pytest.approx(4096 / 8 / simulated.step_s)


@pytest.mark.parametrize(
    ("engine", "model", "says"),
    [("vllm", DEEPSEEK, ""), ("vllm", QWEN, "prompts in parts: "), ("vllm==0.24.0", DEEPSEEK, "prefill con"),
     ("sglang", DEEPSEEK, "prefill context parallelism: here a server of prompts"),
     ("trtllm", DEEPSEEK, "prefill context parallelism: ")],
)
def test_prompts_in_parts_are_launched_by_vllm(engine: str, model: Any, says: str) -> None:
    found = launch(engine, model, parse_layout("dp8-ep8"), Options(pcp=4), batch=8, input_len=999, output_len=9)
    assert found.problem.startswith(says) and bool(found.problem) == bool(says)
    if not says:
        assert "--prefill-context-parallel-size 4" in found.commands[0]
        assert "--data-parallel-size 2 " in found.commands[0]


@pytest.mark.parametrize(("layout", "parts", "groups"), [("dp8-ep8", 4, 2), ("dp8-ep8", 8, 1), ("tp2-dp4-ep8", 2, 2)])
def test_a_server_of_prompts_reads_them_in_parts_under_sglang(layout: str, parts: int, groups: int) -> None:
    """SGLang 0.5.23, arg_groups/parallel_hook.py: tp is all ranks of a stage, attention's groups times parts divide it;
    zigzag deals each rank an early and a late part."""
    found = launch("sglang", DEEPSEEK, parse_layout(layout), Options(pcp=parts), batch=8, input_len=999, output_len=9,
                   role="prefill")  # fmt: skip
    command = found.commands[0].replace(" \\\n ", "")
    assert f"--tp-size 8 --enable-prefill-cp --attn-cp-size {parts} --cp-strategy zigzag" in command
    assert (f"--attn-dp-size {groups}" in command) == (groups > 1) and "--dp-size 8" not in command
