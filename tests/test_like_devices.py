"""Devices that go by the fractions of peaks that another chip of their architecture reaches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

import tensorcast as tc
from tensorcast.cost.evidence import NORMAL_80
from tensorcast.cost.kernels.formula import formula_of
from tensorcast.cost.kernels.predictor import predictor_for
from tensorcast.cost.kernels.shape_tables import calls_of
from tensorcast.cost.roofline import OTHER_CHIP_ERROR
from tensorcast.errors import InputError
from tensorcast.profiles.device import DeviceProfile, lent
from tensorcast.profiles.store import list_devices, load_device
from tensorcast.validate.accuracy import devices_left_out
from tensorcast.validate.accuracy.sample import read_sample

PROFILES = Path(__file__).parent.parent / "profiles" / "devices"

LIKE = [name for name in list_devices() if load_device(name).timed_on_other_chip]

PLAIN = ("gemm", "grouped_gemm", "attention_prefill", "attention_decode", "mla_prefill", "mla_decode")


def bare(name: str) -> DeviceProfile:
    """A measured device as if nothing of it had been."""
    return load_device(name).model_copy(update={"calibration": None})


def errors(device: DeviceProfile, system: str) -> tuple[np.ndarray, np.ndarray]:
    """|predicted / measured - 1| of the sample's plain rows of a system, and whether the interval held."""
    sample = read_sample(Path(__file__).parent / "data" / "kernel_sample.csv")
    rows = sample[(sample.system == system) & (sample.variant == "") & sample.family.isin(PLAIN)]
    off, held = [], []
    for engine, some in rows.groupby("engine"):
        for calls in calls_of(some):
            found = predictor_for(device, str(engine)).price(calls.family, calls.dtype, calls.variant, calls.columns)
            seconds = some.iloc[calls.rows].seconds.to_numpy()
            off.append(np.abs(found.seconds / seconds - 1.0))
            held.append((found.low <= seconds) & (seconds <= found.high))
            kernel = calls.family, calls.dtype, calls.variant
            floor = formula_of(*kernel, calls.columns, device, engine=str(engine)).floor
            assert (found.low <= found.seconds).all() and (found.seconds <= found.high).all()
            assert (found.seconds >= floor * (1 - 1e-9)).all()
            if device.timed_on_other_chip:
                width = NORMAL_80 * OTHER_CHIP_ERROR
                assert (found.high >= found.seconds * np.exp(width) * (1 - 1e-9)).all()
                assert set(found.evidence) == {"datasheet"}
    return np.concatenate(off), np.concatenate(held)


@pytest.mark.parametrize(("name", "lender", "most"), [
    ("h200-sxm", "h100-sxm", 0.10), ("b200-sxm", "b300-sxm", 0.12), ("gb200", "b300-sxm", 0.12),
])
def test_measured_devices_by_another_measured_one(name: str, lender: str, most: float) -> None:
    """Rows that no fit has seen, by a device's peaks and another's fractions: nearer than by datasheet fractions, and
    within what is stated of such loans."""
    asked = lent(bare(name), load_device(lender), other_chip=True)
    off, held = errors(asked, name.replace("-", "_"))
    plain, _ = errors(bare(name), name.replace("-", "_"))
    assert np.median(off) < most and np.median(off) < np.median(plain)
    assert held.mean() > 0.7


@pytest.mark.parametrize("name", LIKE)
def test_shipped_ones_are_estimates(name: str) -> None:
    """Nothing of them is called calibrated, links stay the datasheet's, and a step's kernels are those of shapes."""
    device = load_device(name)
    assert device.calibration is not None and not device.calibration.collectives
    assert device is load_device(name)
    run = tc.simulate("qwen3-0.6b", device=name, world_size=1, engine="vllm", batch=8, context=1024)
    ops = run.ops[run.ops.op == "mm"]
    assert set(run.ops.evidence) == {"datasheet"} and len(ops) > 2
    frame = pd.DataFrame({"family": "gemm", "m": 8, "n": 4096, "k": 1024, "dtype": "bf16"}, index=[0])
    alone = tc.predict_kernels(frame, device=name, engine="vllm").seconds[0]
    qkv = next(row for row in ops.to_dict("records") if "q_proj" in row["module"])
    assert qkv["seconds_per_call"] == pytest.approx(alone + float(device.graph_gap_s or 0.0), rel=0.1)


