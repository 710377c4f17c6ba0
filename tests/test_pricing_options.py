"""What a deployment can choose beside its layout, held to hand counts: kernels, shared experts, drafts, overlap."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tensorcast as tc
from tensorcast.cost.contention import Contention, beside
from tensorcast.cost.routing import ExpertLoad
from tensorcast.deploy.deployment import Deployment, deploy
from tensorcast.deploy.layout import Layout, parse_layout
from tensorcast.deploy.options import Options
from tensorcast.deploy.plan.plan import Collective
from tensorcast.deploy.step.overlap import Overlap
from tensorcast.errors import InputError
from tensorcast.profiles.store import load_device, load_engine, load_model

EP32, TP8 = parse_layout("dp32-ep32"), parse_layout("tp8-dp4-ep32")
HIDDEN, WIDTH, LAYERS, MOE_LAYERS, TOP_K, EXPERTS = 7168, 2048, 61, 58, 8, 256  # DeepSeek-V3


BARE = "mi300a"
"""A device of which no kernels were measured: prices are the formulas'."""


def deepseek(
    layout: Layout = EP32, engine: str = "sglang", phase: str = "decode", device: str = "h200", **options: Any
) -> Deployment:
    return deploy(
        load_model("deepseek-v3"), load_device(device), load_engine(engine), layout, phase, options=Options(**options)
    )


def rows_of(deployment: Deployment, batch: float, name: str, past: float = 4096.0, new: float = 1.0) -> list[Any]:
    """(price, calls) of the rows with this name, MoE layers and drafts alike."""
    price = deployment.step.price(batch, new, past)
    return [
        (p, n)
        for p, n in price.calls
        if (p.row.op if isinstance(p.row, Collective) else p.row.name) == name
    ]


seconds = st.floats(0.0, 10.0)
slower = st.floats(1.0, 3.0)


@given(seconds, seconds, slower, slower)
def test_beside_is_what_a_clock_would_show(compute: float, moved: float, k: float, m: float) -> None:
    """Each makes 1/slowdown of its progress while both run: whoever ends first, the other goes on at full speed."""
    first = min(compute * k, moved * m)
    rest = max(compute - first / k, 0.0) + max(moved - first / m, 0.0)
    assert beside(compute, moved, Contention(k, m)) == pytest.approx(first + rest, abs=1e-9)


@given(seconds, seconds, st.floats(0, 1), st.floats(0, 1))
def test_two_streams_never_beat_the_longer_nor_lose_to_running_in_turn(a: float, b: float, p: float, q: float) -> None:
    overlap = Overlap({0: {"experts": [0], "shared": [1]}}, external=False, contention=None, stream_tokens=1.0)
    layers, busy = np.array([[0.0, b, a, 0.0, 0.0, 0.0]]), np.array([[a * p, b * q]])
    saved, _ = overlap.hidden(layers, busy, 1.0, False)[0]
    assert max(a, b) - 1e-12 <= a + b - float(saved) <= a + b + 1e-12


def test_batched_mm_copies_an_expert_per_row() -> None:
    found = rows_of(deepseek(experts_backend="batched_mm"), 16.0, "grouped_matmul")
    rows = 16 * TOP_K  # balanced: as many come as go
    copies = rows * 3 * HIDDEN * WIDTH * (1 + 4 / 128**2)
    assert sum(float(p.bytes) for p, _ in found) > 3 * copies  # written once, read twice
    assert sum(float(p.flops) for p, _ in found) == pytest.approx(2 * rows * 3 * HIDDEN * WIDTH)


def test_eager_launches_a_gemm_per_hit_expert_and_needs_longer() -> None:
    eager, grouped = (
        rows_of(deepseek(experts_backend=b, device=BARE), 64.0, "grouped_matmul") for b in ("eager", "grouped_mm")
    )
    gap = float(load_device(BARE).graph_gap_s or 0.0)
    for (one, _), (other, _) in zip(eager, grouped, strict=True):
        assert float(one.flops) == pytest.approx(float(other.flops))
        assert float(one.parts["latency"]) == pytest.approx(8 * (3e-6 + gap), rel=0.6)  # 8 local experts, some us each
        assert float(one.seconds) > float(other.seconds)


