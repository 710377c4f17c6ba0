"""What serving errs by is told by runs left out: of deployments, by how much of them is new."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tensorcast.calibrate.engines.left_out import LEFT_OUT, page, serving_errors
from tensorcast.calibrate.engines.statistics import few_groups
from tensorcast.profiles.engine import EngineFit
from tensorcast.profiles.store import load_engine

FIT = EngineFit(source="by hand", rows=9, models=2, layer_s=2e-5, layer_error_s=5e-6)


def test_what_serving_errs_by_is_found_beside_what_steps_do() -> None:
    """Drawn: errors of steps, which differ by run and are known, and serving's own, by how much is new; of an engine
    with few runs nothing is said. Four in five runs lie in the intervals then, on the page, too, but for what is added
    as few networks tell it."""
    dice, n = np.random.default_rng(3), 40_000
    steps, new = dice.uniform(0.02, 0.1, n), np.arange(n) % 3
    off = np.abs(dice.normal(0, np.hypot(steps, np.array([0.04, 0.12, 0.08])[new]) / 0.67449))
    ratio = np.exp(dice.choice([-1, 1], n) * np.log1p(off))
    runs = pd.DataFrame({
        "what": "a model", "network": 1, "device": "h100", "release": "vllm==1", "engine": "vllm", "new": new,
        "even": dice.random(n) < 0.5, "tpot_s": ratio, "ttft_s": ratio, "tpot_s_error": steps, "ttft_s_error": 0.0,
    })  # fmt: skip
    few = runs.head(50).assign(engine="sglang")
    found, wider = serving_errors(pd.concat([runs, few])), few_groups(5)
    assert set(found) == {"vllm"}  # where more is new nothing is surer
    assert found["vllm"]["tpot_s"] == pytest.approx(np.array([0.04, 0.12 * wider, 0.12 * wider]), rel=0.07)
    assert found["vllm"]["ttft_s"][1] == pytest.approx(wider * np.quantile(off[new == 1], 0.8) / 1.9, rel=0.01)
    right = runs.assign(network=2, tpot_s=1.0)  # a network that is always right counts no more for its many runs
    once, thrice = (serving_errors(pd.concat([runs, *[right] * times]))["vllm"]["tpot_s"] for times in (1, 3))
    assert once[1] == pytest.approx(thrice[1], abs=0.002) and once[1] < found["vllm"]["tpot_s"][1]
    narrow = {name: tuple(one / wider for one in some) for name, some in found["vllm"].items()}
    told_so = load_engine("vllm").model_copy(update={
        "fitted": FIT.model_copy(update={"serving_error": narrow})
    })
    line = page(dict.fromkeys(LEFT_OUT, runs[new == 1]), {"vllm": told_so}, "runs").splitlines()[-1]
    assert [float(line.split("|")[place].strip(" %")) for place in (6, 9)] == pytest.approx([80, 80], abs=0.3)


def test_deployments_tell_widths_as_far_as_they_have_runs() -> None:
    """One with many runs and one with as many count alike; one with a single run counts a ninth of a whole one."""
    def width(counts: dict[str, int]) -> float:
        parts = [
            pd.DataFrame({"what": release, "network": 1, "device": "h100", "release": release, "engine": "vllm",
                          "new": 1, "even": True, "tpot_s": np.linspace(1, ends, count), "ttft_s": 1.0,
                          "tpot_s_error": 0.0, "ttft_s_error": 0.0})
            for (release, count), ends in zip(counts.items(), (1.1, 1.9), strict=True)
        ]  # fmt: skip
        return serving_errors(pd.concat(parts))["vllm"]["tpot_s"][0]

    assert width({"sure": 4000, "off": 4000}) == pytest.approx(width({"sure": 400, "off": 4000}), rel=0.03)
    assert width({"sure": 4000, "off": 1}) < 0.2 * width({"sure": 4000, "off": 4000})


@pytest.mark.parametrize(("groups", "student"), [(5, 1.533), (8, 1.415), (30, 1.311)])
def test_few_groups_tell_a_spread_less_surely(groups: int, student: float) -> None:
    """Student's 90th percentile of a table, for one more of so many groups."""
    assert few_groups(groups) == pytest.approx(student / 1.2816 * (1 + 1 / groups) ** 0.5, rel=0.003)


def test_what_is_new_is_counted_from_the_nearest_run() -> None:
    fit = FIT.model_copy(update={"served_with": {"h100-sxm": {"1": ("a", "b")}, "h200-sxm": {"1": ("a",), "2": ("c",)}},
                                 "serving_error": {"tpot_s": (0.1, 0.2, 0.3), "ttft_s": 0.5}})  # fmt: skip
    asked = {("a", "h200-sxm", "1"): 0, ("b", "h200-sxm", "1"): 1, ("c", "h100-sxm", "3"): 2, ("d", "b200", "9"): 3}
    assert {one: fit.unserved(*one) for one in asked} == asked and FIT.unserved("a", "h100-sxm", "1") == 3
    assert [fit.beside_steps(new)["tpot_s"] for new in range(4)] == [0.1, 0.2, 0.3, 0.3]
    assert fit.beside_steps(2)["ttft_s"] == 0.5
