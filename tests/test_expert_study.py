"""The what-if of expert placements: numbers of single simulations, engines' files, a page that stands alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_cli import invoke, refused

import tensorcast as tc
from tensorcast.cost.placing import read_placement
from tensorcast.deploy.expert_study import ExpertStudy, engine_files
from tensorcast.report.experts.files import write_experts
from tensorcast.report.experts.words import beyond, document, headline


@pytest.fixture(scope="module")
def study() -> ExpertStudy:
    return tc.experts("deepseek-r1", device="h200", world_size=32, layout="dp32-ep32", engine="sglang", copies=[0, 32])


def test_every_choice_is_what_simulate_prices(study: ExpertStudy) -> None:
    for one in study.choices:
        alone = tc.simulate(
            "deepseek-r1", device="h200", world_size=32, tp=1, dp=32, ep=32, batch=study.batch, engine="sglang",
            routing="recorded:deepseek-r1", placement=one.placement, redundant_experts=one.copies, allow_oversize=True,
        )
        assert alone.step_s == pytest.approx(one.step_s) and alone.memory.weights == pytest.approx(one.weights_bytes)


def test_groups_on_nodes_leave_more_than_all_ranks_at_once(study: ExpertStudy) -> None:
    by_name = {(one.placement, one.copies): one for one in study.choices}
    assert study.own.placement == "linear" and study.own.copies == 0
    assert by_name["eplb", 32].busiest.mean() > 1.15 > 1.02 > by_name["eplb_global", 32].busiest.mean()
    assert study.perfect_s < study.best.step_s < study.own.step_s
    assert study.best.placement == "eplb_global"
    # as vLLM counts it: mean over the busiest, sums over layers
    assert study.best.balancedness == pytest.approx(58 / study.after.max(axis=1).sum())


def test_counts_of_the_other_phase_place_worse(study: ExpertStudy) -> None:
    (other,) = study.drifted
    assert other.source == "prefill=deepseek-r1" and 0.05 < other.moved < 0.5
    assert study.best.step_s < other.step_s < study.own.step_s
    (move,) = study.moves
    # an expert of DeepSeek-R1 is three matrices of 7168 x 2048 in FP8 with scales; a rank holds 9 in each of 58 layers
    assert 0 < move.experts <= 9 * 58
    assert move.nbytes == pytest.approx(move.experts * 3 * 7168 * 2048, rel=0.02)
    assert move.worth_steps == pytest.approx(move.seconds / (other.step_s - study.best.step_s))


def test_engines_files_are_read_back(study: ExpertStudy, tmp_path: Path) -> None:
    for name, text in engine_files(study).items():
        (tmp_path / name).write_text(text)
        read = read_placement(tmp_path / name, 256)
        assert np.array_equal(read[-58:], study.placed)
    sglang = json.loads((tmp_path / "sglang.json").read_text())
    # as SGLang's init_by_mapping wants it: a row for every layer, dense ones too
    assert np.shape(sglang["physical_to_logical_map"]) == (61, 256 + study.best.copies)
    again = tc.simulate(
        "deepseek-r1", device="h200", world_size=32, tp=1, dp=32, ep=32, batch=study.batch, engine="sglang",
        routing="recorded:deepseek-r1", placement=str(tmp_path / "sglang.json"), redundant_experts=study.best.copies,
    )
    assert again.step_s == pytest.approx(study.best.step_s, rel=0.03)


def test_report_says_the_finding_and_all_numbers(study: ExpertStudy, tmp_path: Path) -> None:
    names = {path.name for path in write_experts(study, tmp_path)}
    assert names == {"report.html", "experts.json", "sglang.json", "trtllm.yaml", "experts.png"}
    page = (tmp_path / "report.html").read_text()
    assert headline(study) in page and "data:image/png;base64" in page and "<td class=r>60" in page
    held = json.loads((tmp_path / "experts.json").read_text())
    assert held["gain"] == pytest.approx(study.gain) and np.shape(held["load_after"]) == (58, 32)
    assert held == json.loads(json.dumps(document(study), default=float))


def test_a_servers_log_is_set_beside(study: ExpertStudy, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    line = "EPLB step: {} for model m: avg_tokens=64.00, max_tokens=128, balancedness={}, steps until\n"
    log.write_text("started\n" + line.format(1, "0.4000") + line.format(2, "0.5000"))
    found = tc.experts(
        "deepseek-r1", device="h200", world_size=32, layout="dp32-ep32", engine="sglang", copies=[0], log=str(log)
    )
    assert found.logged == (0.4, 0.5)
    said = next(text for text in beyond(found) if text.startswith("Logged"))
    assert "0.45 in the mean of 2 lines" in said and f"{study.own.balancedness:.2f} without balancing" in said
    log.write_text("nothing of it\n")
    assert "says no balancedness" in refused(
        "experts", "deepseek-r1", "-d", "h200", "-n", "32", "-l", "dp32-ep32", "--log", str(log)
    )


def test_command_prints_placements_and_refuses_what_cannot_be() -> None:
    found = invoke("experts", "deepseek-r1", "-d", "h200", "-n", "32", "-l", "dp32-ep32", "--redundant-experts", "0,32")
    assert found.exit_code == 0, found.output
    assert "makes a step" in found.stdout and "perfect balance" in found.stdout
    assert "must be a recording" in refused(
        "experts", "deepseek-r1", "-d", "h200", "-n", "32", "-l", "dp32-ep32", "--routing", "uniform"
    )
    assert "experts are in one group" in refused("experts", "deepseek-r1", "-d", "h200", "-n", "8", "-l", "tp8")
    assert "256 counts a layer, but the model has 128 experts" in refused(
        "experts", "qwen3-235b-a22b", "-d", "h200", "-n", "8", "-l", "dp8-ep8"
    )