def test_masked_pays_for_its_capacity_where_the_kernel_does() -> None:
    """Transformers' bmm computes every expert's full capacity, DeepGEMM leaves out what is empty."""
    masked, grouped = (
        rows_of(deepseek(engine="eager", experts_backend=b), 256.0, "grouped_matmul")
        for b in ("masked", "decode=grouped_mm")
    )
    for (one, _), (other, _) in zip(masked, grouped, strict=True):
        assert float(one.flops) == pytest.approx(float(other.flops))
        assert float(one.seconds) > 10 * float(other.seconds)  # capacity 32 * 256 rows an expert, 256 of them used
    skipping, plain = (
        deepseek(experts_backend=b, device=BARE).step.seconds(256.0, 1.0, 4096.0) for b in ("masked", "grouped_mm")
    )
    assert plain <= skipping < 1.2 * plain


def test_the_exchange_and_the_phase_choose_the_backend() -> None:
    assert deepseek().step.plan.backend == "masked"
    assert deepseek(phase="prefill").step.plan.backend == "contiguous"
    assert deepseek(engine="vllm").step.plan.backend == "grouped_mm"
    by_phase = "prefill=eager,decode=batched_mm"
    assert deepseek(experts_backend=by_phase).step.plan.backend == "batched_mm"
    assert deepseek(phase="prefill", experts_backend=by_phase).step.plan.backend == "eager"
    for wrong in ("cutlass", "prefill=cutlass"):
        with pytest.raises(InputError, match=r"unknown experts backend 'cutlass'"):
            deepseek(phase="prefill", experts_backend=wrong)


def test_transformers_decodes_in_copies_on_a_gpu_only() -> None:
    assert deepseek(engine="eager").step.plan.backend == "batched_mm"
    assert deepseek(engine="eager", phase="prefill").step.plan.backend == "grouped_mm"
    cpu = load_device("h200").model_copy(update={"name": "cpu"})
    model, layout = load_model("mixtral-8x7b"), parse_layout("tp1")
    for wanted in ("auto", "grouped_mm"):
        options = Options(experts_backend=wanted)
        plan = deploy(model, cpu, load_engine("eager"), layout, "decode", options=options).step.plan
        assert plan.backend == "grouped_mm"


def test_chunks_are_priced_as_the_chunks_they_are() -> None:
    """256 tokens in four chunks: the experts' rows cost four times what 64 tokens cost, the rest is unchanged."""
    chunked, whole = deepseek(chunk_tokens=64), deepseek()
    for name in ("grouped_matmul", "init_routing_v2", "all_to_all"):
        parts = rows_of(chunked, 256.0, name)
        for (p, _), (small, _) in zip(parts, rows_of(whole, 64.0, name), strict=True):
            assert float(p.seconds) == pytest.approx(4 * float(small.seconds))
    attention = [float(rows_of(d, 256.0, "attention")[0][0].seconds) for d in (chunked, whole)]
    assert attention[0] == attention[1]
    assert chunked.memory(256, 1, 4096).activations <= whole.memory(256, 1, 4096).activations


def test_drafted_tokens_share_the_cache_but_not_the_arithmetic() -> None:
    plain, drafting = deepseek(), deepseek(mtp_depth=2)
    (one, n), *_ = rows_of(plain, 32.0, "attention")
    (three, m), *draft = rows_of(drafting, 32.0, "attention")
    assert n == m and draft
    assert float(three.flops) == pytest.approx(3 * float(one.flops), rel=1e-3)  # one key more or less at the ends
    queries = 2 * 32 * 128 * (2 * 512 + 64) * 2  # two more tokens' queries and outputs
    assert float(three.bytes) - float(one.bytes) == pytest.approx(queries, rel=0.01)
    price = drafting.step.price(32.0, 1.0, 4096.0)
    drafted = [(p, n) for p, n in price.calls if p.row.module.startswith("mtp.")]
    assert {n for _, n in drafted} == {2}
    assert any("eh_proj" in p.row.module and float(p.flops) == 2 * 32 * 2 * HIDDEN * HIDDEN for p, _ in drafted)
    more = drafting.memory(32, 1, 4096)
    less = plain.memory(32, 1, 4096)
    assert float(more.kv_cache / less.kv_cache) == pytest.approx((LAYERS + 1) / LAYERS)
    assert more.weights > less.weights + EXPERTS / 32 * 3 * HIDDEN * WIDTH
    with pytest.raises(InputError, match="no multi-token prediction module"):
        deploy(load_model("mixtral-8x7b"), load_device("h200"), load_engine("vllm"), parse_layout("tp8"), "decode",
               options=Options(mtp_depth=1))  # fmt: skip


def shared(deployment: Deployment, batch: float) -> tuple[float, int]:
    """FLOPs of one layer's shared expert on a rank, and all-reduces after it."""
    price = deployment.step.price(batch, 1.0, 4096.0)
    inside = [p for p in price.rows if "shared_experts" in p.row.module]
    sums = [p for p in inside if isinstance(p.row, Collective) and p.row.op == "all_reduce" and not p.row.label]
    return sum(float(p.flops) for p in inside), len(sums)


