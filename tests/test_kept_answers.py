"""Answers of fitted models that stay on disk: the same in the next process, asked of no model again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorcast.cost.kernels import corrections, kept_answers, predictor
from tensorcast.cost.kernels.corrections import corrections_for, keep_all
from tensorcast.cost.kernels.kept_answers import Answers, answers_file, keep_answers, model_path, read_answers
from tensorcast.cost.kernels.predictor import Predictor, predictor_for
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.store import load_device

SIZES: dict[str, Any] = {"m": np.array([0.5, 1.0, 96.0, 4096.0]), "n": 4096.0, "k": 7168.0, "batch": 1.0}


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceProfile]:
    """A device whose answers are kept in a folder of the test's."""
    monkeypatch.setenv("TENSORCAST_CACHE", str(tmp_path))
    monkeypatch.setattr(corrections, "_corrections", {})
    yield load_device("h200")


def _next_process(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_all()
    monkeypatch.setattr(corrections, "_corrections", {})


def test_the_next_process_asks_no_model(device: DeviceProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, price = Counter[str](), Predictor.price

    def counted(self: Any, family: str, *rest: Any) -> Any:
        asked[family] += 1
        return price(self, family, *rest)

    def read(*_: Any, **options: Any) -> Predictor:
        asked["models"] += 1
        return predictor_for(device, "vllm", served=True)

    monkeypatch.setattr(Predictor, "price", counted)
    monkeypatch.setattr(predictor, "predictor_for", read)
    first = corrections_for(device, "vllm").at("gemm", "bf16", "", SIZES)
    assert first is not None and asked["gemm"] > 0 and asked["models"]
    _next_process(monkeypatch)
    asked.clear()
    again = corrections_for(device, "vllm").at("gemm", "bf16", "", SIZES)
    assert again is not None and not asked
    for name in ("factor", "error", "level"):
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
    # what is new is asked, and kept beside the rest
    more: dict[str, Any] = {**SIZES, "m": np.array([96.0, 97.0])}
    assert corrections_for(device, "vllm").at("gemm", "bf16", "", more) is not None and asked["gemm"] == 1
    _next_process(monkeypatch)
    asked.clear()
    for sizes in (SIZES, more):
        corrections_for(device, "vllm").at("gemm", "bf16", "", sizes)
    assert not asked


@pytest.mark.parametrize("asked", [
    ([5, 3, 9], [4, 9, 1, 3, 12]), ([7], [7]), ([8, 8, 2], [1, 2, 3], [20]), ([3], [1, 2]),
])  # fmt: skip
def test_answers_are_the_same_in_whatever_order(device: DeviceProfile, asked: Any) -> None:
    known = corrections_for(device, "vllm")
    found = [known.at("gemm", "bf16", "", {**SIZES, "m": 100.0 * np.array(some)}) for some in asked]
    for some, several in zip(asked, found, strict=True):
        for i, number in enumerate(some):
            alone = corrections.Corrections(device, "vllm").at("gemm", "bf16", "", {**SIZES, "m": 100.0 * number})
            assert alone is not None and several is not None
            assert np.asarray(several.factor)[i] == pytest.approx(alone.factor)
            assert np.asarray(several.level)[i] == alone.level


@pytest.mark.parametrize("damage", [
    lambda whole: whole[:-8], lambda whole: whole[:-3], lambda whole: b"", lambda whole: b"{}\n",
    lambda whole: whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], lambda whole: b"[1]" + whole,
    lambda whole: whole.partition(b"\n")[0],
])  # fmt: skip
def test_a_damaged_file_is_as_none_and_written_anew(
    device: DeviceProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any
) -> None:
    first = corrections_for(device, "vllm").at("gemm", "bf16", "", SIZES)
    _next_process(monkeypatch)
    (kept,) = (tmp_path / "answers").iterdir()
    whole = kept.read_bytes()
    answers, residuals = read_answers(kept)
    assert answers and residuals
    kept.write_bytes(damage(whole))
    assert read_answers(kept) == ({}, {})
    again = corrections_for(device, "vllm").at("gemm", "bf16", "", SIZES)
    assert first is not None and again is not None
    np.testing.assert_array_equal(again.factor, first.factor)
    _next_process(monkeypatch)
    assert kept.read_bytes() == whole


def test_a_file_stands_for_all_that_answers_hang_on(
    device: DeviceProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_path("h200-sxm")
    assert model is not None
    other = tmp_path / "model.npz"
    other.write_bytes(model.read_bytes() + b"0")
    code = tmp_path / "code.py"
    code.write_text("1")
    asked: list[tuple[Any, ...]] = [(device, "vllm", model), (device, "sglang", model), (device, "vllm", other)]
    named = {answers_file(*one) for one in (*asked, (load_device("h100"), "vllm", model))}
    monkeypatch.setattr(kept_answers, "_CODE", (code,))
    named.add(answers_file(device, "vllm", model))
    assert len(named) == 5 and None not in named
    assert answers_file(device.model_copy(), "vllm", model) is None  # nobody knows what was changed
    assert answers_file(device, "vllm") is None
    monkeypatch.setenv("TENSORCAST_CACHE", "off")
    assert answers_file(device, "vllm", model) is None


def test_answers_are_kept_as_soon_as_there_are_any(device: DeviceProfile, tmp_path: Path) -> None:
    """A process that asks for too many in the end leaves those of its first question."""
    asked = corrections.BatchedCorrections(corrections_for(device, "vllm"))
    asked.at("gemm", "bf16", "", SIZES)
    asked.find()
    (kept,) = (tmp_path / "answers").iterdir()
    first = kept.read_bytes()
    asked.at("gemm", "bf16", "", {**SIZES, "m": np.array([333.0])})
    asked.find()
    assert kept.read_bytes() == first


def test_too_many_answers_are_not_kept(tmp_path: Path) -> None:
    few: Answers = {("gemm", "bf16", "", "m"): np.vstack([np.arange(3.0), np.ones((3, 3))])}
    many: Answers = {("gemm", "bf16", "", "m"): np.ones((4, kept_answers.MOST_KEPT + 1))}
    keep_answers(tmp_path / "one", few, {})
    keep_answers(tmp_path / "one", many, {})
    ((name, (codes, *values)),) = read_answers(tmp_path / "one")[0].items()
    assert name == ("gemm", "bf16", "", "m") and codes.tolist() == [0, 1, 2] and (np.array(values) == 1).all()
    assert not list(tmp_path.glob(".*"))
