"""What engines set by device and layout unless told: memory, tokens per step, captured prefill steps.

The expected numbers are worked out by hand from the released rules: sglang 0.5.14 server_args.py
(``_handle_gpu_memory_settings``), vllm 0.24.0 engine/arg_utils.py and v1/worker/gpu_worker.py, and TensorRT-LLM's
``_cal_max_memory``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from one_deployment import disaggregated

import tensorcast as tc
from tensorcast.cost.memory import cache_budget
from tensorcast.deploy.deployment import deploy
from tensorcast.deploy.layout import Layout, parse_layout
from tensorcast.deploy.options import Options
from tensorcast.deploy.plan.memory_share import memory_share
from tensorcast.deploy.plan.plan import block_form, choose_all2all
from tensorcast.deploy.step.sizes import GRID
from tensorcast.profiles.memory import MIB, Served
from tensorcast.profiles.store import load_device, load_engine, load_model
from tensorcast.serving.capacity import decode_budget, room
from tensorcast.trace.cache import whole_model

SGLANG, VLLM, TRTLLM = (load_engine(name) for name in ("sglang==0.5.14", "vllm==0.24.0", "trtllm"))
MLA, GQA = load_model("deepseek-v3").config, load_model("qwen3-235b-a22b").config


def sglang_share(device: str, layout: str, sequences: int, config: dict[str, object], experts: bool = True) -> float:
    """mem_fraction_static with decode steps of ``sequences`` per data-parallel rank captured, as SGLang rounds it."""
    found, gpu = parse_layout(layout), load_device(device)
    assert SGLANG.reserve is not None
    graphs = SGLANG.reserve.graph_bytes(sequences, found.dp if experts else 1) / float(gpu.memory_bytes)
    return round(float(memory_share(SGLANG, gpu, found, experts, config) - graphs), 3)


@pytest.mark.parametrize(
    ("device", "layout", "sequences", "config", "left_mib"),
    [
        # 58 sizes of prefill steps are captured up to 8192 tokens
        ("h200", "tp8", 512, GQA, 512 + 1.5 * 8192 + 1024 + 2 * 512 + 8 * 58),
        ("h200", "tp8", 512, MLA, 512 + 1.5 * 8192 + 1024 + 2 * 512 + 1536),
        # attention DP: no prefill graphs, 3 + 1.5 MiB a sequence and rank beyond 300 of them
        ("h100", "dp8-ep8", 512, MLA, 512 + 1.5 * 8192 + 1024 + 512 * (2 + 4.5 * 8)),
        ("h100", "dp8-ep8", 300, MLA, 512 + 1.5 * 8192 + 1024 + 300 * (2 + 3 * 8)),
        ("h200", "tp8-pp2", 256, GQA, 512 + 1.5 * 8192 + 2048 + 2 * 256),
        # 16384 tokens per step from 160 GiB on, 74 sizes of prefill steps
        ("b200", "tp8", 512, GQA, 512 + 1.5 * 16384 + 1024 + 2 * 512 + 8 * 74),
        ("b200", "tp8", 512, MLA, 512 + 1.5 * 16384 + 1024 + 2 * 512 + 1536),
        ("mi300x", "tp8", 512, MLA, 512 + 1.5 * 16384 + 1024 + 2 * 512),  # no prefill graphs
    ],
)
def test_sglang_leaves_what_its_rule_says(
    device: str, layout: str, sequences: int, config: dict[str, object], left_mib: float
) -> None:
    capacity = float(load_device(device).memory_bytes) / MIB
    assert sglang_share(device, layout, sequences, config) == round((capacity - left_mib) / capacity, 3)


def test_the_shares_that_sglang_prints() -> None:
    assert sglang_share("h200", "tp8", 512, MLA) == 0.886
    assert sglang_share("h100", "dp8-ep8", 512, MLA) == 0.592
    assert sglang_share("b200", "tp8", 512, MLA) == 0.844


def test_least_that_is_left() -> None:
    """10 GiB above 60 GiB of memory, however small the steps."""
    assert SGLANG.reserve is not None
    small, large = (SGLANG.reserve.fixed_bytes(size * 1024 * MIB, 2048, 1, 0, False) / MIB for size in (40, 80))
    assert (small, large) == (512 + 3072 + 128, 10240)


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"vision_config": {"depth": 27, "hidden_size": 1152}}, 0.95 * (1.1 - 0.1 * 27 * 1152**2 / (24 * 1024**2))),
        ({"vision_config": {"vt_num_hidden_layers": 24, "vt_hidden_size": 1024}}, 0.95),
        ({"vision_config": {}}, 0.95),
        ({"vision_config": {"num_hidden_layers": 80, "hidden_size": 4096}}, 0.95 * 0.8),
        ({"vision_config": {"num_hidden_layers": 12, "hidden_size": 64}}, 0.95 * 1.05),
        ({"vision_config": {}, "architectures": ["Llama4ForConditionalGeneration"]}, 1.0),
    ],
)
def test_sglang_leaves_more_for_models_that_see(config: dict[str, object], factor: float) -> None:
    """adjust_mem_fraction_for_vlm of sglang 0.5.14: 0.95, less 0.1 for each ViT-L/14 more, held to 0.8 to 1.05."""
    device, layout = load_device("h200"), parse_layout("tp8")
    plain, seeing = (memory_share(SGLANG, device, layout, True, one) for one in (GQA, GQA | config))
    assert seeing == pytest.approx(plain * factor, rel=0.01)
    for name in ("qwen3.5-35b-a3b", "gemma-4-31b", "kimi-k2.5", "qwen3-vl-32b"):
        assert "vision_config" in load_model(name).config


def test_tokens_per_step() -> None:
    h100, a100, b200 = (load_device(name) for name in ("h100", "a100", "b200"))
    assert [VLLM.tokens_per_step(device) for device in (h100, a100, b200)] == [8192, 2048, 8192]
    assert VLLM.tokens_per_step(h100, 8) == 8192 and VLLM.tokens_per_step(h100, 8, "low_latency") == 256
    assert [SGLANG.tokens_per_step(device) for device in (h100, a100, b200)] == [8192, 8192, 16384]
    # of a server: its data-parallel ranks share them; low-latency buffers hold 1024
    assert SGLANG.tokens_per_step(b200, 8) == 2048 and SGLANG.tokens_per_step(b200, 8, "low_latency") == 1024
    assert SGLANG.tokens_per_step() == TRTLLM.tokens_per_step(a100, 8) == 8192


def test_prefill_steps_that_are_captured() -> None:
    h100, mi300x, b200 = (load_device(name) for name in ("h100", "mi300x", "b200"))
    assert [SGLANG.prefill_graph_tokens(device, 1, 1, GQA) for device in (h100, b200)] == [8192, 16384]
    assert SGLANG.prefill_graph_tokens(h100, 1, 1, MLA) == 2048
    for device, dp, pp, config in ((h100, 2, 1, GQA), (h100, 1, 2, GQA), (mi300x, 1, 1, GQA)):
        assert SGLANG.prefill_graph_tokens(device, dp, pp, config) == 0
    assert SGLANG.prefill_graph_tokens(h100, 1, 1, load_model("qwen3.5-35b-a3b").config) == 0  # it sees, too
    assert VLLM.prefill_graph_tokens(h100, 8, 2, MLA) == 512 and TRTLLM.prefill_graph_tokens(h100, 1, 1, GQA) == 0
    assert SGLANG.prefill_graphs is not None
    # a server of one phase captures none: the rule "PD disaggregation" of server_args.py
    assert SGLANG.in_pools().prefill_graph_tokens(h100, 1, 1, GQA) == 0 and VLLM.in_pools() is VLLM
    sizes = [*range(4, 33, 4), *range(48, 257, 16), *range(288, 513, 32), *range(576, 1025, 64)]
    sizes += [*range(1280, 4097, 256), *range(4608, 16385, 512)]
    for most in (32, 2048, 4096, 8192, 16384):
        assert SGLANG.prefill_graphs.count(most) == sum(size <= most for size in sizes)


@pytest.mark.parametrize(("engine", "largest"), [("vllm", 512), ("sglang", 8192), ("trtllm", 0)])
def test_captured_prefill_launches_faster(engine: str, largest: int) -> None:
    """Up to the largest captured step kernels follow each other as in a graph, beyond it as the host launches them."""
    one = deploy(load_model("llama-3.1-8b"), load_device("h100"), load_engine(engine), Layout(8, 8), "prefill")
    eager = deploy(load_model("llama-3.1-8b"), load_device("h100"), load_engine(engine), Layout(8, 8), "prefill")
    eager = replace(eager, step=replace(eager.step, pricer=replace(eager.step.pricer, graph_tokens=0.0)))
    tokens = np.array([8.0, 64.0, 512.0, 528.0, 8192.0, 8704.0])
    gain = np.broadcast_to(eager.step.seconds(1.0, tokens, 0.0) - one.step.seconds(1.0, tokens, 0.0), tokens.shape)
    assert (gain[tokens > largest] == 0).all() and (gain >= 0).all()
    assert (gain[tokens <= min(largest, 64)] > 1e-5).all()
    alone = [one.step.seconds(1.0, t, 0.0) for t in tokens]  # each as it is priced beside the others
    assert alone == pytest.approx(np.asarray(one.step.seconds(1.0, tokens, 0.0)).tolist(), rel=1e-12)


def test_what_a_share_covers() -> None:
    """100 GB, 1 of them in use before, 30 of weights, 10 more for everything else."""
    sizes = {"capacity": 100.0, "context": 1.0, "weights": 30.0, "beside": 10.0}
    assert cache_budget("everything", 0.9, **sizes) == pytest.approx(90 - 30 - 10)
    assert cache_budget("cache", 0.9, **sizes) == pytest.approx(0.9 * (100 - 30 - 10))
    assert cache_budget("weights_and_cache", 0.9, **sizes) == pytest.approx(0.9 * 99 - 30)
    # activations that do not fit into the tenth that is left make it smaller
    assert cache_budget("weights_and_cache", 0.9, **{**sizes, "beside": 25.0}) == pytest.approx(100 - 30 - 25)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
@pytest.mark.parametrize(("layout", "exchange"), [("tp4-ep4", "auto"), ("dp4-ep4", "auto"), ("dp4-ep4", "low_latency")])
def test_room_is_what_fits(engine: str, layout: str, exchange: str) -> None:
    """Sequences by division, against the largest batch whose memory fits, the buffers of its decode step and all."""
    model, device = load_model("qwen3-30b-a3b"), load_device("h100")
    options = Options(all2all=exchange)
    decode = deploy(model, device, load_engine(engine), parse_layout(layout), "decode", options=options)
    for length in (300, 1000, 3000, 30_000):
        left, buffers = decode_budget(decode, length - 1)
        found = float(room(decode, left, decode.held(1.0, length)[1] + buffers))
        assert found == pytest.approx(decode.largest_batch(1, length - 1), rel=0.005, abs=1)
        if found == decode.most_sequences:  # what a rank may send, memory or not
            continue
        memory = decode.memory(found, 1, length - 1)
        assert memory.total == pytest.approx(memory.budget, rel=0.05) and memory.budget <= memory.capacity


@pytest.mark.parametrize(
    ("model", "layout", "runs"),
    [
        ("qwen3-235b-a22b", "tp4", True),
        ("qwen3-32b", "tp4", False),  # not in SGLang's list
        ("minimax-m2.5", "tp4", False),
        ("qwen3-235b-a22b", "tp4-ep4", True),
        ("qwen3-235b-a22b", "tp4-dp2", False),  # attention is data-parallel
        ("qwen3-vl-235b-a22b", "tp4-dp1", True),
    ],
)
def test_models_whose_norms_sglang_joins_to_all_reduces(model: str, layout: str, runs: bool) -> None:
    made = deploy(load_model(model), load_device("h100"), load_engine("sglang"), parse_layout(layout), "decode")
    found = (getattr(row, "attrs", {}).get("joined_tokens") for row in made.step.plan.rows)
    assert {limit for limit in found if limit is not None} == ({2048.0} if runs else set())


def test_no_norm_follows_an_all_reduce_of_hyper_connections() -> None:
    """vLLM's all-reduces of DeepSeek-V4 are mixed into streams first: no kernel joins them with a norm, and over hosts
    of four GPUs they are NCCL's."""
    engine = load_engine("vllm==0.19.0")
    for model, runs in (("deepseek-v4-pro", False), ("deepseek-v3", True)):
        made = deploy(load_model(model), load_device("gb200"), engine, parse_layout("tp8"), "decode")
        assert made.step.pricer.joins == runs, model