def test_shared_expert_whole_on_every_rank() -> None:
    """Full width on a tp-th of the tokens: the same FLOPs, tp times the weights, no all-reduce."""
    cut, whole = (deepseek(TP8, "trtllm", all2all="direct", shared_expert_tp=one) for one in (True, False))
    assert shared(deepseek(TP8), 64.0) == shared(whole, 64.0)  # SGLang holds them whole where rows travel
    assert shared(cut, 64.0) == (2 * 64 * 3 * HIDDEN * WIDTH / 8, 1)
    assert shared(whole, 64.0) == (2 * 64 * 3 * HIDDEN * WIDTH / 8, 0)
    more = MOE_LAYERS * 3 * HIDDEN * WIDTH * (1 + 4 / 128**2) * 7 / 8
    assert whole.memory(1, 1, 0).weights - cut.memory(1, 1, 0).weights == pytest.approx(more)


def test_external_shared_experts_take_their_rows_and_their_weights_elsewhere() -> None:
    inside, outside = deepseek(), deepseek(external_shared_experts=4)
    assert isinstance(outside.step.sizes.load, ExpertLoad) and outside.step.sizes.load.ranks == 28
    assert shared(outside, 64.0)[0] == 2 * 64 * (32 / 4) * 3 * HIDDEN * WIDTH  # 32 ranks' tokens on 4
    sent = [float(rows_of(d, 64.0, "all_to_all")[0][0].wire_bytes) for d in (inside, outside)]
    assert sent[1] == pytest.approx(sent[0] * (TOP_K + 1) / TOP_K)
    experts = MOE_LAYERS * (10 - 8) * 3 * HIDDEN * WIDTH  # 256 experts on 28 ranks: 10 on the fullest, not 8
    gone = MOE_LAYERS * 3 * HIDDEN * WIDTH
    scales = 1 + 4 / 128**2
    difference = outside.memory(1, 1, 0).weights - inside.memory(1, 1, 0).weights
    assert difference == pytest.approx((experts - gone) * scales)
    price = outside.step.price(64.0, 1.0, 4096.0)
    part = {"experts": 0.0, "shared": 0.0}
    for p in price.rows:
        if not isinstance(p.row, Collective) and p.row.kind == 1:
            place = "experts" if p.row.stage else "shared" if "shared_experts" in p.row.module else ""
            part[place] = part.get(place, 0.0) + float(p.seconds)
    assert float(price.hidden_s) == pytest.approx(MOE_LAYERS * min(part["experts"], part["shared"]))


