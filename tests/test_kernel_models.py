"""From measured tables to a kernel model: made-up tables of a known law, fitted, stored, read back and priced."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from tensorcast.calibrate import devices
from tensorcast.calibrate.kernel_models import residual, unseen_devices
from tensorcast.calibrate.kernel_models.boosting import BORDERS, CLIP, grow
from tensorcast.calibrate.kernel_models.unseen_models import FOLDS
from tensorcast.calibrate.measured_tables import MeasuredKernel, held_out, installed_tables, read_system, systems_in
from tensorcast.cli import app
from tensorcast.cost.kernels.device_model import pack, read_model
from tensorcast.cost.kernels.formula import formula_of
from tensorcast.cost.kernels.predictor import Predictor
from tensorcast.cost.kernels.shape_tables import calls_of
from tensorcast.errors import InputError
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.store import load_device
from tensorcast.validate.accuracy import page as accuracy_page
from tensorcast.validate.accuracy import splits

pytest.importorskip("catboost", reason="fitting kernel models needs catboost: pip install 'tensorcast[calibrate]'")

PROFILES = Path(__file__).resolve().parent.parent / "profiles" / "devices"

NOISE = 0.03

TOO_SHORT = 7
"""Rows of each made-up table that no clock can time."""


def distortion(columns: dict[str, np.ndarray]) -> np.ndarray:
    """What the made-up kernels need over the formula: slow where few rows meet a deep k, up to a factor of 1.8."""
    first = columns["m"] if "m" in columns else columns["tokens"]
    depth = columns["k"] if "k" in columns else columns["hidden"]
    return 1.1 + 0.7 / (1.0 + first / 100.0) * np.log2(depth / 512.0) / 4.0


def gemm_shapes() -> pd.DataFrame:
    rows = [(m, n, k) for m in (1, 2, 4, 8, 16, 32, 64, 100, 128, 200, 256, 512, 1000, 2048, 4096)
            for n in (512, 1024, 2048, 3072, 4096, 8192) for k in (512, 1024, 2048, 4096, 8192)]
    return pd.DataFrame(rows, columns=["m", "n", "k"]).assign(gemm_dtype="bfloat16")


def expert_shapes() -> pd.DataFrame:
    models = [(2048, 768, 8, 128), (4096, 1536, 8, 128), (5120, 1536, 6, 160), (1024, 512, 4, 32)]
    rows = [(t, *model, ep) for t in (1, 4, 16, 64, 256, 1024, 4096) for model in models for ep in (1, 2, 4, 8)]
    names = ["num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_ep_size"]
    return pd.DataFrame(rows, columns=names).assign(
        moe_dtype="bfloat16", moe_tp_size=1, distribution="balanced", kernel_source="made up"
    )


def timed(shapes: pd.DataFrame, family: str, device: DeviceProfile, engine: str) -> pd.DataFrame:
    """The shapes with what the law says they take, in ms; some repeated, some of no sensible time."""
    calls, = calls_of(shapes.assign(family=family))
    formula = formula_of(calls.family, calls.dtype, "", calls.columns, device, engine=engine)
    noise = np.exp(np.random.default_rng(1).normal(0.0, NOISE, len(shapes)))
    seconds = np.maximum(formula.seconds * distortion(calls.columns), formula.floor) * noise
    found = shapes.assign(latency=seconds * 1e3, engine=engine, engine_version="1.2.3", op_name=family)
    return pd.concat([found, found.head(5), found.tail(TOO_SHORT).assign(latency=1e-5)], ignore_index=True)


def write_tables(folder: Path, device: DeviceProfile, installed: bool = False) -> Path:
    """Either layout of the measured tables."""
    for kind, shapes in (("gemm", gemm_shapes()), ("moe", expert_shapes())):
        table = timed(shapes, kind, device, "vllm")
        system = folder / device.name.replace("-", "_") / kind
        path = system / "vllm" / "1.2.3" / f"{kind}_perf.parquet" if installed else system / f"vllm_{kind}_perf.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(path, index=False)
        if installed:  # an older version is not read
            old = system / "vllm" / "1.2.0" / f"{kind}_perf.parquet"
            old.parent.mkdir(parents=True)
            table.assign(latency=1e3).to_parquet(old, index=False)
    return folder


def copy_of(device: str, folder: Path) -> Path:
    """A folder of profiles with one device in it."""
    (folder / "devices").mkdir(parents=True)
    (folder / "devices" / f"{device}.yaml").write_bytes((PROFILES / f"{device}.yaml").read_bytes())
    return folder


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """profiles/ of one device after `calibrate --from tables/` on the command line."""
    place = tmp_path_factory.mktemp("tables")
    write_tables(place / "tables", load_device("h200"))
    profiles = copy_of("h200-sxm", place / "profiles")
    done = CliRunner().invoke(
        app, ["calibrate", "-d", "h200", "--from", str(place / "tables"), "--write", str(profiles)]
    )
    assert done.exit_code == 0 and "2 kernel models" in done.output, done.output
    return place


def test_what_is_written(fitted: Path) -> None:
    """Constants in the profile; the model, and in words how good it is, what was left out, where it is from."""
    device = DeviceProfile(**yaml.safe_load((fitted / "profiles/devices/h200-sxm.yaml").read_text()))
    assert device.calibration is not None
    assert {(c.family, c.engine) for c in device.calibration.kernels} >= {("gemm", "vllm"), ("grouped_gemm", "vllm")}
    assert "vllm 1.2.3" in device.calibration.provenance
    said = yaml.safe_load((fitted / "profiles/calibration/h200-sxm.yaml").read_text())
    assert said["device"] == "h200-sxm" and said["versions"] == "vllm 1.2.3" and "h200_sxm" in said["provenance"]
    for family in ("gemm", "grouped_gemm"):
        assert said["dropped"][f"{family}: no time or under 1 us"] == TOO_SHORT
        assert said["dropped"][f"{family}: repeats of a shape, their median taken"] == 5
    kernels = {entry["family"]: entry for entry in said["kernels"]}
    assert kernels["gemm"]["points"] + kernels["gemm"]["held_out"] == len(gemm_shapes())
    for entry in kernels.values():
        assert entry["median_error"] < entry["formula_median_error"]
        assert 0.5 <= entry["coverage"] <= 0.95  # of an 80 % interval


def test_the_model_finds_the_law_that_the_formula_misses(fitted: Path) -> None:
    """On shapes that no fit saw: near the noise; constants alone, refitted to the same rows, are farther off."""
    device = DeviceProfile(**yaml.safe_load((fitted / "profiles/devices/h200-sxm.yaml").read_text()))
    model = read_model(fitted / "profiles/calibration/h200-sxm.npz")
    assert pack(read_model(fitted / "profiles/calibration/h200-sxm.npz")) == pack(model)
    for key, rows in read_system(fitted / "tables", "h200_sxm").kernels.items():
        out = rows.take(held_out(key[0], rows.columns))
        found = Predictor(device, key[2], model).price(key[0], key[1], key[3], out.columns)
        formula = formula_of(key[0], key[1], key[3], out.columns, device, engine=key[2]).seconds
        error, without = (float(np.median(np.abs(s / out.seconds - 1.0))) for s in (found.seconds, formula))
        assert error < without and error < 0.06, (key, error, without)
        assert set(found.evidence) <= {"measured", "calibrated"}


def test_both_layouts_hold_the_same(fitted: Path, tmp_path: Path) -> None:
    folder = write_tables(tmp_path, load_device("h200"), installed=True)
    assert systems_in(folder) == systems_in(fitted / "tables") == ["h200_sxm"]
    ours, theirs = (read_system(place, "h200_sxm") for place in (folder, fitted / "tables"))
    assert ours.dropped == theirs.dropped and ours.kernels.keys() == theirs.kernels.keys()
    for key, rows in ours.kernels.items():
        assert np.allclose(np.sort(rows.seconds), np.sort(theirs.kernels[key].seconds))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of the tables' name on the path, as pip would put it there."""
    package = tmp_path / "site" / "aiconfigurator_core"
    write_tables(package / "systems" / "data", load_device("h200"), installed=True)
    (package / "__init__.py").write_text("raise RuntimeError('only its data are read')\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield package / "systems" / "data"
    sys.modules.pop("aiconfigurator_core", None)


def test_from_an_installed_package(installed: Path, fitted: Path, tmp_path: Path) -> None:
    """Constants and residuals as from a folder with the same rows; or residuals over the constants that are there."""
    assert installed_tables() == installed
    profiles = copy_of("h200-sxm", tmp_path / "profiles")
    profile, models = profiles / "devices" / "h200-sxm.yaml", profiles / "calibration" / "h200-sxm.npz"
    before = profile.read_bytes()
    arguments = ["--from", "silicon", "--device", "h200-sxm", "--profiles", str(profiles)]
    assert devices.main([*arguments, "--keep-constants"]) == 0
    assert profile.read_bytes() == before
    assert set(read_model(models).kernels) == {("gemm", "bf16", "vllm", ""), ("grouped_gemm", "bf16", "vllm", "")}
    assert devices.main(arguments) == 0
    assert profile.read_bytes() == (fitted / "profiles/devices/h200-sxm.yaml").read_bytes()


def test_without_the_package_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    copy_of("h200-sxm", tmp_path)
    done = CliRunner().invoke(app, ["calibrate", "-d", "h200", "--from", "silicon", "--write", str(tmp_path)])
    assert done.exit_code == 2 and len(done.output.strip().splitlines()) == 1
    assert "pip install 'tensorcast[silicon]'" in done.output


def test_without_catboost_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "catboost", None)
    with pytest.raises(InputError, match=r"tensorcast\[calibrate\]"):
        grow({"x": np.arange(9.0)}, np.arange(9.0), 2, 2, 0.1)


