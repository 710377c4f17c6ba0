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
        "error": np.full((1, 3), 0.1), **{kind: np.full((1, 3), float(kind == "measured")) for kind in EVIDENCE},
    }
    plain: PrefillCosts = prefill_costs(columns, 1000.0, per_step)
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


def test_the_command_takes_images() -> None:
    words = ["compare", MODEL, "-d", "h200", "-n", "2", "-i", "512", "-o", "64", "--images-per-request", "2",
             "--image-size", "1280x720", "--layouts", "tp2", "--mode", "aggregated", "--json"]  # fmt: skip
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stdout
    assert "images" in json.dumps(json.loads(done.stdout)["notes"])
    refused = CliRunner().invoke(app, ["compare", MODEL, "-d", "h200", "-n", "2", "--image-size", "9x9"])
    assert refused.exit_code == 2
