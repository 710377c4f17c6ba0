"""What a measurement is held against is what a simulation gives for that row."""

from __future__ import annotations

from typing import Any

import pytest

from tensorcast.cost.formulas import work_of
from tensorcast.deploy.deployment import deploy
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.plan.plan import Collective
from tensorcast.profiles.store import load_device, load_engine, load_model
from tensorcast.validate.beside_measured import add_predictions


@pytest.mark.parametrize("name", ["grouped_matmul", "mla_absorb"])
@pytest.mark.parametrize("batch", [16, 256])
def test_a_row_is_predicted_as_a_step_prices_it(name: str, batch: int) -> None:
    """Experts and absorbed projections, whose fitted models ask for more than one kernel's shape.

    Without gaps between kernels: a measurement times kernels alone.
    """
    none = {"graph_launch_gap_s": 0.0, "eager_launch_gap_s": 0.0}
    engine = load_engine("sglang").model_copy(update=none)
    step = deploy(load_model("deepseek-v3"), load_device("h200"), engine, Layout(8, 8, 1, 8), "decode").step
    sizes = float(batch), 1.0, 4096.0
    wanted = [p for p in step.price(*sizes).rows if not isinstance(p.row, Collective) and p.row.name == name]
    assert wanted
    at = step.sizes.context(*sizes)
    for price in wanted:
        assert not isinstance(price.row, Collective)
        works, row = work_of(price.row, at), dict[str, Any](seconds=1.0)
        kernels = step.pricer.works(price.row, at, step.pricer.corrections)
        add_predictions(row, step.pricer.seconds(price.row, at, kernels), works, "cuda")
        assert row["predicted_s"] == pytest.approx(float(price.seconds), rel=1e-12)
        assert row["evidence"] == price.evidence == "measured"
        assert row["predicted_low_s"] < row["predicted_s"] < row["predicted_high_s"]
