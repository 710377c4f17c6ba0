"""The sample of measured kernels that no fit has seen: what it holds, how well it is predicted, the page it makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tensorcast.calibrate.constants.from_tables import KERNEL_FAMILIES
from tensorcast.calibrate.measured_tables import held_out
from tensorcast.cost import roofline
from tensorcast.cost.kernels.formula import formula_of
from tensorcast.cost.kernels.shape_tables import calls_of
from tensorcast.errors import InputError
from tensorcast.profiles.store import load_device
from tensorcast.validate.accuracy import sample as sample_page

SAMPLE = Path(__file__).parent / "data" / "kernel_sample.csv"


@pytest.fixture(scope="module")
def predicted() -> pd.DataFrame:
    return sample_page.predict(sample_page.read_sample(SAMPLE))


def test_sample_shapes_were_held_out() -> None:
    assert SAMPLE.stat().st_size < 60_000
    for calls in calls_of(sample_page.read_sample(SAMPLE)):
        assert held_out(calls.family, calls.columns).all(), calls.family


def test_sample_is_predicted_well(predicted: pd.DataFrame) -> None:
    """Held-out medians are 2-15 % for most fits; a few rows per fit scatter, so a family may show up to 20 %."""
    by_family = sample_page.summary(predicted, ["family"]).set_index("family")
    assert set(by_family.index) == {*KERNEL_FAMILIES, *sample_page.COLLECTIVES}
    assert (by_family["median"] <= 0.20).all(), by_family
    assert predicted.error.median() <= 0.12
    assert (by_family["median"] < by_family.roofline_median).all(), by_family


def test_every_measured_device_is_calibrated(predicted: pd.DataFrame) -> None:
    assert set(predicted.device) == {"a100-sxm", "h100-sxm", "h200-sxm", "b200-sxm", "gb200"}
    bare = predicted[predicted.evidence != "calibrated"]  # no streaming kernel was timed there: the activation's
    few = {("a100-sxm", "conv_decode"), ("a100-sxm", "linear_decode")}  # too few rows of one old release
    assert set(zip(bare.device, bare.family, strict=True)) == {("a100-sxm", "grouped_gemm"), *few}
    kernels = predicted[~predicted.family.isin(sample_page.COLLECTIVES)]
    assert (kernels.predicted >= kernels.roofline * (1 - 1e-9)).all()


def test_datasheet_fractions_are_no_better_than_stated(predicted: pd.DataFrame) -> None:
    """What a device without fits gets, on devices where it can be checked: within what its error promises."""
    errors: list[float] = []
    kernels = predicted[~predicted.family.isin(sample_page.COLLECTIVES)]
    for (name, engine), rows in kernels.groupby(["device", "engine"]):
        bare = load_device(str(name)).model_copy(update={"calibration": None})
        for calls in calls_of(rows):
            found = formula_of(calls.family, calls.dtype, calls.variant, calls.columns, bare, engine=str(engine))
            assert found.evidence == "datasheet"
            errors += list(np.abs(found.seconds / rows.seconds.iloc[calls.rows] - 1.0))
    assert 0.3 * roofline.DATASHEET_ERROR < np.median(errors) <= roofline.DATASHEET_ERROR


def test_page_says_what_it_must(predicted: pd.DataFrame, tmp_path: Path) -> None:
    text = sample_page.page(predicted)
    for word in ("aiconfigurator-core 0.12.0", "Apache-2.0", "held out", "plain roofline", "Not measured", "h20"):
        assert word in text
    out = tmp_path / "page.md"
    assert sample_page.main(["--sample", str(SAMPLE), "--out", str(out)]) == 0
    assert out.read_text() == text


def test_unreadable_sample_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        sample_page.read_sample(tmp_path / "none.csv")
    (tmp_path / "bad.csv").write_text("system,seconds\nx,1\n")
    with pytest.raises(InputError, match="is missing"):
        sample_page.read_sample(tmp_path / "bad.csv")
