"""Experts of models that were not measured, whose constants a model belongs to, and what measured tables show."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from tensorcast.calibrate import command
from tensorcast.calibrate.measured_tables import MeasuredKernel, MeasuredSystem
from tensorcast.cost.kernels.device_model import SOURCE_OF, Kernel
from tensorcast.cost.kernels.formula import constants_digest
from tensorcast.cost.kernels.frames import predict_kernels
from tensorcast.cost.kernels.predictor import predictor_for
from tensorcast.cost.kernels.shape_tables import calls_of
from tensorcast.cost.kernels.vocabulary import SOURCES, Columns
from tensorcast.errors import InputError
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.store import load_device
from tensorcast.validate.accuracy.causes import causes, rough, table_of

MODELS = ((2048.0, 768.0, 8.0, 128.0), (4096.0, 1536.0, 8.0, 128.0), (5120.0, 1536.0, 6.0, 160.0),
          (1024.0, 512.0, 4.0, 32.0))


def made_up(dtype: str, seed: int) -> MeasuredKernel:
    """Four models at some tokens and splits, with times of no law at all."""
    rows = [(4.0**i, *model, ep) for i in range(6) for model in MODELS for ep in (1.0, 4.0, 8.0)]
    names = ("tokens", "hidden", "inter", "topk", "experts", "moe_ep")
    columns = dict(zip(names, np.array(rows).T, strict=True))
    size = len(rows)
    columns |= {"slots": columns["experts"], "moe_tp": np.ones(size), "gated": np.ones(size), "skew": np.zeros(size)}
    seconds = 1e-4 * np.exp(np.random.default_rng(seed).normal(0.0, 0.1, size))
    return MeasuredKernel(("grouped_gemm", dtype, "vllm", ""), columns, seconds)


def made_up_system(slower: float) -> MeasuredSystem:
    """Two dtypes; the first model's times are ``slower`` times as long in both."""
    found = MeasuredSystem("made up")
    for seed, dtype in enumerate(("bf16", "fp8")):
        rows = made_up(dtype, seed)
        factor = np.where(rows.columns["hidden"] == MODELS[0][0], slower, 1.0)
        found.kernels[rows.key] = replace(rows, seconds=rows.seconds * factor)
    return found


def test_a_model_left_out_is_left_out_in_every_dtype() -> None:
    """Changing what one model took changes the errors of that model's own rows, by just that much."""
    pytest.importorskip("catboost")
    from tensorcast.calibrate.kernel_models.unseen_models import Experts

    key = ("grouped_gemm", "bf16", "vllm", "")
    plain, moved = (Experts(made_up_system(slower), load_device("h200")).left_out(key) for slower in (1.0, 1.05))
    assert plain is not None and moved is not None and np.array_equal(plain.rows, moved.rows)
    mine = made_up("bf16", 0).columns["hidden"][plain.rows] == MODELS[0][0]
    assert np.allclose((moved.errors - plain.errors)[mine], np.log(1.05))
    assert not np.allclose(moved.errors[~mine], plain.errors[~mine])  # the others do learn from it


def library(kernel: Kernel, columns: Columns) -> np.ndarray:
    found = kernel.library(columns)
    assert found is not None
    return found


def test_the_library_is_as_said_else_the_models_own_else_most_models() -> None:
    """sglang on B200 runs TensorRT-LLM's experts for most models, Triton's for some."""
    predictor = predictor_for(load_device("b200"), "sglang")
    assert predictor.model is not None
    kernel = predictor.model.kernels["grouped_gemm", "bf16", "sglang", ""]
    table = np.asarray(kernel.sources)
    assert {SOURCES[int(code) - 1] for code in table[:, -1]} == {"trtllm_moe", "triton"}
    columns = {name: table[:, i] for i, name in enumerate(SOURCE_OF)} | {"moe_ep": 1.0 + table[:, 4]}
    assert np.array_equal(library(kernel, columns), table[:, -1])
    triton = float(SOURCES.index("triton") + 1)
    stated = columns | {"source": np.full(len(table), triton)}
    assert set(library(kernel, stated)) == {triton}
    assert np.array_equal(kernel.measured_shape(stated), table[:, -1] == triton)
    assert kernel.measured_shape(columns).all()
    strange = columns | {"hidden": columns["hidden"] + 64.0}
    most = float(SOURCES.index("trtllm_moe") + 1)
    assert set(library(kernel, strange)) == {most}
    assert set(library(kernel, strange | {"source": np.full(len(table), triton)})) == {triton}
    assert set(library(kernel, strange | {"source": np.full(len(table), 99.0)})) == {most}