def test_pools_are_priced_as_servers_of_one_phase() -> None:
    """SGLang captures prompts at tp 4 on one server for both phases, in pools it does not: as if made one by one."""
    compared = tc.compare(
        "qwen3-30b-a3b", device="h100", world_size=8, engine="sglang==0.5.14", layouts=["tp4", "tp2-dp2"],
        input_len=2048, output_len=256,
    )  # fmt: skip
    frame, scenario = compared.candidates, compared.tasks[0].scenario
    pools = frame[(frame["mode"] == "disaggregated") & (frame["prefill_layout"] == "tp4-dp1")]
    pools = pools[pools["batch"].isin(GRID)]  # between its points a lone server's steps are on lines
    assert len(pools)
    for _, row in pools.sample(min(5, len(pools)), random_state=0).iterrows():
        prefill, decode = compared.deployments(row["candidate"])
        load = replace(scenario.load, concurrency=float(row["concurrency"] / row["replicas"]))
        workers = int(row["prefill_workers"]), int(row["decode_workers"])
        alone = disaggregated(prefill, decode, *workers, load, chunk_tokens=scenario.own_chunk)
        assert row["ttft_s"] == pytest.approx(float(alone.ttft_s), rel=1e-6)
        captured = scenario.deployment(prefill.layout, "prefill", prefill.options)
        assert captured.step.pricer.graph_tokens > 0 == prefill.step.pricer.graph_tokens
        assert disaggregated(captured, decode, *workers, load, chunk_tokens=scenario.own_chunk).ttft_s <= alone.ttft_s


