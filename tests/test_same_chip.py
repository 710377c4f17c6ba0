"""Devices that no kernel was timed on, but on another with the same chip: its kernels, by their own peaks and links."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import tensorcast as tc
from tensorcast.cost.kernels.frames import predict_kernels
from tensorcast.errors import InputError
from tensorcast.profiles.store import load_device

CHIPS = [("a800-sxm", "a100-sxm"), ("a100-sxm-40gb", "a100-sxm"), ("h20-141gb", "h20")]


@pytest.mark.parametrize(("name", "chip"), CHIPS)
def test_kernels_are_those_of_the_chip(name: str, chip: str) -> None:
    """What is bound by arithmetic takes as long; nothing of it is called measured there."""
    frame = pd.DataFrame([
        {"family": "gemm", "m": m, "n": 8192, "k": 8192, "dtype": "fp8_block" if chip == "h20" else "bf16"}
        for m in (1, 64, 4096, 16384)
    ])
    device, own = load_device(name), load_device(chip)
    assert device == load_device(name) and device.timed_on == chip and own.timed_on == chip
    found, there = (predict_kernels(frame, device=one, engine="sglang") for one in (device, own))
    assert found.seconds[3] == pytest.approx(there.seconds[3], rel=0.03)
    more = float(device.memory_bandwidth_bytes_per_s) / float(own.memory_bandwidth_bytes_per_s)
    assert there.seconds[0] / found.seconds[0] == pytest.approx(more, rel=0.15)
    assert set(found.evidence) == {"calibrated"}


def test_a_step_differs_by_links_alone() -> None:
    """A800: all but NVLink of the A100; prompts at tp 8 take longer, steps of one GPU what they take there."""

    def step_s(device: str, gpus: int, phase: str) -> float:
        batch, past, new = (1, 0, 4096) if phase == "prefill" else (32, 2048, 1)
        return tc.simulate(
            "llama-3.1-8b", device=device, world_size=gpus, tp=gpus, phase=phase, engine="sglang", batch=batch,
            context=past, input_len=new,
        ).step_s  # fmt: skip

    assert step_s("a800", 1, "decode") == pytest.approx(step_s("a100", 1, "decode"), rel=1e-6)
    assert 1.03 < step_s("a800", 8, "prefill") / step_s("a100", 8, "prefill") < 1.5


def test_a_chip_must_be_known_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = Path(__file__).parent.parent / "profiles" / "devices" / "a800-sxm.yaml"
    (tmp_path / "devices").mkdir()
    monkeypatch.setenv("TENSORCAST_PROFILES", str(tmp_path))
    for chip, says in (("a100x", "unknown device 'a100x'"), ("l20", "l20 has no calibration"), ("mine", "mine has no")):
        changes = {"name: a800-sxm": "name: mine", "same_chip: a100-sxm": f"same_chip: {chip}", "[a800, ": "["}
        text = shipped.read_text()
        for old, new in changes.items():
            text = text.replace(old, new)
        (tmp_path / "devices" / "mine.yaml").write_text(text)
        with pytest.raises(InputError, match=f"device mine: same_chip: .*{says}"):
            load_device("mine")
