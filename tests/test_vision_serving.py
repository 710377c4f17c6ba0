"""Images of prompts in serving: what a prompt costs more, what memory holds less."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import tensorcast as tc
from tensorcast.cli import app
from tensorcast.cost.evidence import EVIDENCE
from tensorcast.predict.run_columns import read_run
from tensorcast.predict.serve_runs import serve
from tensorcast.profiles.store import load_device, load_engine, load_model
from tensorcast.serving.encoder import PromptImages, prompt_images, with_images
from tensorcast.serving.encoder_apart import BUSY, EncoderPool, Wanted, best_with
from tensorcast.serving.prefill_costs import PrefillCosts, prefill_costs

MODEL = "qwen3-vl-30b-a3b"
positive = st.floats(min_value=1e-4, max_value=1.0)


def two(size: str = "1280x720") -> PromptImages:
    found = prompt_images(2, size, None)
    assert found is not None
    return found


def encoded(tp: int = 1) -> float:
    return float(two().of_prompt(load_model(MODEL), load_device("h200"), load_engine("vllm"), tp).kernels_s)


@given(fixed=positive, prompt=positive, per_step=st.sampled_from([0.125, 0.5, 1.0, 3.0, 16.0]))
@settings(deadline=None)
def test_a_prompt_takes_its_images_more(fixed: float, prompt: float, per_step: float) -> None:
    """However prompts share steps, or are cut over them: one more prompt keeps a rank busy for its images, too."""
    batches = np.array([0.5, 1.0, max(per_step, 1.0)])
    columns: dict[str, Any] = {
        "seconds": fixed + prompt * batches[None], "experts_s": 0.1 * prompt * batches[None],
        "attention_s": 0.1 * prompt * batches[None], "error": np.full((1, 3), 0.1),
        "least_s": np.zeros((1, 3)),
        **{kind: np.full((1, 3), float(kind == "measured")) for kind in EVIDENCE},
    }
    plain: PrefillCosts = prefill_costs(columns, 1000.0, per_step, 0.0)
    step = two().of_prompt(load_model(MODEL), load_device("h200"), load_engine("vllm"), 1)
    seen = with_images(plain, [step])
    # seconds of a rank for each prompt when steps are full
    before, after = ((1 / one.most_per_s).item() for one in (plain, seen))
    assert after - before == pytest.approx(float(step.kernels_s), rel=1e-9)
    alone = [((one.fixed_s + one.prompt_s) / min(per_step, 1.0)).item() for one in (plain, seen)]
    assert alone[1] - alone[0] == pytest.approx(float(step.kernels_s), rel=1e-9)
    assert seen.token_s.item() == plain.token_s.item()
    assert sum(share.item() for share in seen.evidence.values()) == pytest.approx(1.0)


def test_first_tokens_wait_for_images() -> None:
    """A prompt of as many tokens waits for its images longer, and now and then for another's."""
    asked: dict[str, Any] = {"device": "h200", "world_size": 1, "output_len": 64, "layouts": ["tp1"]}
    asked |= {"modes": ["aggregated"]}
    seen = tc.compare(MODEL, input_len=512, images_per_request=2, image_size="1280x720", **asked)
    plain = tc.compare(MODEL, input_len=512 + 2 * 882, **asked)
    assert seen.input_len == plain.input_len == 2276
    one, other = (found.kept.where(found.kept["batch"] == 1.0).records()[0] for found in (seen, plain))
    assert encoded() <= one["ttft_s"] - other["ttft_s"] < 1.3 * encoded()
    assert max(seen.kept["largest_batch"]) < max(plain.kept["largest_batch"])  # the tower is held, too
    assert any("2 x 882 of images (1280x720)" in note for note in seen.notes)
    assert not any("not counted: vision_config" in note for note in seen.notes)


def test_a_tower_is_held_on_every_rank() -> None:
    images, model, device, engine = two(), load_model(MODEL), load_device("h200"), load_engine("vllm")
    whole, cut = (images.tower(model, device, engine, tp).weight_bytes for tp in (1, 4))
    assert whole == 2 * 538631408 and cut < whole / 3
    fallen = images.tower(model, device, engine, 32)  # 16 heads do not divide
    assert (fallen.tp_mode, fallen.weight_bytes) == ("data", whole)


def test_a_row_of_predict_says_the_same() -> None:
    row = {"model": MODEL, "device": "h200", "isl": 512, "osl": 64, "concurrency": 1, "tp": 2}
    seen = read_run({**row, "images_per_request": 2, "image_size": "1280x720"})
    plain = read_run({**row, "isl": 2276})
    one, other = serve([seen, plain])
    assert float(one.ttft_s - other.ttft_s) == pytest.approx(encoded(2), rel=0.05)
    assert float(one.tpot_s) == pytest.approx(float(other.tpot_s), rel=0.02)


