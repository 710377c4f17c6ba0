"""Vision towers: against transformers' own modules and processors, and FLOPs counted by hand."""

from __future__ import annotations

import ast
import csv
import functools
import importlib
import json
import math
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING
from typer.testing import CliRunner

import tensorcast as tc
from tensorcast.cli import app
from tensorcast.deploy.encoder.encoder import deploy_encoder
from tensorcast.profiles.model import ModelProfile
from tensorcast.profiles.store import list_models, load_device, load_engine, load_model
from tensorcast.profiles.vision.attention import measured_attention
from tensorcast.profiles.vision.images import EncodedImage, View
from tensorcast.profiles.vision.processors import PROCESSORS
from tensorcast.profiles.vision.said import encoded_image, sees, vision_of
from tensorcast.trace.cache import traced
from tensorcast.trace.dims import Dim, Sizes
from tensorcast.trace.table import Op
from tensorcast.trace.vision.tracer import trace_tower

SEEING = [name for name in list_models() if sees(load_model(name))]
sides = st.integers(min_value=8, max_value=6000)


@functools.cache
def own_code(model: str, *names: str) -> list[Any]:
    """Functions of a processor's file, which may ask for torchvision when it is imported, as they stand there."""
    file = Path(transformers.__file__).parent / "models" / model / f"image_processing_{model}.py"
    tree = ast.parse(file.read_text("utf-8"))
    body: list[ast.stmt] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    assert len(body) == len(names)
    future = ast.parse("from __future__ import annotations").body
    space: dict[str, Any] = {"math": math, "torch": torch, "defaultdict": defaultdict, "lru_cache": lru_cache}
    exec(compile(ast.Module([*future, *body], []), str(file), "exec"), space)
    return [space[name] for name in names]


def patches(model: str, width: int, height: int) -> int:
    return encoded_image(load_model(model), width, height).patches


# Images to tokens


