"""A model that is a class of the user's: named in a profile beside its file, traced, priced, rewritten and run."""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import yaml
from moe_blocks import error
from own_model import House
from torch import nn

import tensorcast as tc
from tensorcast.deploy.layout import Layout
from tensorcast.launch.launch import launch
from tensorcast.measure.layers import check_layers, stock_model
from tensorcast.modeling.build import build
from tensorcast.modeling.config import hf_config
from tensorcast.modeling.custom import CustomLM, custom_config
from tensorcast.modeling.moe.apply import apply_moe
from tensorcast.modeling.moe.listed import GroupedExperts, LoopedExperts
from tensorcast.modeling.moe.rewrite import InPlace
from tensorcast.profiles.model import ModelProfile, MoEFields
from tensorcast.profiles.store import load_model
from tensorcast.trace.dims import Sizes
from tensorcast.trace.tracer import trace

SOURCE = Path(__file__).with_name("own_model.py")
MOE: dict[str, Any] = {
    "block": "crowd", "gate": "pick", "experts": "people", "shared_experts": "host", "top_k": "asked",
    "routed_scale": "gain", "after_block": ["last"], "routing": "logits",
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "width": 128, "heads": 8, "groups": 2, "inner": 96, "people": 8, "asked": 3, "floors": 5, "words": 512,
}  # fmt: skip


def profile(tmp_path: Path, moe: dict[str, Any] | None = None, **config: Any) -> str:
    """A YAML file beside a copy of the class's file; its path."""
    (tmp_path / "house.py").write_text(SOURCE.read_text("utf-8"), "utf-8")
    said = {"name": "house", "model": "house.py:House", "config": {**CONFIG, **config}, "moe": {**MOE, **(moe or {})}}
    path = tmp_path / "house.yaml"
    path.write_text(yaml.safe_dump(said), "utf-8")
    return str(path)


def randomized(model: nn.Module) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "experts"), [("limited", GroupedExperts), ("scaled", GroupedExperts), ("sorted", LoopedExperts)]
)
def test_rewritten_model_gives_the_logits_of_its_own_code(kind: str, experts: type) -> None:
    torch.manual_seed(0)
    model, ids = randomized(House(kind=kind)), torch.randint(0, 512, (2, 11))
    with torch.no_grad():
        expected = model(ids)[0]
        assert len(apply_moe(model, fields=MoEFields(**MOE))) == 3
        assert error(model(ids)[0], expected) < 1e-6
    assert any(isinstance(m, experts) for m in model.modules())


def test_plain_experts_are_stacked_whatever_their_names() -> None:
    model = randomized(House(kind="plain"))
    ids = torch.randint(0, 512, (2, 11))
    with torch.no_grad():
        expected = model(ids)[0]
        apply_moe(model, fields=MoEFields(**MOE))
        assert error(model(ids)[0], expected) < 1e-6
    stacked: Any = model.floors[0].crowd.layer.experts.local
    assert stacked.gate_up_proj.shape == (8, 96, 64) and stacked.has_bias


@pytest.mark.parametrize("missing", ["routed_scale", "after_block", "shared_experts", "routing"])
def test_what_the_block_does_and_the_profile_leaves_out_is_refused(missing: str) -> None:
    """Never a layer that differs: the line says by how much, or what stands against it."""
    fields = MoEFields(**{key: value for key, value in MOE.items() if key != missing})
    with pytest.raises(tc.InputError, match="MoE block Crowd cannot be rewritten: ") as caught:
        apply_moe(House(), fields=fields, name="house")
    assert "\n" not in str(caught.value)


def test_traced_with_experts_as_grouped_gemms_and_every_parameter_once(tmp_path: Path) -> None:
    table = trace(load_model(profile(tmp_path)), "decode")
    assert table.total_params() == sum(p.numel() for p in House(**CONFIG).parameters())
    assert table.layer_kinds == (0,) * 5  # one kind of layer
    sizes = Sizes(6.0, 1.0, 100.0, R=18.0, E=8.0)
    experts = [op for op in table.ops if op.name == "grouped_matmul"]
    found = [[float(d.at(sizes)) for d in op.outputs[0].dims] for op in experts]
    assert found == [[18, 96], [18, 96], [18, 128]]  # gate, up, down
    assert [op.attrs["projection"] for op in experts] == ["up", "up", "down"]
    attention = next(op for op in table.ops if op.name == "attention")
    assert [d.at(sizes) for d in attention.inputs[1].dims] == [6, 2, 1, 16]  # the cache holds two heads
    assert float(attention.attrs["past"].at(sizes)) == 100.0