def changed(folder: Path, name: str, **values: str) -> str:
    """The path of a copy of a shipped profile with other values (empty: taken out)."""
    data = yaml.safe_load((PROFILES / f"{name}.yaml").read_text()) | {"name": "mine", "aliases": []} | values
    data = {key: value for key, value in data.items() if value != ""}
    (folder / "mine.yaml").write_text(yaml.safe_dump(data))
    return str(folder / "mine.yaml")


@pytest.mark.parametrize(("name", "values", "says"), [
    ("rtx-4090", {"like": "l40s"}, "device mine: like: 164 bf16 FLOPs per byte of memory traffic, l40s-?s?x?m? ?419"),
    ("l4", {"like": "h100-sxm"}, "device mine: like: h100-sxm is of another architecture \\(Hopper, not Ada\\)"),
    ("l4", {"like": "l40"}, "device mine: like: l40 has no calibration; name one that has"),
    ("l4", {"like": "l50"}, "device mine: like: unknown device 'l50'"),
    ("l4", {"same_chip": "l40s"}, "same_chip \\(l40s\\) and like \\(l40s\\) both name a lender; keep one"),
])
def test_a_lender_must_fit(tmp_path: Path, name: str, values: dict[str, str], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        load_device(changed(tmp_path, name, **values))
    assert "\n" not in str(caught.value)


def test_lenders_of_the_page() -> None:
    """Who prices whom: siblings with their balance, cut ones apart, the next architecture where it is named."""
    every = {name: load_device(name) for name in ("h100-sxm", "h200-sxm", "h20", "l40s", "rtx-pro-6000", "mi300x")}
    of = {name: {(one.name, one.kind) for one in devices_left_out.lenders(every[name], every)} for name in every}
    assert of["h200-sxm"] == {("h100-sxm", "architecture"), ("h20", "cut")}
    assert of["l40s"] == {("rtx-pro-6000", "next architecture")} and not of["mi300x"]
    rows = pd.DataFrame({
        "ratio": [1.1, 0.5], "held": [True, False], "device": ["h200-sxm", "mi300x"], "vendor": ["NVIDIA", "AMD"],
        "family": "gemm", "way": ["h100-sxm", "datasheet"], "kind": ["architecture", ""],
    })  # fmt: skip
    page = "\n".join(devices_left_out.section(rows))
    assert "| datasheet | all | 1 | 1 | 50.0 % |" in page and "| h200-sxm | h100-sxm |" in page


@pytest.mark.parametrize(("tp", "pp", "dp"), [(2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_a_device_is_used_to_its_last_gpu(tp: int, pp: int, dp: int) -> None:
    """GB10 comes in pairs and has no tier beyond: both in one group, as two stages, and as two ranks."""
    run = tc.simulate(
        "qwen3-30b-a3b", device="gb10", world_size=2, tp=tp, pp=pp, dp=dp, ep=dp, engine="vllm", batch=2, context=1024,
    )  # fmt: skip
    assert run.step_s > 0


def test_no_more_gpus_than_a_device_has() -> None:
    best = tc.compare("qwen3-30b-a3b", device="gb10", world_size=2, input_len=1000, output_len=100).best
    assert best is not None and best["gpus"] <= 2
    with pytest.raises(InputError, match="gb10's interconnect reaches 2"):
        tc.simulate("qwen3-30b-a3b", device="gb10", world_size=4, tp=4, engine="vllm")