def test_a_library_that_one_model_alone_was_timed_with_tells_nothing_of_other_measured_ones() -> None:
    """vllm on H200: Marlin's MXFP4 experts were timed for Kimi-K3's 896, Triton's for gpt-oss."""
    predictor = predictor_for(load_device("h200"), "vllm")
    assert predictor.model is not None
    kernel = predictor.model.kernels["grouped_gemm", "mxfp4", "vllm", ""]
    marlin, triton = (float(SOURCES.index(name) + 1) for name in ("marlin", "triton"))
    assert {line[-1] for line in kernel.sources} == {marlin, triton} and kernel.known == (triton,)
    gpt_oss = {name: np.array([size]) for name, size in zip(SOURCE_OF, (2880.0, 2880, 4, 128), strict=True)}
    said = {"moe_ep": np.ones(1), "source": np.array([marlin])}
    assert library(kernel, gpt_oss | said) == triton
    assert library(kernel, gpt_oss | said | {"hidden": np.array([4096.0])}) == marlin


def test_experts_without_a_gate_run_the_kernel_of_their_like() -> None:
    """TensorRT-LLM has one for them; the few measured models without a gate tell."""
    predictor = predictor_for(load_device("h200"), "trtllm")
    assert predictor.model is not None
    kernel = predictor.model.kernels["grouped_gemm", "bf16", "trtllm", ""]
    sizes = {"hidden": 999.0, "inter": 512.0, "topk": 4.0, "experts": 64.0}
    columns = {name: np.full(4, size) for name, size in sizes.items()}
    columns |= {"moe_ep": np.array([1.0, 1.0, 8.0, 8.0]), "gated": np.array([0.0, 1.0, 0.0, 1.0])}
    found = library(kernel, columns)
    assert [SOURCES[int(code) - 1] for code in found] == ["nongated", "cutlass"] * 2


def test_a_frame_may_say_which_kernel_ran() -> None:
    """``kernel_source`` as the tables have it; it matters for models that were not measured alone."""
    row = {"family": "moe", "dtype": "bf16", "num_tokens": 512, "inter_size": 3072, "topk": 4, "num_experts": 64}
    rows = pd.DataFrame([row | {"hidden_size": 4160, "kernel_source": name} for name in
                         ("sglang_fused_moe_triton", "sglang_flashinfer_trtllm_moe", "who knows")])
    found = predict_kernels(rows, device="b200", engine="sglang").seconds.to_numpy()
    assert found[0] > 1.2 * found[1] and found[2] in found[:2]  # Triton's is the slower one there
    calls, = calls_of(rows)
    assert [SOURCES[int(code) - 1] if code else "" for code in calls.columns["source"]] == ["triton", "trtllm_moe", ""]


def with_kernel(device: DeviceProfile, family: str, **changed: float) -> DeviceProfile:
    """The profile with some constants of one family replaced."""
    assert device.calibration is not None
    kernels = tuple(c.model_copy(update=changed) if c.family == family else c for c in device.calibration.kernels)
    return device.model_copy(update={"calibration": device.calibration.model_copy(update={"kernels": kernels})})