def test_simulate_explain_and_compare_by_yaml_alone(tmp_path: Path) -> None:
    path = profile(tmp_path)
    run = tc.simulate(path, device="h200", world_size=2, dp=2, ep=2, batch=8, context=512)
    assert run.step_s > 0 and "grouped_matmul" in set(run.ops["op"])
    why = tc.explain(path, device="h200", world_size=2, layout="tp1-dp2-ep2", versus="tp1-dp2", batch=8, context=256)
    assert len(why.groups)
    started = launch("vllm", load_model(path), Layout(2, dp=2, ep=2), batch=8, input_len=128, output_len=16)
    assert started.notes[-1] == "house is the class House: vllm serves it once it is registered there"
    found = tc.compare(path, device="h200", world_size=2, input_len=128, output_len=16, ttft_s=2, tpot_s=1)
    assert found.best is not None


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"gate": "picks"}, "moe.gate = 'picks', but its MoE block has pick, people, host, last"),
        ({"experts": "folk"}, "moe.experts = 'folk', but its MoE block has pick, people"),
        ({"top_k": "askd"}, r"field top_k \('askd'\) is on neither its MoE block nor its gate, which have .*asked"),
        ({"routed_scale": "gains"}, "moe.routed_scale = 'gains', but its MoE block has .*gain"),
        ({"block": "crowds"}, "moe.block = 'crowds', but the modules that hold others are .*Crowd"),
        ({"options": {"exchang": "all_to_all"}}, "moe.options.exchang: no such option; known: exchange"),
        ({"matrices": ["w1", "w4", "w2"]}, "moe: 'w4' is not on the expert; it has w1, w3, w2"),
    ],
)
def test_wrong_names_are_one_line_with_those_that_exist(tmp_path: Path, moe: dict[str, Any], message: str) -> None:
    with pytest.raises(tc.InputError, match=message) as caught:
        trace(load_model(profile(tmp_path, moe)), "decode")
    assert "\n" not in str(caught.value)


def test_validate_compares_its_layers_with_its_own_code(tmp_path: Path) -> None:
    config = hf_config(load_model(profile(tmp_path)))
    torch.manual_seed(1)
    model = randomized(stock_model(config, torch.float32, torch.device("cpu")))
    checked = check_layers(model, config, (0,) * 5, ("all",))
    assert isinstance(model.model.floors[0].crowd, InPlace)
    assert [one.layer for one in checked] == [0] and checked[0].relative_error < 1e-6


def test_a_block_that_the_profile_does_not_name_is_pointed_at(tmp_path: Path) -> None:
    path = Path(profile(tmp_path))
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text("utf-8")), "moe": {}}), "utf-8")
    with pytest.raises(tc.InputError, match=r"floors\.0\.crowd looks like a MoE block that"):
        hf_config(load_model(path))


def test_classes_that_cannot_be_are_one_line(tmp_path: Path) -> None:
    path = Path(profile(tmp_path, width=100))  # not a multiple of its heads: fails where it is called
    for change, message in (
        ({"model": "house.py:Hut"}, "has no torch module 'Hut'; it has .*House"),
        ({"model": "hut.py:House"}, "cannot be imported .*no such file"),
        ({"model": "no_such_package:House"}, "no_such_package cannot be imported"),
        ({"config": {"wide": 3}}, "cannot be built from config: .*'wide'; it takes width, heads"),
        ({"sharded": ["depth"]}, "sharded: 'depth' is no number in config; it has .*width"),
    ):
        said = {**yaml.safe_load(path.read_text("utf-8")), **change}
        other = tmp_path / "other.yaml"
        other.write_text(yaml.safe_dump(said), "utf-8")
        with pytest.raises(tc.InputError, match=message) as caught:
            hf_config(load_model(other))
        assert "\n" not in str(caught.value)
    with pytest.raises(tc.InputError, match=r"must be package\.module:Class or file\.py:Class"):
        load = {**yaml.safe_load(path.read_text("utf-8")), "model": "house"}
        path.write_text(yaml.safe_dump(load), "utf-8")
        load_model(path)


def _run_shown(rank: int, folder: str, port: int) -> None:
    """What torchrun does for a rank: its environment, and the program of the page."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    with (Path(folder) / f"{rank}.txt").open("w", encoding="utf-8") as out, contextlib.redirect_stdout(out):
        runpy.run_path(str(Path(folder) / "ranks.py"))


def test_what_the_docs_show_runs_on_two_ranks(tmp_path: Path) -> None:
    """The block that opens docs/moe.md: logits of both models within rounding on each rank."""
    page = (SOURCE.parent.parent / "docs" / "moe.md").read_text("utf-8")
    (tmp_path / "ranks.py").write_text(page.split("```python\n")[1].split("```")[0], "utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.get_context("forkserver").set_forkserver_preload(["test_custom"])  # torch is imported once
    mp.start_processes(_run_shown, (str(tmp_path), port), nprocs=2, start_method="forkserver")
    for rank in range(2):
        found = re.findall(r"(\d) blocks, off by (\de[+-]\d\d)", (tmp_path / f"{rank}.txt").read_text("utf-8"))
        assert [blocks for blocks, _ in found] == ["2", "3"]
        assert all(float(off) < 1e-6 for _, off in found)


def test_cached_tokens_reach_its_attention() -> None:
    """Real tensors: a step after cached tokens gives what the whole sequence gives at its last position."""
    said = ModelProfile(name="house", model="own_model:House", moe=MoEFields(**MOE), config={})
    assert said.hf_id == "house"
    config, ids = custom_config(said), torch.randint(0, 512, (2, 7))
    torch.manual_seed(0)
    model: Any = randomized(build(config, dtype=torch.float32, device="cpu"))

    class Cache:
        def __init__(self) -> None:
            self.held: dict[int, list[Any]] = {}

        def update(self, key: Any, value: Any, layer: int) -> Any:
            old = self.held.get(layer, [key[:, :, :0], value[:, :, :0]])
            self.held[layer] = [torch.cat([old[0], key], 2), torch.cat([old[1], value], 2)]
            return self.held[layer]

    from tensorcast.modeling.attention import past_length

    cache = Cache()
    with torch.no_grad():
        whole = model(ids)
        model(ids[:, :6], past_key_values=cache)
        with past_length(6):
            last = model(ids[:, 6:], past_key_values=cache)
    assert error(last[:, -1], whole[:, -1]) < 1e-5
    assert model.heads == (8, 2) and isinstance(model, CustomLM)
