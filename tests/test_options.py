"""Options are declared once: the command line and the Python API have all of them, with the same defaults."""

from __future__ import annotations

import inspect
from typing import Any, get_type_hints

import pytest
from typer.testing import CliRunner

import tensorcast as tc
from tensorcast.cli import app
from tensorcast.cli.simulate import simulate
from tensorcast.deploy.option_types import DeploymentOptions, SearchedOptions
from tensorcast.deploy.options import (
    ABOUT,
    OPTIONS,
    SERVED_ROUTING,
    Options,
    flag,
    of_traffic,
    options_of,
)
from tensorcast.profiles.store import load_model


def test_keyword_arguments_are_the_fields_of_options() -> None:
    fields, keywords = get_type_hints(Options), get_type_hints(DeploymentOptions)
    assert list(fields) == list(keywords) == list(OPTIONS)
    assert {name for name in fields if fields[name] != keywords[name]} == {"experts_backend"}  # a mapping, too
    assert set(SearchedOptions.__annotations__) < set(OPTIONS)


def test_the_command_has_every_option_with_its_default() -> None:
    found = inspect.signature(simulate).parameters
    for name, field in OPTIONS.items():
        assert found[name].default == field.default, name
    text = CliRunner().invoke(app, ["simulate", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).stdout
    for name in OPTIONS:
        assert flag(name) in text and ABOUT[name].help.split(":")[0][:20] in text, name


@pytest.mark.parametrize(
    ("call", "wrong", "message"),
    [
        ("simulate", {"mtp_dept": 1}, "unknown argument of simulate 'mtp_dept': did you mean mtp_depth"),
        ("simulate", {"word_size": 1}, "unknown argument of simulate 'word_size': did you mean world_size"),
        ("explain", {"kv_type": "fp8"}, "unknown argument of explain 'kv_type': did you mean kv_dtype"),
        ("compare", {"fusion": "none"}, "unknown argument of compare 'fusion'"),
    ],
)
def test_an_unknown_argument_gets_the_nearest_name(call: str, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(tc.InputError, match=message):
        getattr(tc, call)("deepseek-v3", device="h200", **wrong)


def test_experts_backend_may_be_a_mapping() -> None:
    made = options_of({"experts_backend": {"prefill": "contiguous", "decode": "masked"}, "quant": "fp8"})
    assert made == Options(experts_backend="prefill=contiguous,decode=masked", quant="fp8")
    with pytest.raises(tc.InputError, match="unknown option 'quants': did you mean quant"):
        options_of({"quants": "fp8"})


def test_what_nobody_says_of_traffic_is_the_networks_own_law() -> None:
    qwen, deepseek = load_model("qwen3.5-397b-a17b"), load_model("deepseek-v3")
    assert of_traffic(Options(routing=SERVED_ROUTING), qwen).routing == qwen.traffic == "uniform"
    assert of_traffic(Options(routing=SERVED_ROUTING), deepseek).routing == "typical"
    assert of_traffic(Options(routing="zipf:1"), qwen, alike=True).routing == "zipf:1"
    assert of_traffic(Options(routing=SERVED_ROUTING), qwen, alike=True).routing == "uniform"
    assert of_traffic(Options(routing=SERVED_ROUTING), deepseek, alike=True).routing == "alike"
    asked: dict[str, Any] = {"device": "b200", "engine": "sglang", "world_size": 8}
    asked |= {"layout": "tp8-ep8", "versus": "tp8", "batch": 16}
    laws: tuple[dict[str, Any], ...] = ({}, {"routing": "uniform"}, {"routing": "typical"})
    unasked, uniform, typical = (
        float(tc.explain("qwen3.5-397b-a17b", **asked, **said).a.price.seconds)
        for said in laws
    )
    assert unasked == uniform > typical  # as uneven a choice hits fewer of 512 experts