@pytest.mark.parametrize(("family", "dtype"), [("gemm", "bf16"), ("grouped_gemm", "fp8"), ("mla_decode", "bf16")])
def test_the_digest_tells_a_users_own_constants(family: str, dtype: str) -> None:
    """Every constant of the formula changes it; what a fit says of itself and other families' constants do not."""
    device = load_device("h200")
    own = constants_digest(family, dtype, device, "vllm")
    for name in ("compute_efficiency", "memory_efficiency", "launch_s", "tile_s", "split_s", "row_s", "smoothing"):
        assert constants_digest(family, dtype, with_kernel(device, family, **{name: 0.123}), "vllm") != own, name
    assert constants_digest(family, dtype, with_kernel(device, family, points=1, median_error=0.5), "vllm") == own
    assert constants_digest(family, dtype, with_kernel(device, "attention_decode", launch_s=1.0), "vllm") == own
    slower = device.model_copy(update={"processors": device.processors - 1})
    assert constants_digest(family, dtype, slower, "vllm") != own


def test_collectives_rest_on_their_own_constants_and_the_link() -> None:
    device = load_device("h200")
    assert device.calibration is not None
    own = constants_digest("all_reduce", "any", device, "vllm")
    fitted = device.calibration
    for op, same in (("all_reduce", False), ("all_gather", True)):
        changed = tuple(c.model_copy(update={"latency_s": 1.0}) if c.op == op else c for c in fitted.collectives)
        other = device.model_copy(update={"calibration": fitted.model_copy(update={"collectives": changed})})
        assert (constants_digest("all_reduce", "any", other, "vllm") == own) is same


def gemms(seconds: list[float]) -> MeasuredKernel:
    m = 2.0 ** np.arange(len(seconds)) - 1.0  # evenly spaced on the logs that rough() uses
    sizes = {"m": m, "n": np.full(len(m), 64.0), "k": np.full(len(m), 64.0), "batch": np.ones(len(m))}
    return MeasuredKernel(("gemm", "bf16", "vllm", ""), sizes, np.array(seconds))


def test_a_rough_table_shows() -> None:
    """A power law is smooth; one row twice as long is off by half, and its neighbours by the root of two."""
    errors, quicker = rough(gemms([1.0, 2.0, 4.0, 8.0, 16.0]))
    assert np.allclose(errors, 0.0) and quicker == 0.0
    errors, quicker = rough(gemms([1.0, 2.0, 8.0, 8.0, 16.0]))
    assert np.allclose(errors, [np.sqrt(2.0) - 1.0, 0.5, np.sqrt(2.0) - 1.0]) and quicker == 0.0
    assert rough(gemms([4.0, 2.0, 4.0]))[1] == 0.5
    errors, quicker = rough(gemms([1.0]))
    assert len(errors) == 0 and np.isnan(quicker)


def test_causes_are_read_off_the_rows() -> None:
    rows = gemms([1.0, 2.0, 8.0, 8.0, 16.0] * 2)
    rows = MeasuredKernel(rows.key, rows.columns | {"n": np.repeat([64.0, 128.0], 5)}, rows.seconds)
    found = table_of(rows, 8)
    assert found.rows == 8 and found.models == 0 and found.libraries == 1 and np.isnan(found.apart)
    size = np.geomspace(1, 1e5, 40)
    ratio = np.where(size < 16, 1.5, np.tile([1.01, 0.99], 20))
    errors = pd.DataFrame({"predictor": np.abs(ratio - 1.0), "ratio": ratio, "size": size})
    said = causes(rows.key, "shape", errors, found, 0.12)
    assert "8 rows in the fit" in said and "the table is rough" in said and "m up to 16" in said
    fast = pd.DataFrame({"predictor": 0.5, "ratio": np.full(40, 0.5), "size": size})
    assert "as a whole 2.00 times too fast, 0 % around" in causes(rows.key, "device", fast, None, 0.2)


def test_what_was_asked_wrongly_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong() -> int:
        raise InputError("no such thing")

    with pytest.raises(SystemExit) as left:
        command.run(wrong)
    assert left.value.code == 2 and capsys.readouterr().err == "error: no such thing\n"
    with pytest.raises(SystemExit) as left:
        command.run(lambda: 0)
    assert left.value.code == 0
