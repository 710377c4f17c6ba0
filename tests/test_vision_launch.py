"""Commands of encoders of images, and of the servers behind them, by release."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from launch_spread import RELEASES, SEEING, printed
from typer.testing import CliRunner

import tensorcast as tc
from tensorcast.cli import app
from tensorcast.deploy.layout import parse_layout
from tensorcast.launch.launch import launch, launch_encoder
from tensorcast.profiles.launch import load_launch_table
from tensorcast.profiles.store import list_models, load_device, load_engine, load_model
from tensorcast.profiles.vision.said import sees
from tensorcast.serving.encoder import without_tower
from tensorcast.validate.engines.arguments import parser_of, refused
from tensorcast.validate.engines.check import Read

READ = [(engine, release) for engine, releases in RELEASES.items() for release in releases]
SIZES: dict[str, Any] = {"batch": 16, "input_len": 2048, "output_len": 512}


def words(command: str) -> dict[str, str]:
    """Flags with their values."""
    said = shlex.split(command.replace("\\\n", " "))
    return {one: said[i + 1] if i + 1 < len(said) else "" for i, one in enumerate(said) if one.startswith("--")}


@pytest.mark.parametrize("release", READ, ids="-".join)
def test_every_seeing_models_commands_are_taken(release: tuple[str, str]) -> None:
    engine, of = release
    declared = Read.kept(Path(__file__).parent / "data" / "engines" / f"{engine}-{of}.json").arguments
    parser = parser_of(declared, "model" if engine == "vllm" else "")
    table, found = load_launch_table(engine), list[str]()
    for name in filter(lambda one: sees(load_model(one)), list_models()):
        for one in printed(load_model(name), engine, of, SEEING):
            assert refused(one.command, table.program, parser) == "", one
            found.append(one.command)
    only = sum("encoder-only" in command for command in found)
    assert len(found) >= 40 and only >= 8


def test_an_encoder_and_its_consumer_of_vllm() -> None:
    model = load_model("qwen3-vl-30b-a3b")
    for release, connector in (("0.33.0", "ECMooncakeConnector"), ("0.24.0", "ECExampleConnector")):
        maker = launch_encoder(f"vllm=={release}", model, **SIZES).commands[0]
        taker = launch(f"vllm=={release}", model, parse_layout("tp4"), encoders=True, **SIZES).commands[0]
        made, taken = (json.loads(words(one)["--ec-transfer-config"]) for one in (maker, taker))
        assert (made["ec_connector"], made["ec_role"]) == (connector, "ec_producer")
        assert (taken["ec_connector"], taken["ec_role"]) == (connector, "ec_consumer")
        assert "--mm-encoder-only" in maker and "--mm-encoder-only" not in taker
        assert words(maker)["--tensor-parallel-size"] == "1"  # as its producers must be


def test_a_language_models_server_of_sglang_keeps_its_share() -> None:
    model, device = load_model("qwen3-vl-235b-a22b"), load_device("h200")
    both = [
        words(launch("sglang", model, parse_layout("tp8"), encoders=apart, device=device, **SIZES).commands[0])
        for apart in (False, True)
    ]
    assert "--language-only" in both[1] and "--language-only" not in both[0]
    shares = [float(one["--mem-fraction-static"]) for one in both]
    reserve = load_engine("sglang").reserve
    assert reserve is not None and reserve.vision is not None
    assert shares[0] / shares[1] == pytest.approx(reserve.vision.share(model.config), rel=2e-3)
    assert without_tower(load_engine("vllm")) == load_engine("vllm")
    encoder = launch_encoder("sglang", model, **SIZES).commands[0]
    assert re.search(r"--encoder-register-urls http://LANGUAGE_SERVER_IP:8997", encoder)


def test_whole_towers_by_engine() -> None:
    model = load_model("qwen3.5-35b-a3b")
    asked = {"encoder_tp_mode": "data", **SIZES}
    assert words(launch("vllm", model, parse_layout("tp2"), **asked).commands[0])["--mm-encoder-tp-mode"] == "data"
    assert "--mm-enable-dp-encoder" in launch("sglang", model, parse_layout("tp2"), **asked).commands[0]
    assert "no flag here" in launch("trtllm", model, parse_layout("tp2"), **asked).problem


def test_what_cannot_be_apart() -> None:
    for engine, name, said in (
        ("sglang", "llama-4-scout", "does not list model_type llama4"),
        ("sglang==0.5.14", "minimax-m3", "does not list model_type minimax_m3_vl"),
        ("trtllm", "qwen3-vl-30b-a3b", "no flag here"),
    ):
        assert said in launch_encoder(engine, load_model(name), **SIZES).problem
        assert said in launch(engine, load_model(name), parse_layout("tp8"), encoders=True, **SIZES).problem
    assert launch_encoder("sglang", load_model("minimax-m3"), **SIZES).problem == ""
    with pytest.raises(tc.InputError, match="takes no images"):
        launch_encoder("vllm", load_model("qwen3-30b-a3b"), **SIZES)


@pytest.mark.parametrize(("args", "said"), [
    (("--layout", "tp2", "--role", "encode"), "an encoder is one GPU"),
    (("--layout", "tp1", "--role", "encode", "--out", "x"), "--out: is not of"),
    (("--layout", "tp2", "--encoder-tp-mode", "all"), "must be weights or data"),
    (("--layout", "tp2", "--encoders", "--out", "x"), "--encoders: is not written"),
    (("--layout", "tp2", "--role", "read"), "prefill, decode or encode"),
])  # fmt: skip
def test_what_the_command_refuses(args: tuple[str, ...], said: str) -> None:
    done = CliRunner().invoke(app, ["launch", "qwen3-vl-30b-a3b", "-d", "h200", *args])
    assert done.exit_code == 2 and said in " ".join((done.stdout + done.stderr).split())


def test_the_command_prints_both() -> None:
    words_ = ["launch", "qwen3-vl-30b-a3b", "-d", "h200", "-b", "8"]
    encoder = CliRunner().invoke(app, [*words_, "--layout", "tp1", "--role", "encode"])
    server = CliRunner().invoke(app, [*words_, "--layout", "tp4", "--encoders", "--json"])
    assert "--mm-encoder-only" in encoder.stdout and "a proxy in front" in encoder.stdout
    assert "ec_consumer" in json.loads(server.stdout)["commands"][0]
