"""Blocks of scales and KV heads that a cut would split: refused by name, with the numbers, in every command."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest

import tensorcast as tc
from tensorcast.deploy.deployment import deploy
from tensorcast.deploy.engine_limits import engine_can_run, halving_note
from tensorcast.deploy.layout import Layout, broken_rules, check, parse_layout
from tensorcast.deploy.model_names import named_model
from tensorcast.deploy.options import Options
from tensorcast.deploy.simulate import simulate
from tensorcast.deploy.workload import Workload
from tensorcast.errors import InputError
from tensorcast.launch.launch import launch
from tensorcast.modeling.checkpoint.read import checkpoint
from tensorcast.modeling.config import hf_config, narrow
from tensorcast.modeling.quantization import SCHEMES, Quantization, override
from tensorcast.profiles.config_values import text_of
from tensorcast.profiles.facts import ModelFacts
from tensorcast.profiles.model import ModelProfile
from tensorcast.profiles.store import list_models, load_device, load_engine, load_model
from tensorcast.search.space import layouts
from tensorcast.trace import cuts
from tensorcast.trace.cache import traced
from tensorcast.trace.cuts import Cut
from tensorcast.trace.precision import by_precision

ENGINES = ("vllm", "sglang", "trtllm")
NEXT, NANO = "Qwen/Qwen3-Next-80B-A3B-Instruct-FP8", "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4"
MOE = ModelFacts(num_experts=64, heads=64, kv_heads=8)


def cut_widths(profile: ModelProfile, stored: Quantization) -> tuple[Cut, ...]:
    classes = profile.config.get("architectures") or ()
    return cuts.cut_widths(by_precision(traced(profile, "decode"), stored), stored, classes) if stored.in_blocks else ()


def _problem(model: str, layout: str, engine: str) -> str:
    profile, _ = named_model(model)
    return launch(engine, profile, parse_layout(layout), batch=8, input_len=1024, output_len=128).problem


@pytest.mark.parametrize(
    ("model", "layout", "engine", "numbers"),
    [
        # github.com/ROCm/ATOM/issues/442: 192 is not divisible by block_n = 128 at tp 8; tp 4 and tp 8 with ep 8 run
        ("Qwen/Qwen3-235B-A22B-FP8", "tp8", "vllm", "routed experts 1536 / 8 = 192 is no multiple of 128"),
        ("Qwen/Qwen3-235B-A22B-FP8", "tp4-dp2", "vllm", "routed experts 1536 / 8 = 192 is no multiple of 128"),
        ("Qwen/Qwen3-235B-A22B-FP8", "tp4", "vllm", ""),
        ("Qwen/Qwen3-235B-A22B-FP8", "tp8-ep8", "vllm", ""),
        ("MiniMaxAI/MiniMax-M2.5", "tp8", "vllm", "routed experts 1536 / 8 = 192 is no multiple of 128"),
        ("MiniMaxAI/MiniMax-M2.5", "tp8", "sglang", "routed experts 1536 / 8 = 192 is no multiple of 128"),
        ("MiniMaxAI/MiniMax-M2.5", "tp8", "trtllm", "routed experts 1536 / 8 = 192 is no multiple of 128"),
        ("MiniMaxAI/MiniMax-M2.5", "tp8-ep4", "sglang", ""),
        # github.com/sgl-project/sglang/issues/10852
        (NEXT, "tp8-ep8", "sglang", "shared expert 512 / 8 = 64 is no multiple of 128"),
        (NEXT, "tp4-ep4", "sglang", ""),
        (NEXT, "tp1-dp8-ep8", "sglang", ""),  # whole with DeepEP
        (NEXT, "tp8-ep8", "vllm", "shared expert 512 / 8 = 64 is no multiple of 128"),
        # github.com/sgl-project/sglang/issues/3345
        ("deepseek-r1", "tp32", "sglang", "dense MLP 18432 / 32 = 576 is no multiple of 128"),
        ("deepseek-r1", "tp16", "sglang", ""),
        ("deepseek-r1", "tp8-dp4-ep32", "sglang", ""),  # with --moe-dense-tp-size 1
        ("deepseek-r1", "tp32-ep32", "trtllm", ""),  # over 16 of them
        ("deepseek-r1", "tp32", "trtllm", "routed experts 2048 / 32 = 64 is no multiple of 128"),
        # github.com/vllm-project/vllm/issues/49949: 14.5 groups
        (NANO, "tp8", "vllm", "routed experts 1856 / 8 = 232 is no multiple of 16"),
        (NANO, "tp4", "vllm", ""),
        (NANO, "tp8-ep8", "vllm", ""),
        ("kimi-k2.5", "tp16", "vllm", ""),  # groups of 32 in experts alone; attention and shared expert are bf16
        ("gpt-oss-120b", "tp8", "vllm", ""),  # 360 is padded
    ],
)  # fmt: skip
def test_launch_names_the_block_that_is_split(model: str, layout: str, engine: str, numbers: str) -> None:
    problem = _problem(model, layout, engine)
    assert problem.startswith(f"quantisation blocks: {numbers}") if numbers else problem == ""


def test_dense_layers_are_whole_where_all_ranks_would_split_them() -> None:
    """18432 over 32 ranks is 576; over 8 it is 2304 = 18 x 128."""
    for layout, said in (("tp8-dp4-ep32", True), ("tp4-dp2-ep8", False), ("tp1-dp8-ep8", True)):
        found = launch("sglang", load_model("deepseek-r1"), parse_layout(layout), batch=8, input_len=9, output_len=9)
        assert ("--moe-dense-tp-size 1" in found.commands[0]) == said


def test_a_step_of_a_split_block_has_no_price() -> None:
    with pytest.raises(InputError, match=r"0\.33\.0 cannot run it: quantisation blocks: dense MLP 18432 / 32 = 576"):
        tc.simulate("deepseek-r1", device="h20", world_size=32)
    with pytest.raises(InputError, match=r"routed experts 1856 / 8 = 232 is no multiple of 16 \(nvfp4\); raise ep"):
        tc.simulate("nemotron-3-nano-30b-a3b", device="h100", world_size=8, quant="nvfp4")
    with pytest.raises(InputError, match="routed experts 1856 / 8 = 232"):  # an engine without rules of its own
        tc.simulate("nemotron-3-nano-30b-a3b", device="h100", world_size=8, quant="nvfp4", engine="eager")
    assert tc.simulate("nemotron-3-nano-30b-a3b", device="h100", world_size=4, quant="nvfp4").step_s > 0
    assert tc.simulate("qwen3-30b-a3b", device="h100", world_size=8).step_s > 0  # 96, but in bf16


def test_compare_offers_no_layout_that_splits_a_block() -> None:
    """Not even where any engine will do: no step of such a rank exists."""
    with pytest.raises(InputError) as refused:
        tc.compare(
            "qwen3-30b-a3b-fp8", device="h100", world_size=8, input_len=1000, output_len=100,
            layouts=["tp8", "tp4-dp2", "tp2-dp4-ep2"], runnable_only=False,
        )
    said = str(refused.value)
    assert "\n" not in said
    assert said.count("quantisation blocks: routed experts 768 / 8 = 96 is no multiple of 128") == 2
    assert "quantisation blocks: routed experts 768 / 4 = 192 is no multiple of 128 (fp8_block); raise ep" in said


def test_each_module_has_its_own_block() -> None:
    """Attention in bf16 is never refused: 24 heads of 72 at tp 8 are 216, no multiple of anything."""
    cut = Cut("attention output", 24 * 72, 128, "fp8_block")
    assert "attention output 1728 / 8 = 216" in engine_can_run("vllm", Layout(8, 8), MOE, cuts=(cut,))
    profile, stored = load_model("kimi-k2.5"), checkpoint(load_model("kimi-k2.5"))
    assert {cut.part for cut in cut_widths(profile, stored)} == {"routed experts"}
    assert cut_widths(load_model("llama-3.1-8b"), Quantization()) == ()
    fp8 = cut_widths(load_model("deepseek-r1"), checkpoint(load_model("deepseek-r1")))
    assert set(fp8) == {
        Cut("routed experts", 2048, 128, "fp8_block"), Cut("shared expert", 2048, 128, "fp8_block", fewer=True),
        Cut("dense MLP", 18432, 128, "fp8_block", fewer=True), Cut("attention output", 128 * 128, 128, "fp8_block"),
        Cut("latent attention", 128 * 192, 128, "fp8_block"), Cut("latent attention", 128 * 256, 128, "fp8_block"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("scheme", "block"),
    [("fp8_block", (128, 128)), ("nvfp4", (1, 16)), ("w4a16_nvfp4", (1, 16)), ("mxfp8", (1, 32)), ("w4a16", (1, 128)),
     ("w4a16_g32", (1, 32)), ("w4a16_g64", (1, 64)), ("w8a16_g128_zp", (1, 128)), ("w4a8_g64", (1, 64)),
     ("w4a16_channel", (1, 1)), ("fp8", (1, 1)), ("int8", (1, 1)), ("mxfp4", (1, 1)), ("bf16", (1, 1))],
)  # fmt: skip
def test_blocks_of_the_schemes(scheme: str, block: tuple[int, int]) -> None:
    """mxfp4 experts are padded instead."""
    assert SCHEMES[scheme].block == block


def test_groups_of_gptq_experts_are_halved() -> None:
    """Qwen3-235B in GPTQ at tp 8: 192 takes groups of 64 (github.com/vllm-project/vllm/issues/17604); by
    compressed-tensors 640 / 2 = 320 cuts through groups of 128 (github.com/vllm-project/vllm/issues/57792)."""
    gptq = Cut("routed experts", 1536, 128, "w4a16", halves=True)
    assert engine_can_run("vllm", Layout(8, 8), MOE, cuts=(gptq,)) == ""
    assert "192 is no multiple of 128" in engine_can_run("trtllm", Layout(8, 8), MOE, cuts=(gptq,))
    assert "320 is no multiple of 128" in engine_can_run(
        "vllm", Layout(2, 2), MOE, cuts=(Cut("routed experts", 640, 128, "w4a16_g128"),)
    )
    assert "20 is no multiple of 32" in engine_can_run(
        "vllm", Layout(32, 32), MOE, cuts=(Cut("routed experts", 640, 128, "w4a16", halves=True),), gpus_per_node=32
    )
    said = halving_note("vllm", Layout(8, 8), (gptq,))
    assert said.startswith("routed experts 1536 / 8 = 192 splits groups of 128 (w4a16): vllm makes them 64, 2 times")
    assert halving_note("vllm", Layout(4, 4), (gptq,)) == halving_note("trtllm", Layout(8, 8), (gptq,)) == ""
    entry = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    profile = load_model("qwen3-30b-a3b").model_copy()
    stored = checkpoint(profile.model_copy(update={"config": {**profile.config, "quantization_config": entry}}))
    assert [cut.halves for cut in cut_widths(profile, stored) if cut.part == "routed experts"] == [True]
    asked = override(stored, "experts=w4a16_g128")  # of another tool: not halved
    assert [cut.halves for cut in cut_widths(profile, asked) if cut.part == "routed experts"] == [False]


def test_halved_groups_are_said_in_simulate_and_launch() -> None:
    """Qwen3-30B-A3B in GPTQ at tp 4: 768 / 4 = 192."""
    entry = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    plain = load_model("qwen3-30b-a3b")
    profile = plain.model_copy(update={"config": {**plain.config, "quantization_config": entry}})
    note = "routed experts 768 / 4 = 192 splits groups of 128 (w4a16): vllm makes them 64"
    step = simulate(profile, load_device("h100"), load_engine("vllm"), Layout(4, 4), Workload("decode", 1, 1, 100))
    assert any(said.startswith(note) for said in step.notes)
    found = launch("vllm", profile, Layout(4, 4), batch=8, input_len=1024, output_len=128)
    assert any(said.startswith(note) for said in found.notes)


@pytest.mark.parametrize(("tp", "legal_"), [(1, True), (2, True), (3, False), (4, True), (6, False), (8, True),
                                            (12, False), (16, True), (24, True), (48, True)])  # fmt: skip
def test_a_rank_holds_whole_kv_heads(tp: int, legal_: bool) -> None:
    """48 heads of queries and 8 of keys and values (MiniMax-M2.5): assert total_num_kv_heads % tp_size == 0, or
    tp_size % total_num_kv_heads == 0, vLLM 0.24.0, model_executor/models/minimax_m2.py."""
    facts, device = load_model("minimax-m2.5").stated_facts, load_device("h200")
    if legal_:
        check(Layout(tp, tp), facts, device)
        return
    with pytest.raises(InputError, match="8 KV heads are neither a multiple nor a divisor of tp"):
        check(Layout(tp, tp), facts, device)


def test_kv_bytes_are_of_whole_heads() -> None:
    """Per token, layer and rank: 2 x heads x 128 x 2 bytes."""
    for tp, heads in ((2, 4), (16, 1)):
        layout = Layout(tp, tp, 1, tp)
        found = deploy(load_model("minimax-m2.5"), load_device("h200"), load_engine("vllm"), layout, "decode")
        assert found.held(1.0, 1000)[1] == 62 * 1000 * 2 * heads * 128 * 2


# All shipped models under all engines, against what the engines' sources ask


class Stored(NamedTuple):
    """Widths of a checkpoint in blocks, as its config.json has them, and what its engine asks of their parts.

    ``routed``, ``shared``, ``dense``: intermediate sizes; ``out``: heads times v_head_dim; ``latent``: outputs of q_b
    and kv_b; ``unit``: elements that share a scale. 0: not there, or in bf16.
    """

    unit: int
    routed: int = 0
    shared: int = 0
    dense: int = 0
    out: int = 0
    latent: tuple[int, ...] = ()


DEEPSEEK_V3 = Stored(128, 2048, 2048, 18432, 128 * 128, (128 * 192, 128 * 256))
STORED = {
    "deepseek-v3": DEEPSEEK_V3, "deepseek-r1": DEEPSEEK_V3, "deepseek-v3.2": DEEPSEEK_V3,
    "kimi-k2": Stored(128, 2048, 2048, 18432, 64 * 128, (64 * 192, 64 * 256)),
    "kimi-k2.5": Stored(32, 2048),
    # experts in MXFP4, which is padded; heads of 512, and groups of 1,024 before the output
    "deepseek-v4-flash": Stored(128, shared=2048, out=8 * 1024, latent=(64 * 512,)),
    "deepseek-v4-pro": Stored(128, shared=3072, out=16 * 1024, latent=(128 * 512,)),
    "deepseek-v4.1-flash": Stored(32, shared=2304, out=8 * 1024, latent=(64 * 512,)),
    "glm-5": Stored(128, 2048, 2048, 12288, 64 * 256, (64 * 256, 64 * 448)),
    "glm-5.2": Stored(128, 2048, 2048, 12288, 64 * 256, (64 * 256, 64 * 448)),
    "minimax-m2.5": Stored(128, 1536, out=48 * 128),
    "mimo-v2-flash": Stored(128, 2048, dense=16384),
    "qwen3-235b-a22b-fp8": Stored(128, 1536, out=64 * 128),
    "qwen3-30b-a3b-fp8": Stored(128, 768, out=32 * 128),
    "qwen3-32b-fp8": Stored(128, dense=25600, out=64 * 128),
}  # fmt: skip
PADDED = ("gpt-oss-20b", "gpt-oss-120b")  # MXFP4 experts
CAPPED = ("deepseek-r", "deepseek-v3", "deepseek-v4-", "kimi", "glm-5")
"""TensorRT-LLM cuts these models' shared expert and dense MLP over gcd(blocks, tp) ranks (modeling_deepseekv3.py)."""


