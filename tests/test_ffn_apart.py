"""Attention and FFN apart: both sides are the whole step, dealt out; the ping-pong, event by event."""

from __future__ import annotations

import heapq
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import tensorcast as tc
from tensorcast.cli.app import app
from tensorcast.deploy.ffn_apart import ffn_paths, ping_pong
from tensorcast.deploy.layout import parse_layout

times = st.floats(0.1, 5.0)


@given(times, times, st.floats(0.0, 1.0), st.integers(1, 5), st.integers(1, 9))
def test_layers_alike_follow_the_published_formula(
    a: float, f: float, share: float, count: int, layers: int
) -> None:
    """MegaScale-Infer (arXiv:2504.02263, section 4.1): where micro-batches are enough that the longer side never
    waits, ``(Ta + Tf + 2 Tc) + Tmax (m L - 1)``."""
    way = share * max(a, f)
    found = float(ping_pong([a] * layers, [f] * layers, way, count))
    if count * max(a, f) >= a + f + 2 * way:
        assert found == pytest.approx(a + f + 2 * way + max(a, f) * (count * layers - 1))
    if count == 1:
        assert found == pytest.approx(layers * (a + f + 2 * way))
    assert found >= max(count * layers * max(a, f), layers * (a + f + 2 * way)) - 1e-9


@given(st.data())
def test_it_is_what_an_event_by_event_simulation_counts(data: Any) -> None:
    layers, count = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    attention, ffn = (data.draw(st.lists(times, min_size=layers, max_size=layers)) for _ in range(2))
    way = data.draw(st.floats(0.0, 2.0))
    stages = [(where, seconds) for a, f in zip(attention, ffn, strict=True)
              for where, seconds in (("A", a), ("there", way), ("F", f), ("back", way))]  # fmt: skip
    free = dict.fromkeys(("A", "there", "F", "back"), 0.0)
    served = {where: [s for s in range(len(stages)) if stages[s][0] == where] for where in free}
    order = {where: [(s, i) for s in steps for i in range(count)] for where, steps in served.items()}
    done: dict[tuple[int, int], float] = {}
    heap = [(0.0, where) for where in free]
    while heap:  # whoever is free takes its next task as soon as that is ready
        now, where = heapq.heappop(heap)
        if not order[where]:
            continue
        step, i = order[where][0]
        ready = done.get((step - 1, i), 0.0 if step == 0 else np.inf)
        if ready == np.inf:
            heapq.heappush(heap, (min((t for t, w in heap if w != where), default=now) + 1e-9, where))
            continue
        order[where].pop(0)
        end = max(free[where], ready) + stages[step][1]
        free[where] = done[step, i] = end
        heapq.heappush(heap, (end, where))
    assert float(ping_pong(attention, ffn, way, count)) == pytest.approx(max(done.values()), abs=1e-6)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(("qwen3-30b-a3b", "deepseek-v2-lite", "gpt-oss-20b")), st.integers(1, 300), st.integers(1, 9000))
def test_one_rank_of_each_side_runs_the_whole_step(model: str, batch: int, context: int) -> None:
    """One micro-batch, one GPU a side: the step of one GPU, and each layer's two ways."""
    apart = tc.simulate_apart(
        model, device="h200", ffn_gpus=1, batch=batch, context=context, micro_batches=1, allow_oversize=True
    )
    whole = tc.simulate(model, device="h200", batch=batch, context=context, allow_oversize=True)
    layers = len(whole.deployment.raw.layer_kinds)
    ways = 2 * layers * float(apart.hand_over_s)
    assert apart.seconds == pytest.approx(whole.step_s + ways, rel=1e-6)
    attention, ffn = apart.apart.memory(batch, context)
    assert attention.weights + ffn.weights == pytest.approx(whole.memory.weights)
    assert attention.kv_cache == pytest.approx(whole.memory.kv_cache) and ffn.kv_cache == 0


def test_experts_are_dealt_out_and_the_rest_is_on_every_rank() -> None:
    """DeepSeek-V3, counted by hand: 58 layers of 256 experts and a shared one, each of three 7168 x 2048 matrices in
    FP8 with a scale of four bytes per block of 128 x 128; three dense MLPs 18432 wide; gates in bf16."""
    found = tc.simulate_apart("deepseek-v3", device="h200", dp=8, ffn_gpus=8)
    attention, ffn = found.apart.memory(1, 4096)
    fp8 = 1 + 4 / 128**2
    expert = 3 * 7168 * 2048 * fp8
    held = 58 * (256 / 8 + 1) * expert + 3 * 3 * 7168 * 18432 * fp8 + 58 * 256 * 7168 * 2
    assert ffn.weights == pytest.approx(held, rel=2e-3)
    whole = tc.simulate("deepseek-v3", device="h200", world_size=8, dp=8, ep=8, allow_oversize=True)
    assert attention.weights == pytest.approx(whole.memory.weights - held, rel=2e-3)


def test_a_hidden_state_is_sent_by_the_busier_end() -> None:
    """24 attention ranks of 32 sequences, as two micro-batches, to 8 FFN ranks: 48 tokens of 7168 numbers in bf16
    come to each over 400 Gb/s."""
    found = tc.simulate_apart("deepseek-v3", device="h200", dp=24, ffn_gpus=8, batch=32)
    tier = found.apart.attention.device.interconnect[-1]
    sent = 48 * 7168 * 2
    assert found.apart.sent_bytes(16.0) == sent
    assert found.hand_over_s == pytest.approx(float(tier.latency_s) + sent / float(tier.bandwidth_bytes_per_s))
    near = tc.simulate_apart("qwen3-30b-a3b", device="h200", dp=4, ffn_gpus=4, batch=32)
    assert near.hand_over_s < found.hand_over_s / 2


