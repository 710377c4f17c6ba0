"""Traces that ship: as they would be made now, of every shipped model, and enough to work without torch."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from shipped_traces import fresh_one, fresh_tower, pack_of, same, shipped, sizes

from tensorcast.deploy.layout import Layout, broken_rules
from tensorcast.files import digest_of
from tensorcast.profiles.model import ModelProfile
from tensorcast.profiles.store import list_models, load_device, load_model
from tensorcast.profiles.vision.said import sees
from tensorcast.trace.cache import _SOURCES, traced
from tensorcast.trace.stored import from_json, packed, unpacked

ROOT = Path(__file__).resolve().parent.parent


def _sample(count: int) -> list[tuple[str, str, int]]:
    """Models, phases and sizes; others with every change of the code that traces."""
    dice = random.Random(digest_of(_SOURCES))
    found = []
    for name in dice.sample(sorted(list_models()), count):
        phase = dice.choice(("prefill", "decode"))
        found.append((name, phase, dice.choice(sizes(traced(load_model(name), phase).facts))))
    return found


@pytest.mark.parametrize("position", range(3))
def test_a_fresh_trace_is_the_shipped_one(position: int) -> None:
    name, phase, tp = _sample(3)[position]
    made, kept = fresh_one(name, phase, tp), shipped(name, f"{phase}-tp{tp}")
    assert same(made, kept), f"{name} {phase} tp{tp}: another trace now; run `make traces`"


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models())
def test_every_fresh_trace_is_the_shipped_one(name: str) -> None:
    for phase in ("prefill", "decode"):
        for tp in sizes(traced(load_model(name), phase).facts):
            assert same(fresh_one(name, phase, tp), shipped(name, f"{phase}-tp{tp}")), f"{phase} tp{tp}: make traces"


def test_every_model_and_size_ships() -> None:
    """Every tensor-parallel size that layout rules let through has a trace, or the reason why it has none."""
    device = load_device("h200")
    missing = []
    for name in list_models():
        facts = traced(load_model(name), "decode").facts
        for tp in range(1, 65):
            legal = not any("heads" in rule for rule, _ in broken_rules(Layout(tp, tp), facts, device))
            if legal and tp <= max(facts.heads, 1) and (found := shipped(name, f"prefill-tp{tp}")) is None:
                missing.append((name, tp, found))
    assert not missing
    seeing = [name for name in list_models() if sees(load_model(name))]
    for phase, names in (("decode", [*list_models()]), ("encode", seeing)):
        folder = pack_of("x", phase).parent
        assert {path.name for path in folder.glob("*.xz")} == {pack_of(name, phase).name for name in names}


@pytest.mark.parametrize("name", [name for name in list_models() if sees(load_model(name))])
def test_every_tower_is_the_shipped_one(name: str) -> None:
    for key, table in fresh_tower(name).items():
        assert same(table, shipped(name, key)), f"{key}: another trace now; run `make traces`"


def test_a_pack_serves_its_own_config_alone(tmp_path: Path) -> None:
    table = traced(load_model("qwen3-0.6b"), "decode")
    pack = tmp_path / "one.json.xz"
    pack.write_bytes(packed("key", {"decode-tp1": table, "decode-tp2": "no such widths"}))
    found = unpacked(pack, "key")
    assert from_json(json.loads(found["decode-tp1"])) == [table]
    assert json.loads(found["decode-tp2"]) == {"problem": "no such widths"}
    assert unpacked(pack, "another key") == unpacked(tmp_path / "none.json.xz", "key") == {}


def test_a_config_of_ones_own_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a shipped model's name, too: fewer layers are another model."""
    profile = load_model("qwen3-0.6b")
    other = ModelProfile(name=profile.name, config={**profile.config, "num_hidden_layers": 3})
    assert traced(other, "decode").facts.layers == 3 != traced(profile, "decode").facts.layers


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None  # as where they are not installed
import tensorcast as tc
from tensorcast.cli import main
"""

WORKS = """
for line in (
    "simulate deepseek-v3 -d h200 -n 8 --tp 8 --ep 8 --quant fp8",
    "compare qwen3-30b-a3b -d h200 -n 2 -i 1024 -o 128 --any-engine",
    "launch deepseek-v3 -d h200 --layout tp8-ep8",
    "explain deepseek-v3 -d h200 -n 8 --layout tp8-ep8 --versus tp8",
    f"predict {runs} --out {runs}.out",
    "replay qwen3-30b-a3b -d h200 --layout tp8-ep8 --requests 20 --rate 4 -i 1000 --output-len 50",
):
    sys.argv = ["tensorcast", *line.split()]
    try:
        main()
    except SystemExit as end:
        assert not end.code, (line, end.code)
"""

NEEDS = """
try:
    tc.simulate(config, device="h200")
except tc.InputError as error:
    print(error)
"""


def _without_torch(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH + code], capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "TENSORCAST_CACHE": str(folder / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_shipped_models_need_no_torch(tmp_path: Path) -> None:
    """Every command that prices, where neither torch nor transformers can be imported and nothing is kept."""
    runs = tmp_path / "runs.csv"
    runs.write_text("model,device,engine,tp,dp,ep,isl,osl,concurrency\ndeepseek-v3,h200,vllm,8,1,8,4096,1024,64\n")
    said = _without_torch(f"runs = {str(runs)!r}{WORKS}", tmp_path)
    assert "1 of 1 rows predicted" in said and "--max-num-batched-tokens" in said


def test_a_missing_torch_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "num_attention_heads": 4, "hidden_size": 64}')
    said = _without_torch(f"config = {str(tmp_path / 'config.json')!r}{NEEDS}", tmp_path)
    assert said.count("\n") == 1
    assert "has to be traced" in said and "pip install torch -i https://download.pytorch.org/whl/cpu" in said