@pytest.mark.parametrize(
    ("model", "device", "layout", "options", "fused"),
    [
        ("deepseek-v3", "h200", "tp8", {}, True),
        ("deepseek-v3", "h200", "tp8", {"shared_experts_fusion": False}, False),
        ("deepseek-v3", "h200", "tp8", {"shared_expert_tp": False}, False),
        ("deepseek-v3", "h200", "tp8", {"fusion": "none"}, False),
        ("deepseek-v3", "h200", "tp8-ep8", {}, False),
        ("deepseek-v3", "mi325x", "tp8-ep8", {}, True),
        ("deepseek-v3", "h200", "dp8-ep8", {"all2all": "low_latency"}, False),
        ("deepseek-v3", "b200", "tp8", {}, False),  # TensorRT-LLM's experts
        ("glm-4.7-flash", "b200", "tp4", {}, True),  # Triton's
        ("deepseek-v3.2", "h200", "tp8", {}, False),  # of DeepSeek's classes V3's alone
        ("kimi-k2", "h200", "tp16", {}, False),  # 384 experts
        ("glm-5", "h200", "tp8", {}, True),
        ("qwen3-next-80b-a3b", "h200", "tp4-ep4", {}, True),
        ("qwen3.5-122b-a10b", "h200", "tp8", {}, False),
    ],
)
def test_classes_whose_shared_expert_sglang_runs_among_the_routed_ones(
    model: str, device: str, layout: str, options: dict[str, Any], fused: bool
) -> None:
    """SGLang 0.5.14, determine_num_fused_shared_experts of each class and models/qwen2_moe.py."""
    profile, one, asked = load_model(model), load_device(device), Options(**options)
    engine, placed = load_engine("sglang"), parse_layout(layout)
    all2all = choose_all2all(asked.all2all, placed, engine, "decode")
    form = block_form(
        asked, placed, all2all, engine, device=one, config=profile.config, whole=whole_model(profile, "decode")
    )
    assert form.fused == fused