@pytest.mark.parametrize(
    ("layout", "options", "words"),
    [
        ("tp8-dp4-ep32", {"engine": "vllm", "external_shared_experts": 2}, "all-to-all"),
        ("dp32-ep32", {"external_shared_experts": 32}, "leaves none of ep = 32"),
        ("tp32", {"dual_batch_overlap": True}, "here it is none"),
        ("dp32-ep32", {"engine": "vllm", "dual_batch_overlap": True}, "allgather_reducescatter"),
        ("dp32-ep32", {"redundant_experts": 3, "placement": "eplb"}, "do not divide over 32 ranks"),
        ("dp32-ep32", {"chunk_tokens": -1}, "--chunk-tokens -1"),
    ],
)
def test_options_that_cannot_be(layout: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        deepseek(parse_layout(layout), **options)


def by_place(deployment: Deployment, batch: float) -> dict[str, float]:
    """Seconds of one MoE layer at ``batch``: what comes before the attention itself and the rest of it, shared expert,
    experts, dispatch, combine."""
    part = dict.fromkeys(("before", "rest", "shared", "experts", "dispatch", "combine"), 0.0)
    at = "before"
    for p in deployment.step.price(batch, 1.0, 4096.0).rows:
        if p.row.kind == 1:
            if isinstance(p.row, Collective):
                place = p.row.label or at
            else:
                at = "rest" if p.row.name == "attention" else at
                place = "experts" if p.row.stage else "shared" if ".shared_expert" in p.row.module else at
            part[place] += float(p.seconds)
    return part


@pytest.mark.parametrize(("engine", "staged"), [("sglang", True), ("vllm", False)])
def test_dual_batch_overlap_prices_halves_and_can_lose(engine: str, staged: bool) -> None:
    """In SGLang's decode steps one half is two stages behind the other, in the order of SGLang 0.5.14's
    _compute_moe_deepseek_blog_decode: dispatch while the shared expert of its own half and the projections of the other
    run, combine while the other attends. vLLM's two threads change places at each exchange, and a shared expert runs
    when its half's tokens are on their way back (0.33.0, fused_moe/modular_kernel.py, _finalize)."""
    serial, dual = (deepseek(engine=engine, all2all="low_latency", dual_batch_overlap=dual) for dual in (False, True))
    half = by_place(serial, 64.0)
    price = dual.step.price(128.0, 1.0, 4096.0)
    k, m = 1.08, 1.1  # low latency: no SMs taken
    first, then, moved = half["before"] + half["shared"], half["rest"], (half["dispatch"], half["combine"])
    pairs = [(first, moved[0]), (then, moved[1]), (half["experts"], 0.0)] * 2 if staged else [
        (first + then, moved[1]), (half["before"] + then, moved[0]),
        (half["experts"], moved[0]), (half["experts"] + half["shared"], moved[1]),
    ]
    together = sum(
        max(c * k, t * m) - (k - 1 if c * k > t * m else m - 1) / (k if c * k > t * m else m) * abs(c * k - t * m)
        for c, t in pairs
    )
    assert all(half.values())
    assert 2 * sum(half.values()) - float(price.hidden_s) / MOE_LAYERS == pytest.approx(together)
    few = 8.0 if staged else 40.0  # vLLM halves no fewer than 32
    gain = [serial.step.seconds(b, 1.0, 4096.0) / dual.step.seconds(b, 1.0, 4096.0) for b in (few, 256.0)]
    assert gain[0] < 1.0 < gain[1]


def test_communication_is_either_exposed_or_hidden() -> None:
    for options in ({}, {"dual_batch_overlap": True}, {"external_shared_experts": 4}):
        price = deepseek(**options).step.price(64.0, 1.0, 4096.0)
        moved = sum(
            float(p.seconds) * n for p, n in price.calls if isinstance(p.row, Collective)
        )
        assert float(price.exposed_comm_s + price.hidden_comm_s) == pytest.approx(moved)
        assert float(price.exposed_comm_s) >= 0


def test_a_shared_expert_streams_beside_in_small_captured_steps_only() -> None:
    deployment = deepseek(engine="vllm")
    hidden = [float(deployment.step.price(b, 1.0, 4096.0).hidden_s) for b in (64.0, 256.0, 257.0)]
    assert hidden[0] > 0 and hidden[1] > 0 and hidden[2] == 0.0
    assert float(deepseek(engine="vllm", phase="prefill").step.price(1.0, 64.0, 0.0).hidden_s) == 0.0


@pytest.mark.parametrize(
    "options",
    [{}, {"dual_batch_overlap": True}, {"mtp_depth": 1}, {"chunk_tokens": 48}, {"external_shared_experts": 4}],
)
def test_arrays_price_and_weigh_as_their_entries_do(options: dict[str, Any]) -> None:
    deployment = deepseek(**options)
    batches = np.array([2.0, 31.0, 64.0, 300.0])
    price = deployment.step.price(batches, 1.0, 4096.0)
    memory = deployment.memory(batches, 1, 4096)
    for i, batch in enumerate(batches):
        one = deployment.step.price(float(batch), 1.0, 4096.0)
        for name in ("seconds", "hidden_s", "hidden_comm_s", "exposed_comm_s"):
            assert np.broadcast_to(getattr(price, name), 4)[i] == pytest.approx(float(getattr(one, name)), rel=1e-12)
        assert np.broadcast_to(memory.total, 4)[i] == pytest.approx(deployment.memory(int(batch), 1, 4096).total)
    largest = deployment.largest_batch(1, 4096)
    assert deployment.memory(largest, 1, 4096).fits and not deployment.memory(largest + 1, 1, 4096).fits


def test_a_norm_after_a_small_all_reduce_inside_a_node_is_not_launched() -> None:
    """vLLM on Hopper at tp 8: up to half a MiB, 64 tokens of 4096 bf16 numbers."""

    def launches(engine: str, batch: float) -> list[float]:
        deployment = deploy(
            load_model("qwen3-235b-a22b"), load_device("h100"), load_engine(engine), parse_layout("tp8"), "decode"
        )
        rows = deployment.step.price(batch, 1.0, 4096.0).rows
        return [
            float(p.parts["latency"])
            for p in rows
            if not isinstance(p.row, Collective) and "norm" in str(p.row.attrs.get("label"))
        ]

    assert launches("vllm", 64.0).count(0.0) == 2
    assert 0.0 not in launches("vllm", 65.0)
    assert launches("trtllm", 65.0).count(0.0) == 2
    assert 0.0 not in launches("eager", 1.0)


@pytest.mark.parametrize(("scheme", "bits"), [("fp8", 8), ("fp8_block", 8.25), ("logfmt10", 10.25), ("bf16", 16)])
def test_results_come_back_in_what_was_asked_for(scheme: str, bits: float) -> None:
    """Bits of a number, an fp32 scale per 128 included; what is sent out is as before."""
    plain, combined = deepseek(), deepseek(combine=scheme)
    for (p, _), (q, _) in zip(*(rows_of(d, 64.0, "all_to_all") for d in (plain, combined)), strict=True):
        share = bits / 16 if p.row.label == "combine" else 1.0
        assert q.row.label == p.row.label and float(q.wire_bytes) == pytest.approx(share * float(p.wire_bytes))
    assert combined.step.price(64.0, 1.0, 4096.0).seconds <= plain.step.price(64.0, 1.0, 4096.0).seconds


@pytest.mark.parametrize("all2all", ["high_throughput", "direct", "allgather_reducescatter"])
def test_results_in_fp8_need_smaller_buffers(all2all: str) -> None:
    """A byte less for every number that comes back: of 64 tokens' 8 rows, or of all 32 ranks' tokens."""
    said: dict[str, Any] = {"all2all": all2all, "quant": "bf16"}  # sglang would cut its FP8 shared expert in a block
    plain, combined = (deepseek(combine=c, **said).memory(64, 1, 4096) for c in (None, "fp8"))
    rows = 64 * (32 if all2all == "allgather_reducescatter" else TOP_K)
    assert float(plain.communication - combined.communication) == pytest.approx(rows * HIDDEN)


def test_combine_in_totals_and_words() -> None:
    from tensorcast.report.simulate.words import numerics

    said = {"device": "h100", "world_size": 2, "dp": 2, "ep": 2, "all2all": "low_latency"}
    for asked, name in ((None, "bf16"), ("logfmt10", "logfmt10")):
        totals = tc.simulate("mixtral-8x7b", **said, combine=asked).totals()  # type: ignore[arg-type]
        assert totals["combine_dtype"] == name
        assert ("back in logfmt10" in numerics(totals)) == (asked is not None)
    for wrong, words in (("fp7", "unknown --combine dtype 'fp7'"), ("mxfp4", "unknown --combine dtype 'mxfp4'")):
        with pytest.raises(InputError, match=words):
            deepseek(combine=wrong)
    with pytest.raises(InputError, match="only the low_latency exchange has it, and here it is high_throughput"):
        deepseek(combine="logfmt10", all2all="high_throughput")


def test_mxfp4_experts_hold_and_send_a_rounded_hidden_size() -> None:
    """gpt-oss: 2880 becomes 3072 where the engine's kernels want multiples of 256."""
    model, device, layout = load_model("gpt-oss-120b"), load_device("h200"), parse_layout("dp8-ep8")
    exchange = Options(all2all="low_latency")
    padded, plain = (
        deploy(model, device, load_engine(e), layout, "decode", options=exchange) for e in ("vllm", "eager")
    )
    experts = 36 * 128 / 8 * 3 * 2880 * 2880 * (0.5 + 1 / 32)
    difference = padded.memory(1, 1, 0).weights - plain.memory(1, 1, 0).weights
    assert difference == pytest.approx(experts * (3072 / 2880 - 1), rel=1e-3)  # biases too
    sent = [rows_of(d, 8.0, "all_to_all")[0][0].wire_bytes for d in (padded, plain)]
    assert sent[0] / sent[1] == pytest.approx(3072 / 2880)


@pytest.mark.parametrize("text", ["", "tp8-tp2", "ep", "tp0x", "8", "tp0", "tp2-dp0"])
def test_layouts_that_cannot_be_read(text: str) -> None:
    with pytest.raises(InputError, match=r"tp, dp, ep, pp|at least 1"):
        parse_layout(text)


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64), st.integers(1, 8))
def test_layouts_read_back(tp: int, dp: int, ep: int, pp: int) -> None:
    layout = Layout(tp * dp * pp, tp, dp, ep, pp)
    assert parse_layout(str(layout)) == layout


@pytest.mark.parametrize(
    ("wanted", "runs"),
    [
        ({"prefill": "contiguous", "decode": "masked"}, "masked"),
        ({"": "eager"}, "eager"),
        ({"text_config": "batched_mm"}, "batched_mm"),
    ],
)
def test_backends_from_a_dict(wanted: dict[str, str], runs: str) -> None:
    run = tc.simulate("mixtral-8x7b", device="h100", world_size=2, batch=4, experts_backend=wanted)
    assert run.totals()["experts_backend"] == runs
