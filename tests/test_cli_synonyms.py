"""What an option is called elsewhere: a refusal names ours, and only one that the command has."""

from __future__ import annotations

import pytest
import typer
from test_cli import refused

from tensorcast.cli.app import app
from tensorcast.cli.values import OTHERS_CALL, ours

COMMANDS = ("compare", "simulate", "explain", "launch", "replay", "predict", "validate")


def options(command: str) -> set[str]:
    group = typer.main.get_command(app)
    found = group.get_command(typer.Context(group), command)  # type: ignore[attr-defined]
    assert found is not None
    return {name for param in found.params for name in param.opts}


@pytest.mark.parametrize(("command", "typed", "meant"), [
    ("compare", "--gpus", "--world-size"),
    ("compare", "--isl", "--input-len"),
    ("compare", "--tensor-parallel-size", "--layouts"),
    ("compare", "--max-concurrency", "--users"),
    ("compare", "--qps", "--request-rate"),
    ("simulate", "--tensor-parallel-size", "--tp"),
    ("simulate", "--tp_size", "--tp"),
    ("simulate", "--batch-size", "--batch"),
    ("launch", "--enable-expert-parallel", "--layout"),
    ("replay", "--request-rate", "--rate"),
    ("replay", "--max-num-seqs", "--max-sequences"),
    ("explain", "--backend", "--engine"),
])  # fmt: skip
def test_a_refused_option_is_named_as_we_call_it(command: str, typed: str, meant: str) -> None:
    said = refused(command, "qwen3-30b-a3b", "--device", "h100", typed, "4")
    assert said.startswith(f"error: No such option: {typed}; here it is {meant}; see "), said
    assert meant in options(command)


def test_what_nobody_calls_an_option_is_refused_as_before() -> None:
    said = refused("simulate", "qwen3-30b-a3b", "--device", "h100", "--nonsense", "4")
    assert "here it is" not in said
    assert ours("--nonsense", {"--tp"}) is None
    assert ours("--gpus", {"--tp"}) is None  # the command has none such
    assert ours("--tp", {"--tp", "--layout"}) is None  # one that the command has means itself


def test_every_name_of_ours_is_an_option_of_some_command() -> None:
    known = set().union(*(options(command) for command in COMMANDS))
    assert set(OTHERS_CALL) <= known