def test_what_is_ffn_is_told_of_every_shipped_model() -> None:
    """Of layers that attend alone, or are a mixer of tokens, nothing is FFN; dense layers' MLPs are."""
    names = ("deepseek-v3", "nemotron-3-nano-30b-a3b", "qwen3-next-80b-a3b", "mixtral-8x7b", "gpt-oss-120b")
    tables = {name: tc.simulate(name, device="h200", allow_oversize=True).deployment.step.table for name in names}
    paths = ffn_paths(tables["deepseek-v3"])
    assert sorted(path.rpartition(".")[2] for path in paths.values()) == ["mlp", "mlp"]
    for name, table in tables.items():
        for kind, path in ffn_paths(table).items():
            inside = [op.name for op in table.ops if op.kind == kind and op.module.startswith(path)]
            assert not {"attention", "kv_cache_write", "ssm_scan", "linear_attention"} & {*inside}, (name, path)
            assert {"mm", "addmm", "grouped_matmul"} & {*inside}, (name, path)


@pytest.mark.parametrize(("words", "says"), [
    (["--ffn-gpus", "3", "--dp", "8"], "256 experts do not divide over 3"),
    (["--ffn-gpus", "16", "--dp", "8"], "more than the 8 attention ranks"),
    (["--ffn-gpus", "8", "--dp", "8", "--phase", "prefill"], "is of decode steps"),
    (["--ffn-gpus", "8", "--dp", "8", "-n", "32"], "16"), (["--micro-batches", "2"], "is of --ffn-gpus"),
    (["--ffn-gpus", "8", "--dp", "8", "--micro-batches", "0"], "at least 1"),
    (["--ffn-gpus", "8", "--dp", "8", "--mtp-depth", "1"], "drafts are not simulated"),
    (["--ffn-gpus", "8", "--dp", "8", "--dual-batch-overlap"], "is what --micro-batches do"),
    (["--ffn-gpus", "4", "--dp", "8"], "use more FFN GPUs"),
    (["--ffn-gpus", "8", "--dp", "8", "-b", "4000"], "the largest --batch that fits"),
])  # fmt: skip
def test_bad_input_is_one_line(words: list[str], says: str) -> None:
    done = CliRunner().invoke(app, ["simulate", "deepseek-v3", "-d", "h200", *words])
    assert done.exit_code == 2 and says in " ".join(done.output.split()), done.output


def test_a_split_is_asked_for_by_its_name() -> None:
    """As ``compare --ffn-apart`` prints it."""
    words = ["simulate", "deepseek-v3", "-d", "h200", "-b", "16", "--json"]
    named, sized = (
        CliRunner().invoke(app, [*words, *own]).stdout
        for own in (["-l", "tp1-dp24 + ffn8"], ["--dp", "24", "--ffn-gpus", "8"])
    )
    assert named == sized and json.loads(named)["layout"] == "tp1-dp24 + ffn8"
    done = CliRunner().invoke(app, [*words, "-l", "dp24+ffn8", "--ffn-gpus", "8"])
    assert done.exit_code == 2 and "leave out --ffn-gpus" in done.output


def test_dense_models_have_no_ffn_ranks() -> None:
    with pytest.raises(tc.InputError, match="has no experts"):
        tc.simulate_apart("qwen3-8b", device="h200", dp=2, ffn_gpus=1)


def test_pools_of_two_devices_have_no_splits() -> None:
    """Their decode pools are of another device than the one that would be split."""
    words = ["compare", "qwen3-30b-a3b", "-d", "h200", "--decode-device", "h100", "-n", "4", "-i", "500", "-o", "100"]
    done = CliRunner().invoke(app, [*words, "--ffn-apart"])
    assert done.exit_code == 2 and "leave out --decode-device h100-sxm" in done.output


def test_splits_stand_beside_the_best_whole_server() -> None:
    words = ["compare", "qwen3-30b-a3b", "-d", "h100", "-n", "8", "-i", "2000", "-o", "500", "--tpot", "20ms",
             "--ffn-apart"]  # fmt: skip
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    (found,) = json.loads(done.stdout)["ffn_apart"]
    best, whole = found["apart"][0], found["whole"]
    assert found["apart"] == sorted(found["apart"], key=lambda one: -one["tokens_per_s_per_gpu"])
    assert all(one["step_s"] <= 0.02 and one["gpus"] <= 8 for one in (*found["apart"], whole))
    attention, _, ffn = best["layout"].partition(" + ffn")
    tp, dp = (int(word[2:]) for word in attention.split("-"))
    alone = tc.simulate_apart(
        "qwen3-30b-a3b", device="h100", tp=tp, dp=dp, ffn_gpus=int(ffn), batch=int(best["batch"]), context=2250,
        all2all="auto" if best["exchange"] == "none" else best["exchange"], routing="typical",
    )  # fmt: skip
    assert alone.seconds == pytest.approx(best["step_s"], rel=1e-6)
    layout = parse_layout(whole["layout"])
    server = tc.simulate(
        "qwen3-30b-a3b", device="h100", tp=layout.tp, dp=layout.dp, ep=layout.ep, pp=layout.pp,
        batch=int(whole["batch"]), context=2250, routing="typical",
        all2all="auto" if whole["exchange"] == "none" else whole["exchange"],
    )
    assert server.step_s == pytest.approx(whole["step_s"], rel=0.02)
    said = CliRunner().invoke(app, words)
    assert "times the best whole server's" in " ".join(said.output.split())
