"""A predictor for SGLang's simulator, against a stand-in with the names of its interface (tools/sglang-simulator of
sgl-project/sglang: time_predictor/base.py at 2f070b1, simulation/manager/config.py at 04b91ac; it is not on PyPI)."""

from __future__ import annotations

import abc
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import tensorcast as tc
from tensorcast.deploy.step.sizes import GRID
from tensorcast.predict.sglang_simulator import StepTimePredictor, install, layout_of
from tensorcast.profiles.store import load_engine

H200 = SimpleNamespace(name="h200")
SAID = {"model": "qwen3-30b-a3b", "routing": "balanced"}


@dataclass
class Request:
    extend_length: int
    past_kv_length: int


@dataclass
class Batch:
    """As the host tells decode steps: by the engine's mode, else by new tokens."""

    reqs: list[Request] = field(default_factory=list)
    forward_mode: str | None = None

    def is_decode(self) -> bool:
        if self.forward_mode is not None:
            return self.forward_mode == "DECODE"
        return all(r.extend_length <= 1 for r in self.reqs)


def config(**sizes: int) -> Any:
    return SimpleNamespace(**{"tp_size": 1, "ep_size": 1, "dp_size": 1, "pp_size": 1, **sizes})


@pytest.fixture(scope="module")
def predictor() -> StepTimePredictor:
    return StepTimePredictor(None, H200, config(tp_size=2, ep_size=2), **SAID)


def test_a_decode_batch_takes_what_simulate_says(predictor: StepTimePredictor) -> None:
    """32 sequences of 2048 cached tokens, all alike: the tables have that very point."""
    run = tc.simulate(
        SAID["model"], device="h200", world_size=2, tp=2, ep=2, batch=32, context=2048, engine="sglang",
    )
    batch = Batch([Request(1, 2048)] * 32)
    assert predictor.predict_infer_time(batch) == pytest.approx(run.step_s, rel=1e-9)


def test_a_prompt_takes_its_step_under_load(predictor: StepTimePredictor) -> None:
    """As the engine's fitted factor says, and longer with a context before it; a mixed batch longer than either."""
    factor = load_engine("sglang").overhead.prefill_factor
    new = next(int(n) for n in GRID[GRID >= 1][::2] if n >= 1500)  # a point of the tables
    run = tc.simulate(
        SAID["model"], device="h200", world_size=2, tp=2, ep=2, phase="prefill", input_len=new, engine="sglang",
    )
    alone = predictor.predict_infer_time(Batch([Request(new, 0)], "EXTEND"))
    assert alone == pytest.approx(run.step_s * factor, rel=1e-6)
    assert predictor.predict_infer_time(Batch([Request(new, 8192)])) > alone
    mixed = Batch([Request(new, 0), *[Request(1, 2048)] * 8], "MIXED")
    assert predictor.predict_infer_time(mixed) > alone
    assert predictor.predict_infer_time(Batch()) == 0.0


def test_a_last_token_of_a_prompt_is_a_prompt(predictor: StepTimePredictor) -> None:
    """By the host's mode: one new token of an EXTEND step is no decode step of its own beside others' prompts."""
    assert predictor.predict_infer_time(Batch([Request(1, 100)], "DECODE")) == pytest.approx(
        predictor.predict_infer_time(Batch([Request(1, 100)]))
    )


def test_layouts_of_the_host() -> None:
    assert str(layout_of(config(tp_size=8, dp_size=4, ep_size=8))) == "tp2-dp4-ep8"
    assert layout_of(config(tp_size=4, pp_size=2)).world_size == 8
    for wrong, says in (({"cp_size": 2}, "cp_size = 2"), ({"tp_size": 2, "dp_size": 4}, "dp_size = 4 must divide it")):
        with pytest.raises(tc.InputError, match=says):
            layout_of(config(**wrong))


def test_the_host_finds_it_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed once however often it is asked for; other names are the host's own."""
    raw: dict[str, Any] = {"predictor": {"name": "tensorcast", **SAID}}

    class Base(abc.ABC):
        @abc.abstractmethod
        def predict_infer_time(self, batch: Any) -> float: ...

    class Manager:
        @classmethod
        def _get_raw_config(cls) -> dict[str, Any]:
            return raw

        @classmethod
        def get_inference_time_predictor(cls, model: Any, hw: Any, sched_config: Any) -> str:
            return f"their own {raw['predictor']['name']}"

    with pytest.raises(tc.InputError, match="SGLang's simulator is not installed"):
        install()
    names = ("", ".simulation", ".simulation.manager", ".simulation.manager.config", ".time_predictor",
             ".time_predictor.base")  # fmt: skip
    modules = {f"sglang_simulator{name}": ModuleType(f"sglang_simulator{name}") for name in names}
    modules["sglang_simulator.simulation.manager.config"].ConfigManager = Manager  # type: ignore[attr-defined]
    modules["sglang_simulator.time_predictor.base"].InferTimePredictor = Base  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    install()
    install()
    found = Manager.get_inference_time_predictor(None, H200, config())
    assert isinstance(found, Base) and isinstance(found, StepTimePredictor)
    assert found.predict_infer_time(Batch([Request(1, 64)])) > 0 and found.get_metrics() == {}
    raw["predictor"] = {"name": "replay"}
    assert Manager.get_inference_time_predictor(None, H200, config()) == "their own replay"


@pytest.mark.parametrize(
    ("said", "says"),
    [({}, "its section must name a model"), ({"model": "qwen3-8b", "quantt": "fp8"}, "unknown option 'quantt'")],
)
def test_what_a_section_lacks(said: dict[str, Any], says: str) -> None:
    with pytest.raises(tc.InputError, match=says):
        StepTimePredictor(None, H200, config(), **said)