NEW_SGLANG, NEW_VLLM = load_engine("sglang"), load_engine("vllm")


def test_a_release_has_its_own_rules() -> None:
    """vllm 0.33.0, engine/arg_utils.py (get_batch_defaults), config/vllm.py (_set_cudagraph_sizes); sglang 0.5.23,
    arg_groups/memory_hook.py and cuda_graph_hook.py."""
    h100, b200, rtx = (load_device(name) for name in ("h100", "b200", "rtx-4090"))
    assert [one.tokens_per_step(b200) for one in (VLLM, NEW_VLLM)] == [8192, 16384]
    assert [one.tokens_per_step(rtx) for one in (SGLANG, NEW_SGLANG)] == [2048, 4096]  # 24 GiB
    assert [one.prefill_graph_tokens(b200, 1, 1, GQA) for one in (VLLM, NEW_VLLM)] == [512, 1024]
    assert [one.prefill_graph_tokens(h100, 1, 1, GQA) for one in (VLLM, NEW_VLLM)] == [512, 512]
    oss = load_model("gpt-oss-120b").config
    assert [one.prefill_graph_tokens(h100, 1, 1, oss) for one in (VLLM, NEW_VLLM)] == [1024, 1024]
    # attention DP captures prompts, too, and prefill servers do; a pipeline and most models that see do not
    assert [NEW_SGLANG.prefill_graph_tokens(h100, dp, pp, GQA) for dp, pp in ((8, 1), (1, 2))] == [1024, 0]
    assert [NEW_SGLANG.prefill_graph_tokens(gpu, 1, 1, MLA) for gpu in (h100, b200)] == [8192, 0]  # trtllm_mla
    assert NEW_SGLANG.prefill_graph_tokens(h100, 1, 1, MLA) == 8192
    assert NEW_SGLANG.in_pools().prefill_graph_tokens(h100, 1, 1, GQA) == 8192
    assert NEW_SGLANG.prefill_graph_tokens(h100, 1, 1, load_model("qwen3.5-35b-a3b").config) == 8192
    assert NEW_SGLANG.prefill_graph_tokens(h100, 1, 1, load_model("qwen3-vl-32b").config) == 0