@given(width=sides, height=sides)
@settings(deadline=None)
def test_grids_are_those_of_qwens_processor(width: int, height: int) -> None:
    kind = importlib.import_module("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    own = kind.Qwen2VLImageProcessorPil(
        patch_size=16, merge_size=2, size={"shortest_edge": 65536, "longest_edge": 16777216}
    )
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(tc.InputError, match="200 times"):
            encoded_image(load_model("qwen3-vl-30b-a3b"), width, height)
        return
    seen = encoded_image(load_model("qwen3-vl-30b-a3b"), width, height)
    wanted = own.get_number_of_image_patches(height, width, {})
    assert (seen.patches, seen.embeddings, seen.tokens) == (wanted, wanted // 4, wanted // 4 + 2)


@given(width=sides, height=sides)
@settings(deadline=None)
def test_grids_of_minimax_kimi_and_glm(width: int, height: int) -> None:
    (resize,) = own_code("minimax_m3_vl", "smart_resize")
    (navit,) = own_code("kimi_k25", "navit_resize")
    _, (kimi_height, kimi_width) = navit(height, width, 14, 2, 16384, 512)
    assert patches("kimi-k2.5", width, height) == kimi_height * kimi_width // 14**2
    if max(width, height) <= 200 * min(width, height):
        rows, columns = resize(height, width, 28, 3136, 451584)
        assert patches("minimax-m3", width, height) == rows * columns // 14**2
    glm = importlib.import_module("transformers.models.glm4v.image_processing_pil_glm4v").Glm4vImageProcessorPil()
    if max(width, height) <= 200 * min(width, height) and min(width, height) >= 28:
        seen = PROCESSORS["Glm4vImageProcessor"]({}).encoded(width, height)
        assert seen.patches == glm.get_number_of_image_patches(height, width, {})


@given(width=sides, height=sides)
@settings(deadline=None)
def test_gemma_pools_to_the_tokens_of_its_processor(width: int, height: int) -> None:
    kind = importlib.import_module("transformers.models.gemma4.image_processing_pil_gemma4")
    try:
        rows, columns = kind.get_aspect_ratio_preserving_size(height, width, 16, 280 * 9, 3)
    except ValueError:
        with pytest.raises(tc.InputError, match="nothing"):
            encoded_image(load_model("gemma-4-26b-a4b"), width, height)
        return
    seen = encoded_image(load_model("gemma-4-26b-a4b"), width, height)
    assert seen.embeddings == rows * columns // 48**2
    assert seen.views == (View(1, 2520),)  # the processor pads to its budget


@given(width=sides, height=sides)
@settings(deadline=None)
def test_llamas_canvas_is_its_processors(width: int, height: int) -> None:
    _, resolutions, fit = own_code("llama4", "get_factors", "find_supported_resolutions", "get_best_fit")
    size = type("Size", (), {"height": 336, "width": 336})()
    rows, columns = (int(side) // 336 for side in fit((height, width), torch.tensor(resolutions.__wrapped__(16, size))))
    tiles = rows * columns + (rows * columns > 1)
    seen = encoded_image(load_model("llama-4-scout"), width, height)
    assert seen.views == (View(tiles, 576),)
    assert seen.tokens == 3 + 144 * tiles + (rows * columns if rows * columns > 1 else 0)


@given(width=sides, height=sides)
@settings(deadline=None)
def test_steps_windows_are_its_processors(width: int, height: int) -> None:
    own = importlib.import_module("transformers.models.step3p7.image_processing_step3p7").Step3p7ImageProcessor
    plan = functools.partial(own._plan_patches, type("Own", (), {
        "max_image_size": 3024, "_is_extreme_aspect": staticmethod(own._is_extreme_aspect),
    })())  # fmt: skip
    columns, rows = plan(width, height, 728, 504)[3:5]
    seen = encoded_image(load_model("step-3.7-flash"), width, height)
    assert seen.views[0] == View(1, 52**2) and seen.patches == 52**2 + rows * columns * 36**2
    assert seen.embeddings == 169 + 81 * rows * columns


@given(width=sides, height=sides)
@settings(deadline=None)
def test_lines_of_pixtral(width: int, height: int) -> None:
    own = importlib.import_module("transformers.models.pixtral.image_processing_pil_pixtral")
    import numpy as np

    image = np.zeros((1, height, width), dtype=np.uint8)
    own_height, own_width = own.get_resize_output_image_size(image, (1024, 1024), (16, 16))
    seen = PROCESSORS["PixtralImageProcessor"]({}).encoded(width, height)
    if min(own_height, own_width) >= 16:
        assert seen.patches == own_height * own_width // 256
        assert seen.tokens == seen.patches + own_height // 16


# Towers


@pytest.mark.parametrize("name", SEEING)
def test_parameters_are_those_of_transformers_and_of_the_card(name: str) -> None:
    model = load_model(name)
    said = vision_of(model)
    config: Any = CONFIG_MAPPING[said.model_type]
    config = config(
        vision_config=said.vision_config, text_config={"hidden_size": said.hidden_size}, **said.beside
    )
    cls = transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[said.model_type]
    with torch.device("meta"):
        whole = getattr(transformers, cls)._from_config(config, dtype=torch.bfloat16)
    language = ("language_model", "lm_head")
    wanted = sum(p.numel() for path, p in whole.named_parameters() if not any(word in path for word in language))
    table = traced(model, "encode")
    assert table.total_params() == wanted
    if model.total_params is not None and model.total_params.not_built:
        assert table.total_params() == model.total_params.not_built


def multiplied(name: str, images: float, patches: float, tp: int = 1) -> float:
    """FLOPs of matrix products of a table, each ``2 * rows * inputs * outputs``."""
    table, sizes = traced(load_model(name), "encode", tp), Sizes(B=images, S=patches, P=0.0)
    total = 0.0
    for op in table.ops:
        if op.name in ("mm", "addmm"):
            weight = next(t for t in op.inputs if t.weight and len(t.dims) == 2)
            total += 2.0 * op.outputs[0].numel(sizes) * weight.dims[0].at(sizes) * table.count(op)
    return total


def test_flops_by_hand() -> None:
    """Qwen3-VL's tower: 27 layers of 1152, MLP of 4304, patches of 1536 numbers, four mergers of 4608."""
    n, h, f = 3520, 1152, 4304
    layer = 2 * n * (3 * h * h + h * h + 2 * h * f)
    merger = 2 * (n / 4) * (4608 * 4608 + 4608 * 2048)
    by_hand = 27 * layer + 2 * n * 1536 * h + 4 * merger
    attention = 27 * 4 * n * n * h
    assert multiplied("qwen3-vl-30b-a3b", 1, n) == pytest.approx(by_hand, rel=1e-12)
    one = tc.simulate_encoder("qwen3-vl-30b-a3b", device="h200", image_size="1280x720")
    assert one.flops == pytest.approx(by_hand + attention, rel=0.01)  # and what is no product
    two = tc.simulate_encoder("qwen3-vl-30b-a3b", device="h200", image_size="1280x720", images=2)
    assert two.flops == pytest.approx(2 * one.flops, rel=1e-9)  # an image attends to itself alone


@pytest.mark.parametrize("name", [name for name in SEEING if "gemma" not in name])
@pytest.mark.parametrize("tp", [2, 8])
def test_ranks_share_layers_and_weights(name: str, tp: int) -> None:
    whole, cut = traced(load_model(name), "encode"), traced(load_model(name), "encode", tp)
    inside = [
        sum(p.numel * table.count(p) for p in table.params if p.kind >= 0 and p.role == "linear" and len(p.shape) == 2)
        for table in (whole, cut)
    ]
    assert inside[0] == tp * inside[1]
    attention = [next(op for op in table.ops if op.name == "attention") for table in (whole, cut)]
    assert attention[0].inputs[0].dims[1].coef == tp * attention[1].inputs[0].dims[1].coef
    assert not attention[0].attrs["causal"]
    sums = [op.module for op in cut.ops if op.shard == "row" and op.kind >= 0]
    assert len(sums) == 2  # attention and MLP of a layer leave partial sums


def test_windows_attend_within() -> None:
    """Qwen2.5-VL: 28 of 32 layers attend in windows of 8 x 8 patches."""
    profile = ModelProfile(name="own", config={
        "model_type": "qwen2_5_vl", "hidden_size": 2048, "vision_config": {"depth": 32, "hidden_size": 1280,
        "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048, "patch_size": 14, "window_size": 112},
    })  # fmt: skip
    table, sizes = trace_tower(profile), Sizes(B=3.0, S=1024.0, P=0.0)
    pairs: Any = 0.0
    for op in table.ops:
        if op.name == "attention":
            batch, _, new, _ = (dim.at(sizes) for dim in op.inputs[0].dims)
            pairs += batch * new**2 * table.count(op)
    assert pairs == 3 * (28 * 16 * 64**2 + 4 * 1024**2)


def test_data_parallel_towers_take_an_image_each() -> None:
    model, device, engine = load_model("qwen3-vl-30b-a3b"), load_device("h200"), load_engine("vllm")
    alone = deploy_encoder(model, device, engine, (1280, 720)).price(1.0)
    eight = deploy_encoder(model, device, engine, (1280, 720), ranks=8, tp_mode="data")
    assert eight.price(8.0).kernels_s - eight.price(8.0).gather_s == pytest.approx(alone.kernels_s, rel=1e-12)
    assert eight.price(9.0).kernels_s > 1.5 * alone.kernels_s  # one rank has two
    assert eight.weight_bytes == alone.encoder.weight_bytes == 2 * 538631408
    cut = deploy_encoder(model, device, engine, (1280, 720), ranks=8)
    assert cut.weight_bytes < alone.encoder.weight_bytes / 7
    assert alone.encoder.embedding_bytes == 2.0 * 2048 * 4 * 880  # three deepstack levels beside the last


def test_views_of_two_sizes_are_both_priced() -> None:
    image = encoded_image(load_model("step-3.7-flash"), 1280, 720)
    assert image == EncodedImage((View(1, 2704), View(6, 1296)), 670, 655)
    step = tc.simulate_encoder("step-3.7-flash", device="h200", image_size="1280x720")
    assert len(step.views) == 2
    own = [view.seconds - view.overhead_s for view in step.views]
    assert min(own) > 0 and step.kernels_s == pytest.approx(sum(own))
    assert step.seconds == pytest.approx(sum(own) + step.views[0].overhead_s)  # one step of the engine


def test_a_folders_processor_says_the_rule(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen3_vl_moe", "text_config": {"hidden_size": 2048}, "architectures": [
        "Qwen3VLMoeForConditionalGeneration"], "vision_config": {"depth": 2, "hidden_size": 64, "patch_size": 16,
        "num_heads": 4, "intermediate_size": 128, "out_hidden_size": 2048, "deepstack_visual_indexes": []},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = {"image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": 16, "merge_size": 2,
            "size": {"shortest_edge": 1024, "longest_edge": 262144}}  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    seen = encoded_image(load_model(str(tmp_path)), 4096, 4096)
    assert seen.embeddings == 256  # 512 x 512 pixels at most
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(tc.InputError, match=r"preprocessor_config\.json: not what"):
        load_model(str(tmp_path))


def test_attention_is_as_measured() -> None:
    """Rows of a public table that no factor was taken from: bidirectional attention of one call, by engine."""
    rows = list(csv.DictReader((Path(__file__).parent / "data" / "encoder_attention_sample.csv").open()))
    towers: dict[tuple[str, str], Any] = {}
    off = defaultdict[tuple[str, str], list[float]](list)
    plain = defaultdict[tuple[str, str], list[float]](list)
    for row in rows:
        key = row["device"], row["engine"]
        if key not in towers:
            made = deploy_encoder(load_model("qwen3-vl-30b-a3b"), load_device(key[0]), load_engine(key[1]), (64, 64))
            towers[key] = made.deployment
        tower, width = towers[key], int(row["head_dim"])
        op = next(one for one in tower.step.plan.rows if isinstance(one, Op) and one.name == "attention")
        q = replace(op.inputs[0], dims=(Dim(B=1), Dim(int(row["num_heads"])), Dim(S=1), Dim(width)))
        known = measured_attention(*key, width)
        assert known is not None
        op = op.but(inputs=(q, q, q), attrs={**op.attrs, "measured": tuple(known)})
        step = replace(tower.step, plan=replace(tower.step.plan, rows=(op,)), memo=None)
        price = step.price(float(row["batch_size"]), float(row["isl"]), 0.0).rows[0]
        measured = float(row["latency_ms"]) / 1e3
        off[key].append(abs(float(price.seconds) / measured - 1))
        plain[key].append(abs(float(price.seconds) / known.factor / measured - 1))
        assert (price.evidence, price.error) == ("calibrated", known.error)
    assert len(off) == 24
    medians = {key: statistics.median(values) for key, values in off.items()}
    assert max(medians.values()) < 0.4 and statistics.median(medians.values()) < 0.15
    before = {key: statistics.median(values) for key, values in plain.items()}
    assert statistics.median(before.values()) > 1.5 * statistics.median(medians.values())


def test_attention_of_other_widths_is_the_nearest_measured() -> None:
    assert measured_attention("h200-sxm", "vllm", 88) == measured_attention("h200-sxm", "vllm", 80)
    assert measured_attention("h200-sxm", "vllm", 128) is None
    assert measured_attention("h20", "vllm", 72) is None


# Commands


def run(*args: str) -> Any:
    return CliRunner().invoke(app, ["simulate", *args])


def test_simulate_encode() -> None:
    asked = "--phase", "encode", "--images", "2", "--image-size"
    said = json.loads(run("qwen3-vl-30b-a3b", "-d", "h200", *asked, "1280x720", "--json").stdout)
    step = tc.simulate_encoder("qwen3-vl-30b-a3b", device="h200", image_size="1280x720", images=2)
    assert said["step_s"] == step.seconds and said["tokens_per_image"] == 882
    assert sum(op["seconds"] for op in said["ops"]) == pytest.approx(said["kernels_s"])
    assert "2 images in" in run("gemma-4-31b", "-d", "b200", *asked, "9x9").stdout


WRONG: list[tuple[tuple[str, ...], str]] = [
    (("qwen3-30b-a3b", "--phase", "encode", "--image-size", "9x9"), "it takes no images"),
    (("qwen3-vl-30b-a3b", "--phase", "encode"), "--image-size 1280x720"),
    (("qwen3-vl-30b-a3b", "--phase", "encode", "--image-size", "9"), "must be width x height"),
    (("qwen3-vl-30b-a3b", "--phase", "encode", "--image-size", "64x64", "--dp", "2"), "--dp: is not of"),
    (("qwen3-vl-30b-a3b", "--image-size", "64x64"), "is of --phase encode"),
    (("qwen3-vl-30b-a3b", "--phase", "encode", "--image-size", "4000x4000", "--images", "9999"), "fewer at once"),
    (("qwen3-vl-30b-a3b", "--phase", "encode", "--image-size", "40x40", "--images", "0"), "at least 1"),
    (("qwen3-vl-30b-a3b", "--phase", "encode", "--image-size", "64x64", "--tp", "3"), "--encoder-tp-mode data"),
    (("qwen3-vl-30b-a3b", "--phase", "encode", "--image-size", "9000x9"), "200 times"),
    (("qwen3-vl-30b-a3b", "--phase", "encode", "--image-size", "64x64", "--encoder-tp-mode", "all"), "weights"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "said"), WRONG)
def test_what_cannot_be_is_said_in_a_line(args: tuple[str, ...], said: str) -> None:
    found = run(*args, "-d", "h200")
    assert found.exit_code == 2
    assert said in " ".join((found.stdout + found.stderr).split())


def test_shipped_towers_need_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None; import tensorcast as tc; "
        "print(tc.simulate_encoder('kimi-k2.5', device='b200', image_size='800x600', tp=8).seconds)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) > 0