@pytest.mark.parametrize(("cells", "said"), [
    ({"images_per_request": 1}, "say how large"),
    ({"image_size": "9x9"}, "is of images_per_request"),
    ({"images_per_request": 1, "image_size": "9x9", "encoder_tp_mode": "all"}, "weights"),
    ({"images_per_request": 1, "image_size": "9x9", "request_rate": 3}, "steady loads"),
    ({"images_per_request": 1, "image_size": "9x9", "model": "qwen3-30b-a3b"}, "takes no images"),
])  # fmt: skip
def test_rows_that_cannot_be(cells: dict[str, object], said: str) -> None:
    with pytest.raises(tc.InputError, match=said):
        read_run({"model": MODEL, "device": "h200", "isl": 512, "osl": 64, "concurrency": 1, **cells})


def pool(gpus: int) -> EncoderPool:
    step = two().of_prompt(load_model(MODEL), load_device("h200"), load_engine("vllm"), 1)
    return EncoderPool(step=step, gpus=gpus)


@pytest.mark.parametrize("busy", [0.3, 0.6, 0.85])
def test_an_encoders_queue_is_that_of_random_arrivals(busy: float) -> None:
    """Against requests one by one: Lindley's recursion over a long random sequence."""
    one, dice = pool(1), np.random.default_rng(7)
    gaps = dice.exponential(one.seconds / busy, 400_000)
    wait, total = 0.0, 0.0
    for gap in gaps.tolist():
        total += wait
        wait = max(0.0, wait + one.seconds - gap)
    queue = one.added_s(busy * one.most_per_s) - one.added_s(0.0)
    assert queue == pytest.approx(total / len(gaps), rel=0.05)
    assert one.added_s(0.0) == one.seconds + one.hand_over_s


def test_embeddings_travel_over_the_network() -> None:
    link = load_device("h200").interconnect[-1]
    sent = 2 * 880 * 2048 * 4 * 2.0  # images, tokens, width, deepstack's three and the last, bf16
    wanted = float(link.latency_s) + sent / float(link.bandwidth_bytes_per_s)
    assert pool(1).hand_over_s == pytest.approx(wanted, rel=1e-12)


@given(rate=st.floats(min_value=0.1, max_value=500.0), gpus=st.integers(min_value=1, max_value=8))
@settings(deadline=None)
def test_no_stage_is_outrun(rate: float, gpus: int) -> None:
    row = {"output_tokens_per_s": rate * 64, "gpus": 4, "concurrency": 10.0, "ttft_s": 0.2, "tpot_s": 0.02,
           "mode": "aggregated", "replicas": 4, "layout": "tp1-dp1"}  # fmt: skip
    encoders = pool(gpus)
    best = best_with([row], Wanted(output_len=64), encoders)
    if rate > BUSY * encoders.most_per_s:
        assert best is None
        return
    assert best is not None and best.requests_per_s == pytest.approx(rate)
    # as many requests are in flight as come while one is served (Little)
    assert best.concurrency - 10.0 == pytest.approx(rate * (best.ttft_s - 0.2))
    assert best.tokens_per_s_per_gpu == pytest.approx(rate * 64 / (4 + gpus))
    assert best_with([row], Wanted(output_len=64, ttft_s=0.2 + encoders.seconds / 2), encoders) is None


def test_encoders_apart_are_compared_with_none() -> None:
    asked: dict[str, Any] = {"device": "h200", "world_size": 4, "input_len": 512, "output_len": 64, "tpot_s": 0.02}
    found = tc.compare(MODEL, images_per_request=2, image_size="1280x720", modes=["aggregated"], **asked)
    (split,) = tc.compare_encoders(found)
    assert split.together is not None and split.apart
    assert [one.encoder_gpus for one in split.apart] in ([1, 2], [2, 1], [1], [2])
    for one in split.apart:
        assert one.gpus <= 4 and one.tpot_s <= 0.02
        assert one.requests_per_s <= BUSY * one.encoder_gpus / split.encode_s
    best = max(
        row["tokens_per_s_per_gpu"] for row in found.kept.records() if row["meets"] and row["tpot_s"] <= 0.02
    )
    assert split.together.tokens_per_s_per_gpu == pytest.approx(best, rel=1e-6)
    with pytest.raises(tc.InputError, match="less than world_size 4"):
        tc.compare_encoders(found, [4])
    with pytest.raises(tc.InputError, match="is of prompts with images"):
        tc.compare_encoders(tc.compare(MODEL, modes=["aggregated"], **asked))


def test_the_command_compares_encoders_apart() -> None:
    words = ["compare", MODEL, "-d", "h200", "-n", "4", "-i", "512", "-o", "64", "--images-per-request", "2",
             "--image-size", "1280x720", "--mode", "aggregated", "--encoder-gpus", "1"]  # fmt: skip
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stdout
    assert "Encoders apart: " in done.stdout and "1 encoder " in " ".join(done.stdout.split())
    said = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)["encoders_apart"]
    assert said[0]["apart"][0]["encoder_gpus"] == 1


def test_the_command_takes_images() -> None:
    words = ["compare", MODEL, "-d", "h200", "-n", "2", "-i", "512", "-o", "64", "--images-per-request", "2",
             "--image-size", "1280x720", "--layouts", "tp2", "--mode", "aggregated", "--json"]  # fmt: skip
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stdout
    assert "images" in json.dumps(json.loads(done.stdout)["notes"])
    refused = CliRunner().invoke(app, ["compare", MODEL, "-d", "h200", "-n", "2", "--image-size", "9x9"])
    assert refused.exit_code == 2