def _starts(engine: str, name: str, profile: ModelProfile, layout: Layout) -> bool:
    """Whether the engine's own checks at start let a layout of ranks on one node pass.

    vLLM 0.24.0: config/model.py (verify_with_parallel_config: heads % tp), models/*.py (KV heads), quantization/fp8.py
    (create_weights), utils/fp8_utils.py (validate_fp8_block_shape). SGLang 0.5.14: srt/models/*.py,
    layers/quantization/fp8.py (validate_block_quant_shapes). TensorRT-LLM main at 002366a: fused_moe/quantization.py.
    """
    text, tp, dp, ep = text_of(profile.config), layout.tp, layout.dp, layout.ep
    heads, vocabulary = text["num_attention_heads"], text["vocab_size"]
    if engine == "vllm" and -(-vocabulary // 64) * 64 % tp:  # layers/vocab_parallel_embedding.py (divide)
        return False
    if engine == "sglang" and (profile.num_experts or 0) % ep:  # layers/moe/fused_moe_triton/layer.py
        return False
    stated = text.get("num_key_value_heads", text.get("num_attention_groups", heads))
    kv_heads = heads if text.get("kv_lora_rank") or stated in (0, None) else stated
    if heads % tp or (kv_heads % tp if kv_heads >= tp else tp % kv_heads):
        return False
    if name not in STORED:
        return True
    one, attention_dp = STORED[name], dp if profile.num_experts else 1
    moe_tp = tp * dp // ep
    parts = {width // tp for width in (one.out, *one.latent)} | {one.routed / moe_tp}
    if engine == "vllm":
        mlp = tp, 1 if ep > 1 and tp > 1 and attention_dp > 1 else tp
    elif engine == "sglang":
        deepep = attention_dp > 1 and ep > 1 and moe_tp == 1
        everyone = tp * attention_dp
        mlp = (1 if attention_dp > 1 else tp), 1 if deepep else everyone  # --moe-dense-tp-size 1
    else:
        mlp = (1, 1) if name.startswith(CAPPED) else (tp, tp)
    parts |= {one.dense / mlp[0], one.shared / mlp[1]}
    return all(part % one.unit == 0 for part in parts)


@pytest.mark.parametrize("name", list_models())
def test_only_layouts_that_start_are_offered(name: str) -> None:
    profile, device = load_model(name), load_device("h200")
    stored = checkpoint(profile)
    in_blocks = {stored.linear.name, stored.experts.name} & {"fp8_block", "nvfp4", "w4a16_g32", "w4a16", "mxfp8"}
    assert (name in STORED) == bool(in_blocks), "a model whose widths stand in no table"
    widths = cut_widths(profile, stored)
    facts = replace(profile.stated_facts, vocab_size=text_of(profile.config)["vocab_size"])  # traced ones have it
    rules = "quantisation blocks", "heads per rank", "KV heads per rank", "vocabulary", "even experts"
    for world in range(1, 17):
        for layout in layouts(world):
            if layout.pp > 1 or (layout.ep > 1 and not facts.num_experts):
                continue
            broken = next(broken_rules(layout, facts, device), None)
            for engine in ENGINES:
                problem = broken[0] if broken else engine_can_run(engine, layout, facts, Options(), 16, cuts=widths)
                starts = _starts(engine, name, profile, layout)
                if not problem:
                    assert starts, f"{engine} {layout} is offered"
                elif problem.partition(":")[0] in rules:
                    assert not starts, f"{engine} {layout} is refused: {problem}"


@pytest.mark.parametrize(
    ("engine", "layout", "all2all", "problem"),
    [
        ("sglang", "tp2-dp3-ep6", "allgather_reducescatter", "even experts: 256 experts do not divide over ep = 6"),
        ("vllm", "tp2-dp3-ep6", "allgather_reducescatter", ""),  # expert_map_manager.py: some ranks have one more
        ("vllm", "tp2-dp3-ep6", "high_throughput", "DeepEP's ranks: 256 experts do not divide over its 6 ranks"),
        ("vllm", "tp2-dp3-ep6", "low_latency", "DeepEP's ranks: 256 experts do not divide over its 6 ranks"),
        ("trtllm", "tp1-dp6-ep6", "low_latency", "DeepEP's ranks: 256 experts do not divide over its 6 ranks"),
        ("vllm", "tp4-dp64-ep256", "high_throughput", "DeepEP's ranks: its kernels for prompts have no size for 256"),
        ("vllm", "tp4-dp64-ep256", "low_latency", ""),
        ("vllm", "tp4-dp16-ep64", "high_throughput", ""),
    ],
)  # fmt: skip
def test_exchanges_run_on_ranks_that_they_are_made_for(engine: str, layout: str, all2all: str, problem: str) -> None:
    facts = ModelFacts(num_experts=256, heads=48, kv_heads=8, vocab_size=200_064)
    found = engine_can_run(engine, parse_layout(layout), facts, Options(all2all=all2all), 8)
    assert found.startswith(problem) if problem else found == ""


def test_ranks_share_a_vocabulary_evenly() -> None:
    """vLLM fills 32,000 and 151,936 up to no more than a multiple of 64; SGLang and TensorRT-LLM to one of tp, too."""
    for vocabulary, tp, shared in ((32_000, 5, True), (32_000, 3, False), (151_936, 3, False), (30_001, 7, True)):
        facts = ModelFacts(heads=105, vocab_size=vocabulary)
        found = {engine: engine_can_run(engine, Layout(tp, tp), facts) for engine in ENGINES}
        assert found["sglang"] == found["trtllm"] == ""
        assert (found["vllm"] == "") == shared, (vocabulary, tp)


GROUPED = [name for name in list_models() if text_of(load_model(name).config).get("n_groups")]


@pytest.mark.parametrize("name", GROUPED)
def test_groups_of_scans_are_whole_on_each_rank(name: str) -> None:
    """vLLM 0.24.0, mamba/mamba_mixer2.py: num_heads % tp == 0, and groups % tp == 0 unless there is one."""
    profile = load_model(name)
    text = text_of(profile.config)
    for tp in range(1, 17):
        heads = text["mamba_num_heads"] % tp or text["num_attention_heads"] % tp
        kv = text["num_key_value_heads"]
        starts = not heads and not text["n_groups"] % tp and not (kv % tp and tp % kv)
        if starts and all(text.get(width, 0) % tp == 0 for width in ("intermediate_size", "moe_intermediate_size")):
            assert narrow(hf_config(profile), tp).n_groups == text["n_groups"] // tp
        else:
            with pytest.raises(InputError, match=rf"^tp={tp}: "):
                narrow(hf_config(profile), tp)