@pytest.mark.parametrize(
    ("phase", "exchange", "sequences", "left_mib"),
    [
        # of one phase: prompts' graphs in prefill alone; the tokens that are decoded at once, and 10 GiB at least
        ("prefill", "", 0, 512 + 1.5 * 8192 + 1024 + 8 * 58),
        ("decode", "", 256, 10240),
        ("decode", "", 4096, 512 + 1.5 * 4096 + 1024 + 2 * 4096),
        ("decode", "low_latency", 4096, 512 + 1.5 * 4096 + 1024 + 2 * 4096 + 2048),
        # DeepEP: sizes up to 2048 tokens in multiples of 8
        ("prefill", "high_throughput", 0, 512 + 1.5 * 8192 + 1024 + 8 * 38 + 1024),
    ],
)
def test_what_servers_of_one_phase_leave(phase: str, exchange: str, sequences: int, left_mib: float) -> None:
    """sglang 0.5.23, arg_groups/memory_hook.py (handle_gpu_memory_settings, reserve_for_graph_mb,
    reserve_for_deepep_a2a_mb), tp 8."""
    gpu, layout, pooled = load_device("h200"), parse_layout("tp8"), NEW_SGLANG.in_pools()
    assert pooled.reserve is not None
    capacity = float(gpu.memory_bytes)
    share = partial(memory_share, pooled, gpu, layout, True, GQA, phase=phase, served=Served(exchange))
    grown = pooled.reserve.graph_bytes(float(sequences), 1)
    assert float(share(grown=grown)) == pytest.approx(1 - left_mib * MIB / capacity, rel=1e-12)
    # the same in two parts: what no batch changes, and what it adds beyond the floor
    added = pooled.reserve.graph_bytes(float(sequences), 1, spare=pooled.reserve.spare_bytes(capacity, 8))
    if phase == "decode":
        assert float(share()) - float(added) / capacity == pytest.approx(float(share(grown=grown)), rel=1e-12)


