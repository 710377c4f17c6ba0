"""What engines leave for the cache, against what they logged, and how they split a pipeline."""

from __future__ import annotations

from dataclasses import replace

import pytest
from engine_logs import LOGS, Log, ours
from hypothesis import given
from hypothesis import strategies as st

import tensorcast as tc
from tensorcast.cost.stages import stage_layers
from tensorcast.deploy.deployment import Deployment, deploy
from tensorcast.deploy.engine_log import ROOM_ERROR_BYTES, cache_log, room_note
from tensorcast.deploy.layout import Layout, parse_layout
from tensorcast.deploy.options import Options
from tensorcast.errors import InputError
from tensorcast.profiles.store import load_device, load_engine, load_model
from tensorcast.scheduling.rules import rules_of

GIB = float(1 << 30)


def _vllm_partitions(layers: int, pp: int) -> list[int]:
    """vLLM 0.24.0, distributed/utils.py (get_pp_indices): what is left over goes to stages before the last."""
    sizes = [layers // pp] * pp
    for i in range(2, layers % pp + 2):
        sizes[-i] += 1
    return sizes


def _sglang_partitions(layers: int, pp: int) -> list[int]:
    """SGLang 0.5.14, srt/distributed/utils.py (get_pp_indices): the last ones get one more."""
    return [layers // pp + (rank >= pp - layers % pp) for rank in range(pp)]


@given(st.integers(1, 128), st.integers(1, 16))
def test_stages_are_those_of_the_engine(layers: int, pp: int) -> None:
    found = {
        split: [stage.stop - stage.start for stage in stage_layers(layers, pp, split)]
        for split in ("first", "before_last", "last")
    }
    assert found["last"] == _sglang_partitions(layers, pp)
    assert found["before_last"] == _vllm_partitions(layers, pp)
    assert found["first"] == sorted(found["last"], reverse=True)  # torch.tensor_split, as in TensorRT-LLM
    told = {name: load_engine(name).pipeline_split for name in ("vllm", "sglang", "trtllm")}
    assert told == {"vllm": "before_last", "sglang": "last", "trtllm": "first"}


@pytest.mark.parametrize(("engine", "gib"), [("vllm", 21.69), ("sglang", 21.90)])
def test_the_fullest_stage(engine: str, gib: float) -> None:
    """DeepSeek-V3 at tp 8, pp 4: 16 layers of experts, under SGLang with the head beside them. The first stage, of 15
    layers, was logged with 16.96 GiB (github.com/deepseek-ai/DeepSeek-V3/issues/205)."""
    parts = load_model("deepseek-v3"), load_device("h100"), load_engine(engine)
    found = deploy(*parts, Layout(32, 8, 1, 1, 4), "decode")
    assert found.memory(1, 1, 100).weights / GIB == pytest.approx(gib, rel=0.001)
    assert float(found.stages.weights[0]) / GIB == pytest.approx(16.96, rel=0.02)


@pytest.mark.parametrize(
    ("stages", "gib"),
    [("15,15,16,15", 21.69),  # vLLM's own
     ("16,15,15,15", 21.69 * 15 / 16 + 129280 * 7168 * 2 / 8 / GIB),  # three dense layers in the first; the head's part
     ("15,15,15,16", 21.90)],
)  # fmt: skip
def test_stages_that_are_stated_hold_what_they_say(stages: str, gib: float) -> None:
    """As VLLM_PP_LAYER_PARTITION has them; what a server holds is what its fullest stage does."""
    parts = load_model("deepseek-v3"), load_device("h100"), load_engine("vllm")
    found = deploy(*parts, Layout(32, 8, 1, 1, 4), "decode", options=Options(pp_partition=stages))
    assert found.memory(1, 1, 100).weights / GIB == pytest.approx(gib, rel=0.001)


@pytest.mark.parametrize(
    ("stages", "said"),
    [("15,15,15,15", "add up to 61 layers, not 60"), ("31,30", "2 stages, and pp = 4"), ("0,20,20,21", "above 0"),
     ("16,fifteen,15,15", "must be whole numbers")],
)  # fmt: skip
def test_stages_that_cannot_be_are_one_line(stages: str, said: str) -> None:
    parts = load_model("deepseek-v3"), load_device("h100"), load_engine("vllm")
    with pytest.raises(InputError, match=said):
        deploy(*parts, Layout(32, 8, 1, 1, 4), "decode", options=Options(pp_partition=stages))


@pytest.mark.parametrize(("model", "layout", "gb"), [("kimi-k2.5", Layout(16, 8, 2, 16), 5.64),
                                                     ("deepseek-v3", Layout(32, 1, 32, 32), 3.76)])  # fmt: skip
def test_low_latency_buffers_are_made_for_the_most_tokens(model: str, layout: Layout, gb: float) -> None:
    """At any batch, and whatever tp; and no batch is larger than what a rank may send. DeepEP's size hint at the 256
    tokens of vLLM 0.24.0 (config/scheduler.py)."""
    options = Options(all2all="low_latency")
    found = deploy(load_model(model), load_device("h200"), load_engine("vllm"), layout, "decode", options=options)
    for batch in (1, 100, 256):
        assert found.memory(batch, 1, 4096).communication / 1e9 == pytest.approx(gb, rel=0.002)
    assert found.largest_batch(1, 128) == 256
    drafting = deploy(
        load_model(model), load_device("h200"), load_engine("vllm"), layout, "decode",
        options=replace(options, mtp_depth=1),
    ) if found.raw.facts.mtp_modules else None  # fmt: skip
    assert drafting is None or drafting.largest_batch(1, 128) == 128


def test_sglang_raises_its_buffers_with_the_batch() -> None:
    """128 tokens unasked, 1,024 at most (srt/environ.py, token_dispatcher/deepep.py)."""
    found = deploy(
        load_model("deepseek-v3"), load_device("h200"), load_engine("sglang"), Layout(32, 1, 32, 32), "decode",
        options=Options(all2all="low_latency"),
    )
    sizes = [found.memory(batch, 1, 128).communication for batch in (1, 128, 256, 1024)]
    assert sizes[0] == sizes[1] and sizes[2] == pytest.approx(2 * sizes[1]) and sizes[3] == pytest.approx(8 * sizes[1])
    assert found.largest_batch(1, 128) <= 1024


def _on(model: str, device: str, gpus: int, engine: str = "vllm") -> Deployment:
    return deploy(load_model(model), load_device(device), load_engine(engine), Layout(gpus, gpus), "decode")


def test_vllm_takes_a_profiling_step_off_the_cache() -> None:
    """8,192 tokens of activations, or 1,024 sequences sampled with 14 bytes a logit: whichever is more."""
    found = _on("qwen3-235b-a22b-fp8", "h100", 4)
    memory = found.memory(1, 1, 4096)
    assert memory.activations >= 14 * 1024 * 151936
    assert found.memory(64, 1, 4096).cache_budget == memory.cache_budget  # of the engine's settings, not of the batch
    small = deploy(load_model("qwen3-0.6b"), load_device("l4"), load_engine("vllm"), Layout(1), "decode")
    assert small.memory(1, 1, 100).activations == pytest.approx(14 * 256 * 151936)  # 2,048 tokens, 256 sequences
    assert _on("qwen3-0.6b", "h100", 1, "eager").memory(1, 1, 100).activations < 1e8


def test_vllm_makes_room_for_keys_and_values_of_latents() -> None:
    """65,536 tokens of 128 keys and 128 values in bf16 for each of a rank's 128 heads: 4.3 GB, an eighth at tp 8."""
    engine, device, model = load_engine("vllm"), load_device("h200"), load_model("deepseek-v3")
    one, eight = (
        deploy(model, device, engine, Layout(16, tp, dp, 16), "decode").memory(1, 1, 4096).activations
        for tp, dp in ((1, 16), (8, 2))
    )
    assert one == 65536 * 128 * (128 + 128) * 2
    assert eight < one / 2


@pytest.mark.parametrize("log", LOGS, ids=lambda log: f"{log.model}-{log.device}-{log.release}-{log.what}")
def test_figures_of_public_logs(log: Log) -> None:
    """Weights to 2 %, tokens of the cache to 10 %, room to that or to 1 GiB; those that are said not to be are not."""
    share, least = {"weights": (0.02, 0.0), "tokens": (0.1, 0.0), "room": (0.1, 1.0)}[log.what]
    assert (ours(log) == pytest.approx(log.logged, rel=share, abs=least)) == (not log.unreached)


def test_communicators_take_room_where_a_server_has_several_gpus() -> None:
    """Beside the context that each GPU has; an engine without such a figure has one for all."""
    for engine in ("vllm", "sglang"):
        profile = load_engine(engine)
        assert profile.collective_bytes is not None
        one, four = (_on("qwen3-30b-a3b", "h100", gpus, engine) for gpus in (1, 4))
        assert one.context_bytes == float(profile.reserved_bytes)
        assert four.context_bytes == one.context_bytes + float(profile.collective_bytes)
    assert _on("qwen3-30b-a3b", "h100", 4, "eager").context_bytes == float(load_engine("eager").reserved_bytes)


def test_lines_of_the_log() -> None:
    """Qwen3-235B: 94 layers x 2 x 1 head x 128 x 2 bytes on a rank of four; tokens are concurrency times a request."""
    found = _on("qwen3-235b-a22b-fp8", "h100", 4)
    log, room = cache_log(found, 40_960), found.memory(1, 1, 0).cache_budget
    assert log.tokens == pytest.approx(room / (94 * 2 * 128 * 2), abs=1)
    assert log.concurrency == pytest.approx(log.tokens / 40_960, rel=1e-4)
    assert log.lines == (
        f"GPU KV cache size: {log.tokens:,} tokens",
        f"Maximum concurrency for 40,960 tokens per request: {log.concurrency:.2f}x",
    )
    sglang = cache_log(_on("qwen3-235b-a22b-fp8", "h100", 4, "sglang"), 40_960)
    assert sglang.lines == (f"max_total_num_tokens={sglang.tokens}",)
    assert cache_log(_on("qwen3-0.6b", "h100", 1, "eager"), 1000).lines == ()


def test_windows_keep_what_a_step_may_add() -> None:
    """gpt-oss: half of the layers keep 127 + 8,192 tokens of a request, in blocks of 16 and a block more, as vLLM
    counts them, the others all: 8,192 blocks of 131,072 tokens and 520 + 1. In 0.33 two steps are under way."""
    for engine, blocks in (("vllm==0.24.0", 520), ("vllm", 1032)):
        found = _on("gpt-oss-120b", "h100", 1, engine)
        request = 18 * 2 * 8 * 64 * 2 * 16 * (8192 + blocks + 1)
        log = cache_log(found, 131_072)
        assert log.concurrency == pytest.approx(found.memory(1, 1, 0).cache_budget / request)


def test_windows_of_sglang_have_a_share_of_the_other_layers_tokens() -> None:
    """gpt-oss: 18 layers of T tokens and 18 of 0.8 x T, whatever the window; Gemma-3, without such a pool, keeps all. A
    prompt shorter than its window takes T tokens of the smaller pool."""
    layer = 2 * 8 * 64 * 2
    found = _on("gpt-oss-120b", "h200", 1, "sglang")
    log, room = cache_log(found, 131_072), found.memory(1, 1, 0).cache_budget
    assert log.tokens == pytest.approx(room / (18 * layer * 1.8), rel=1e-5)
    assert found.held(3.0, 10_000)[1] == pytest.approx(3 * 10_000 * 18 * layer * 1.8)
    assert found.held(1.0, 100)[1] == pytest.approx(100 / 0.8 * 18 * layer * 1.8)
    pool = deploy(found.model, found.device, found.engine.in_pools(), found.layout, "decode")
    assert pool.held(1.0, 10_000)[1] == 18 * layer * (10_000 + 128)
    other = {**found.model.config, "architectures": ["Gemma3ForCausalLM"]}
    assert found.engine.cache_rules is not None
    kept = found.engine.cache_rules.kept(other, 0)
    assert kept.window_share == 1.0


def test_before_0_5_8_layers_with_windows_keep_all_in_sglang() -> None:
    """gpt-oss: 36 layers of T tokens each, on servers of both phases and of one (disable_hybrid_swa_memory); states of
    linear layers have no copies in pools all the same."""
    layer = 2 * 8 * 64 * 2
    engine = load_engine("sglang==0.5.6.post2")
    for rules in (engine, engine.in_pools()):
        found = deploy(load_model("gpt-oss-120b"), load_device("h200"), rules, Layout(1, 1, 1, 1), "decode")
        assert found.held(1.0, 10_000)[1] == 10_000 * 36 * layer
    pooled = deploy(load_model("qwen3-next-80b-a3b"), load_device("h200"), rules, Layout(2, 2, 1, 2), "decode")
    newest = deploy(pooled.model, pooled.device, load_engine("sglang").in_pools(), pooled.layout, "decode")
    assert pooled.held(3.0, 10_000)[1] == newest.held(3.0, 10_000)[1]


def test_a_pipeline_of_sglang_keeps_one_copy_of_states_less() -> None:
    """Its schedule does not overlap: 3 + 1 slots of a sequence instead of 3 + 2 (get_mamba_tracking_slots); vLLM's
    pipelines keep as many as one stage does."""
    for engine, alone, piped in (("sglang", 5, 4), ("vllm", 1, 1)):
        states = []
        for stages in (1, 2):
            layout = Layout(4, 2, 1, 2, 2) if stages == 2 else Layout(2, 2, 1, 2)
            found = deploy(load_model("qwen3-next-80b-a3b"), load_device("h200"), load_engine(engine), layout, "decode")
            rules = found.engine.cache_rules
            states.append(rules.kept(found.model.config, 0, stages).state_slots if rules else 1)
            held = found.held(1.0, 0)[1]
        assert states == [alone, piped]
    # 18 of its 36 linear layers on a stage and 16 of its 32 heads on a rank: 128 x 128 values in bf16 of each head, and
    # three inputs of a convolution of 4,096 channels
    assert held == pytest.approx(18 * (16 * 128 * 128 * 2 + 3 * 4096 * 2), rel=0.02)


@pytest.mark.parametrize(
    ("engine", "model", "depth", "slots"),
    [
        ("vllm", "qwen3-next-80b-a3b", 0, 1), ("vllm", "qwen3.5-35b-a3b", 2, 3),
        ("sglang", "qwen3-next-80b-a3b", 0, 5), ("sglang", "qwen3.5-35b-a3b", 2, 8),
        ("sglang", "ling-3.0-flash", 0, 5), ("sglang==0.5.14", "ling-3.0-flash", 0, 3),
        ("sglang", "kimi-k3", 0, 5), ("sglang", "nemotron-3-nano-30b-a3b", 0, 5),
        ("sglang==0.5.14", "nemotron-3-nano-30b-a3b", 0, 5), ("sglang==0.5.12", "nemotron-3-nano-30b-a3b", 0, 3),
        ("trtllm", "qwen3-next-80b-a3b", 0, 1),
    ],
)  # fmt: skip
def test_states_have_copies_for_prefixes_and_drafts(engine: str, model: str, depth: int, slots: int) -> None:
    """SGLang 0.5.14 lets max_mamba_cache_size / 5 requests run, / 3 without overlapped scheduling, and keeps a state of
    each token that is verified; vLLM 0.24.0 a state of each draft (MambaSpec). SGLang's pool of states is 0.9 times as
    large as that of tokens, and a sequence needs room in both."""
    options = Options(mtp_depth=depth)
    parts = load_model(model), load_device("h200"), load_engine(engine), Layout(4, 4)
    found = deploy(*parts, "decode", options=options)
    one = replace(found, engine=found.engine.model_copy(update={"cache_rules": None}))
    growing = one.held(1.0, 2000)[1] - one.held(1.0, 1000)[1]
    states = one.held(1.0, 1000)[1] - growing
    assert states > 0
    for thousands in (1, 2, 1000):
        tokens, kept = growing * thousands, slots * states
        both = max(tokens * 1.9, kept * 1.9 / 0.9) if engine.startswith("sglang") else tokens + kept
        assert found.held(1.0, 1000 * thousands)[1] == pytest.approx(both)


def test_sglang_keeps_states_in_a_pool_of_their_own() -> None:
    """max_total_num_tokens: what 0.9 parts of 1.9 for states leave, over 12 layers of two KV heads of 256."""
    found = _on("qwen3-next-80b-a3b", "h200", 4, "sglang")
    room = found.memory(1, 1, 0).cache_budget
    assert cache_log(found, 4096).tokens == pytest.approx(room / 1.9 / (12 * 2 * 256 * 2), rel=1e-3)


def test_as_many_requests_run_as_have_states_and_tokens() -> None:
    """SGLang, Qwen3-Next on an H200 of four: the smaller of both pools, in closed form and in replays; vLLM's single
    pool holds a request's states beside its tokens."""
    found = _on("qwen3-next-80b-a3b", "h200", 4, "sglang")
    values, inputs, token = 36 * 8 * 128 * 128, 36 * 3 * 2048, 12 * 2 * 256 * 2  # states in fp32, in vLLM in bf16
    room = float(found.memory(1, 1, 0).cache_budget)
    states = room * 0.9 / 1.9 / (5 * (4 * values + 2 * inputs))
    assert found.held(1.0, 1000)[1] == pytest.approx(room / states, rel=1e-2)
    assert found.held(1.0, 100_000)[1] == pytest.approx(1.9 * 100_000 * token, rel=1e-2)
    rules = rules_of(found, "both", max_sequences=10_000)
    assert rules.most_sequences == pytest.approx(states, rel=1e-2) and rules.waste < 1
    assert rules_of(found, "both", max_sequences=3).most_sequences == 3
    vllm = _on("qwen3-next-80b-a3b", "h200", 4)
    rules = rules_of(vllm, "both", max_sequences=10_000)
    assert rules.most_sequences == 10_000
    assert rules.waste == pytest.approx(2 * (values + inputs) / token + (rules.block_tokens - 1) / 2, rel=1e-2)


@pytest.mark.parametrize(("layout", "logged"), [("tp8", 20.43), ("dp8-ep8", 156.9 / 8)])
def test_a_compressed_cache_takes_blocks_of_every_group(layout: str, logged: float) -> None:
    """DeepSeek-V4-Flash on 8 B200, vLLM 0.25, 0.95 of memory, 1M tokens a request (vllm#51454, vllm recipes#762). A
    block has pages of 22 windows or entries of ratio 4 (64 of 584 bytes, in 576s), of 21 indexers' keys (64 of 132) and
    of 20 layers of ratio 128 (2 entries); a decoding request takes one for 256 tokens, three for each half of the
    windows, three and 17 for what is not compressed yet, of windows of 8 and 128."""
    parts = load_model("deepseek-v4-flash"), load_device("b200"), load_engine("vllm==0.24.0"), parse_layout(layout)
    found = deploy(*parts, "decode", options=Options(memory_fraction=0.95))
    block = 22 * 37_440 + 21 * 8640 + 20 * 1728
    for length in (1, 300, 8192, 1 << 20):
        fixed = 2 * (-(-min(length, 128) // 64) + 1) + -(-min(length, 8) // 4) + 1 + -(-min(length, 128) // 8) + 1
        assert found.held(3.0, length)[1] == 3 * block * (-(-length // 256) + fixed)
    assert cache_log(found, 1 << 20).concurrency == pytest.approx(logged, rel=0.1)
    newest = deploy(*parts[:2], load_engine("vllm"), parts[3], "decode", options=Options(memory_fraction=0.95))
    room = float(newest.memory(1, 1, 0).cache_budget) // block
    step = 2 * 16_384  # two steps under way; blocks of its groups are counted whole
    each = 4096 + 2 * (-(-(127 + step) // 64) + 1) + -(-(7 + step) // 4) + 1 + -(-(127 + step) // 8) + 1
    assert cache_log(newest, 1 << 20).concurrency == pytest.approx(room / each)
    rules = rules_of(found, "both")
    assert rules.waste == pytest.approx(26 * 256 + (rules.block_tokens - 1) / 2)
    assert rules.cache_tokens == pytest.approx(float(found.memory(1, 1, 0).cache_budget) / block * 256, rel=1e-2)


def test_little_room_is_said() -> None:
    run = tc.simulate("gpt-oss-120b", device="h100", batch=1, context=1000, allow_oversize=True)
    room = run.deployment.memory(1, 1, 0).cache_budget
    assert any("less than the error" in note for note in run.notes) == (room < ROOM_ERROR_BYTES)
    device = run.deployment.device
    small = device.model_copy(update={"memory_bytes": device.memory_bytes.model_copy(update={"value": 80e9})})
    assert "it may not start" in room_note(replace(run.deployment, device=small))
    assert room_note(_on("qwen3-0.6b", "h100", 1)) == ""
    totals = run.totals()
    assert totals["engine_log"]["tokens"] == run.log.tokens and totals["engine_log"]["lines"]


@pytest.mark.parametrize(
    ("engine", "model", "asked", "bytes_each"),
    [
        ("vllm", "qwen3-next-80b-a3b", None, 2), ("sglang", "qwen3-next-80b-a3b", None, 4),
        ("trtllm", "qwen3-next-80b-a3b", None, 2), ("sglang", "qwen3-next-80b-a3b", "bfloat16", 2),
        ("vllm", "qwen3-next-80b-a3b", "float32", 4), ("vllm", "qwen3.5-35b-a3b", None, 4),
        ("trtllm", "qwen3.5-35b-a3b", None, 2), ("sglang", "qwen3.5-35b-a3b", "float16", 2),
    ],
)  # fmt: skip
def test_states_are_as_wide_as_the_engine_keeps_them(
    engine: str, model: str, asked: str | None, bytes_each: int
) -> None:
    """By hand: of each linear layer 32 value heads of 128 x 128, and three columns of a short convolution over 8,192
    numbers in bf16. vLLM 0.24.0 keeps states as activations but for Qwen3.5, whose file says float32."""
    options, device = Options(state_dtype=asked), load_device("h200")
    found = deploy(load_model(model), device, load_engine(engine), Layout(1), "decode", options=options)
    one = replace(found, engine=found.engine.model_copy(update={"cache_rules": None}))
    growing = one.held(1.0, 2000)[1] - one.held(1.0, 1000)[1]
    layers = 36 if model.startswith("qwen3-next") else 30
    by_hand = layers * (32 * 128 * 128 * bytes_each + 3 * 8192 * 2)
    assert one.held(1.0, 1000)[1] - growing == pytest.approx(by_hand)


def test_narrower_states_make_a_decode_step_shorter_and_unknown_ones_are_refused() -> None:
    parts = load_model("qwen3-next-80b-a3b"), load_device("h200"), load_engine("sglang"), Layout(1), "decode"
    wide, narrow = (
        deploy(*parts, options=Options(state_dtype=dtype)).step.price(64, 1, 1000).seconds
        for dtype in ("float32", "bfloat16")
    )
    assert narrow < wide
    with pytest.raises(InputError, match="unknown --state-dtype 'int4'"):
        deploy(*parts, options=Options(state_dtype="int4"))
