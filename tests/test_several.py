"""Several models or prompt lengths: each answer is that of its own question."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

import tensorcast as tc
from tensorcast.cli import app

ASKED = ("compare", "qwen3-30b-a3b,qwen3-8b", "-d", "h100", "-n", "2", "-i", "500,2000", "-o", "200", "--tpot", "30ms",
         "--mode", "aggregated")  # fmt: skip


def test_each_answer_is_its_own_questions(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [*ASKED, "--json"])
    assert done.exit_code == 0, done.output
    found = {(one["model"], one["input_len"]): one["best"] for one in json.loads(done.output)}
    assert len(found) == 4
    for (model, length), best in list(found.items())[1:3]:
        alone = tc.compare(
            model, device="h100", world_size=2, input_len=length, output_len=200, tpot_s=0.03, modes=["aggregated"]
        )
        assert alone.best is not None
        assert best["tokens_per_s_per_gpu"] == pytest.approx(alone.best["tokens_per_s_per_gpu"])


def test_what_has_no_answer_says_so_beside_the_others(tmp_path: Path) -> None:
    asked = ("compare", "qwen3-8b,deepseek-v3", "-d", "h100", "-n", "2", "--out", str(tmp_path))
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0 and "deepseek-v3 does not fit on 2 h100-sxm" in " ".join(done.output.split())
    answers = pd.read_csv(tmp_path / "answers.csv")
    assert list(answers["model"]) == ["qwen3-8b", "deepseek-v3"]
    assert answers["problem"].notna().tolist() == [False, True]
    assert (tmp_path / "qwen3-8b-4096" / "report.html").exists() and not (tmp_path / "deepseek-v3-4096").exists()
    misspelt = CliRunner().invoke(app, ("compare", "qwen3-8b,qwen3-8bb", "-d", "h100", "-n", "2"))
    assert misspelt.exit_code == 2 and misspelt.output.startswith("error: unknown model 'qwen3-8bb': did you mean")
    none = CliRunner().invoke(app, ("compare", "deepseek-v3,deepseek-r1", "-d", "h100", "-n", "2"))
    assert none.exit_code == 2 and none.output.startswith("error: deepseek-v3 does not fit")


def test_models_of_one_name_have_reports_of_their_own(tmp_path: Path) -> None:
    for place, layers in (("a", 2), ("b", 4)):
        (tmp_path / place / "model").mkdir(parents=True)
        config = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 512, "head_dim": 64,
                  "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 1024,
                  "intermediate_size": 1024, "max_position_embeddings": 8192}  # fmt: skip
        (tmp_path / place / "model" / "config.json").write_text(json.dumps(config))
    models, out = ",".join(str(tmp_path / place / "model") for place in "ab"), tmp_path / "out"
    done = CliRunner().invoke(app, ["compare", models, "-d", "h100", "-n", "1", "--out", str(out), "-i", "500"])
    assert done.exit_code == 0, done.output
    reports = [json.loads((out / name / "summary.json").read_text()) for name in ("model-500", "model-2-500")]
    fewer, more = (one["best"]["weights_bytes"] for one in reports)
    assert fewer < more


@pytest.mark.parametrize(("models", "columns", "left_out"), [
    ("qwen3-30b-a3b", 100, ()), ("qwen3-30b-a3b", 70, ()), ("qwen3-30b-a3b,qwen3-235b-a22b", 70, ("tokens/s", "users")),
])
def test_names_of_layouts_stay_whole_on_narrow_terminals(models: str, columns: int, left_out: tuple[str, ...]) -> None:
    """Pools stand one below the other, then columns fall away; no name is cut."""
    asked = ("compare", models, "-d", "h100", "-n", "16", "-i", "500,2000", "--tpot", "30ms", "--mode", "disaggregated")
    wide = json.loads(CliRunner().invoke(app, [*asked, "--json"]).output)
    shown = CliRunner().invoke(app, asked, env={"COLUMNS": str(columns)}).output
    for one in wide:
        for pool in one["answer"][0].split(" is best")[0].split(" > "):
            assert pool in shown
    assert all(len(line) <= columns for line in shown.splitlines())
    assert not any(head in shown for head in left_out) and "per GPU" in shown
    assert (models in shown.splitlines()[0]) is ("," not in models)