def test_the_largest_decode_server() -> None:
    """By division where terms grow evenly, else by halves: no sequence more would fit, and none fewer is let in."""
    gpu, layout = load_device("h200"), parse_layout("dp16-ep16")
    one = deploy(load_model("deepseek-v3"), gpu, NEW_SGLANG.in_pools(), layout, "decode")
    budget, each = np.array([2e9, 2e10, 6e10]), 3e7
    found = room(one, budget, each)
    free = 1.0 - one.context_bytes / float(one.device.memory_bytes)
    for held, left in zip(found.tolist(), budget.tolist(), strict=True):
        most = [n * each + free * float(one.graph_bytes(n)) <= left for n in (held, held + 1)]
        assert most == [True, False] or held == one.most_sequences


def test_models_without_a_compiler() -> None:
    """vllm 0.33.0, config/vllm.py: breakable graphs and no torch.compile, so none of its fusions, and DeepEP's
    high-throughput kernels switch no graphs off; not on ROCm."""
    at = {"layout": parse_layout("dp8-ep8"), "phase": "decode", "options": Options(all2all="high_throughput")}
    found = {}
    for engine, model in ((NEW_VLLM, "glm-5"), (NEW_VLLM, "deepseek-v3"), (VLLM, "glm-5")):
        one = deploy(load_model(model), load_device("h200"), engine, **at)  # type: ignore[arg-type]
        found[engine.version, model] = one.step.captured, any(f.startswith("norm_quant") for f in one.engine.fusions)
    assert found == {("0.33.0", "glm-5"): (True, False), ("0.33.0", "deepseek-v3"): (False, True),
                     ("0.24.0", "glm-5"): (False, True)}


@pytest.mark.parametrize(("phase", "least"), [("decode", 32), ("prefill", 512)])
def test_small_steps_are_not_cut_in_halves(phase: str, least: int) -> None:
    """dbo_decode_token_threshold and dbo_prefill_token_threshold of vllm 0.24.0 and 0.33.0, config/parallel.py."""
    layout, exchange = parse_layout("dp8-ep8"), "low_latency" if phase == "decode" else "high_throughput"
    whole, halved = (
        deploy(load_model("qwen3-235b-a22b"), load_device("h200"), NEW_VLLM, layout, phase,
               options=Options(all2all=exchange, dual_batch_overlap=dual)).step
        for dual in (False, True)
    )
    tokens = np.array([least / 4, least - 1, least, 2 * least], dtype=float)
    sizes = (tokens, 1.0, 4096.0) if phase == "decode" else (1.0, tokens, 0.0)
    one, two = (np.asarray(step.seconds(*sizes)) for step in (whole, halved))
    assert (one == two).tolist() == [True, True, False, False]
    alone = [halved.seconds(*(float(np.broadcast_to(s, 4)[i]) for s in sizes)) for i in range(4)]
    assert alone == pytest.approx(two.tolist(), rel=1e-12)


def test_all_reduces_that_are_fused_on_b300() -> None:
    """vllm, compilation/passes/fusion/allreduce_rms_fusion.py, SM103."""
    b200, b300, gb300 = (load_device(name) for name in ("b200", "b300", "gb300"))
    mib = {(one.version, gpu.name): one.allreduce_norm.limit_bytes(gpu, 8, 1.0) / 2**20  # type: ignore[union-attr]
           for one in (VLLM, NEW_VLLM) for gpu in (b200, b300)}
    assert mib == {("0.24.0", "b200-sxm"): 1, ("0.24.0", "b300-sxm"): 2, ("0.33.0", "b200-sxm"): 1,
                   ("0.33.0", "b300-sxm"): 4}
    assert NEW_VLLM.allreduce_norm is not None and NEW_VLLM.allreduce_norm.limit_bytes(gb300, 16, 1.0) == 2**26