def test_trees_say_what_catboost_says() -> None:
    """Evaluated with numpy after compaction: equal up to the leaves' 127 steps."""
    import catboost

    rng = np.random.default_rng(0)
    features = {name: rng.normal(size=600) for name in "abc"} | {"constant": np.ones(600)}
    target = np.sin(features["a"]) + 0.3 * (features["b"] > 0) + rng.normal(0, 0.05, 600)
    trees = grow(features, target, 60, 4, 0.2)
    assert set(trees.names) <= set("abc")
    theirs = catboost.CatBoostRegressor(
        iterations=60, depth=4, learning_rate=0.2, loss_function="MAE", border_count=BORDERS, thread_count=1,
        l2_leaf_reg=1.0, random_strength=0.0, bootstrap_type="No", random_seed=0, verbose=0, allow_writing_files=False,
    )
    matrix, centre = np.stack([features[n] for n in "abc"], axis=1).astype(np.float32), float(np.median(target))
    theirs.fit(matrix, np.clip(target - centre, -CLIP, CLIP))
    assert np.abs(trees.values(features) - theirs.predict(matrix) - centre).max() < 0.02


def test_held_out_shapes_depend_on_the_shape_alone() -> None:
    calls, = calls_of(gemm_shapes().assign(family="gemm"))
    out = held_out("gemm", calls.columns)
    back = held_out("gemm", {name: values[::-1] for name, values in calls.columns.items()})
    assert np.array_equal(out, back[::-1]) and 0.18 < out.mean() < 0.32


def test_whole_weights_are_left_out_together(fitted: Path) -> None:
    """No row is predicted by a fit that has seen its (n, k)."""
    rows = read_system(fitted / "tables", "h200_sxm").kernels["gemm", "bf16", "vllm", ""]
    physics = formula_of("gemm", "bf16", "", rows.columns, load_device("h200"), engine="vllm")
    found = residual.left_out(rows, physics, (10, 3, 0.3))
    assert found is not None and len(found.rows) == len(rows)
    folds = pd.DataFrame({"n": rows.columns["n"], "k": rows.columns["k"], "fold": found.fold}).groupby(["n", "k"])
    assert (folds["fold"].nunique() == 1).all() and len(set(found.fold)) == FOLDS


def test_another_device_from_those_that_were_measured() -> None:
    """Two devices of one law tell a third: nearer than the datasheet formula, and the interval says datasheet."""
    found: dict[str, Any] = {}
    for name in ("a100-sxm", "h100-sxm", "h200-sxm"):
        table = timed(gemm_shapes(), "gemm", unseen_devices.bare(load_device(name)), "vllm").head(len(gemm_shapes()))
        calls, = calls_of(table.assign(family="gemm"))
        rows = MeasuredKernel(("gemm", "bf16", "vllm", ""), calls.columns, table["latency"].to_numpy() / 1e3)
        found[name] = {rows.key: unseen_devices.sample(rows, load_device(name))}
    left = found.pop("h200-sxm")
    model = unseen_devices.fit_unseen_devices(found, {"a100-sxm": "Ampere", "h100-sxm": "Hopper"})
    (errors, held), = unseen_devices.left_out_errors(model, load_device("h200"), left).values()
    (rows, physics, _), = left.values()
    assert np.median(errors) < 0.6 * np.median(np.abs(physics.seconds / rows.seconds - 1.0))
    assert held.mean() > 0.6 and math.isfinite(float(errors.max()))


def test_the_accuracy_page_compares_the_methods(fitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per held-out row every method's error; the page names them, and figures are drawn."""
    monkeypatch.setenv("TENSORCAST_PROFILES", str(fitted / "profiles"))
    errors, shown = splits.compare({"h200-sxm": fitted / "tables"})
    assert set(errors.split) == {"shape", "model"} and set(splits.METHODS) <= set(errors.columns)
    shape = errors[errors.split == "shape"]
    assert shape.predictor.median() < shape.tuned.median() < shape.plain.median()
    dropped = {"h200-sxm": read_system(fitted / "tables", "h200_sxm").dropped}
    page = accuracy_page.page(errors, shown, dropped, ["made up"])
    assert "made up" in page and "no time or under 1 us" in page
    accuracy_page.figures(errors, fitted)
    assert len(list(fitted.glob("*.png"))) == 2
