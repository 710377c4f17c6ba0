"""Names of checkpoints: a shipped profile, and the precision that the name says, wherever a model is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tensorcast as tc
from tensorcast.cli import app
from tensorcast.deploy.model_names import named_model
from tensorcast.modeling.checkpoint.read import checkpoint
from tensorcast.modeling.quantization import override
from tensorcast.predict.run_columns import read_run
from tensorcast.profiles.store import load_model

R1 = "nvidia/DeepSeek-R1-0528-NVFP4"


@pytest.mark.parametrize(
    ("name", "profile", "stored"),
    [
        (R1, "deepseek-r1", "linear=nvfp4,experts=nvfp4,kv=bf16"),
        ("deepseek-ai/DeepSeek-R1-0528-FP8", "deepseek-r1", "linear=fp8_block,experts=fp8_block,kv=bf16"),
        ("RedHatAI/Qwen3-30B-A3B-quantized.w4a16", "qwen3-30b-a3b", "linear=w4a16,experts=w4a16,kv=bf16"),
        ("amd/Mixtral-8x7B-Instruct-v0.1-FP8-KV", "mixtral-8x7b", "linear=fp8,experts=fp8,kv=bf16"),
        ("someone/Qwen3-30B-A3B-Instruct", "qwen3-30b-a3b", "linear=bf16,experts=bf16,kv=bf16"),
        ("qwen3-30b-a3b", "qwen3-30b-a3b", "linear=bf16,experts=bf16,kv=bf16"),
    ],
)
def test_commands_and_tables_understand_a_name_alike(name: str, profile: str, stored: str) -> None:
    model, said = named_model(name)
    row = read_run({"model": name, "device": "h200"})
    assert model.name == row.model == profile
    if model.config == load_model(profile).config:  # else the release has an entry of its own, which tables lack
        assert checkpoint(model) == override(checkpoint(load_model(profile)), row.options.quant)
    assert checkpoint(model).describe() == stored
    assert (said == "") == (name == profile) and said.count("\n") == 0


def test_what_is_kept_in_bf16_stays_so() -> None:
    """gpt-oss ships MXFP4 experts and names what it leaves alone; a copy in FP8 leaves the same alone."""
    shipped = checkpoint(load_model("gpt-oss-20b"))
    copy = checkpoint(named_model("someone/gpt-oss-20b-FP8")[0])
    assert shipped.rules.entries and copy.rules == shipped.rules and copy.experts.name == "fp8"


def test_simulated_as_named_and_said_in_a_line() -> None:
    asked: dict[str, Any] = {"device": "b200", "world_size": 8, "ep": 8, "batch": 8}
    named, plain = tc.simulate(R1, **asked), tc.simulate("deepseek-r1", **asked, quant="nvfp4")
    # NVIDIA's releases of models with latent attention keep it in bf16: per layer and tp rank of 8, the projections
    # down whole, those up and out by heads, at 2 bytes instead of 9/16
    held = 7168 * (1536 + 576) + (1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168) / 8
    assert named.memory.weights - plain.memory.weights == pytest.approx((2 - 9 / 16) * 61 * held, rel=1e-3)
    assert named.notes[-1].startswith(f"{R1} is read as deepseek-r1; stored in nvfp4, attention in bf16")
    # what is asked for wins, but for what the release keeps in bf16
    stored = tc.simulate(R1, **asked, quant="fp8_block").deployment.quantization
    assert stored.experts.name == stored.linear.name == "fp8_block"
    assert stored.rules == named.deployment.quantization.rules


def test_a_launch_serves_that_checkpoint() -> None:
    arguments = ["launch", R1, "-d", "b200", "--layout", "tp8-ep8", "--batch", "8", "-e", "vllm"]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "100"})
    assert done.exit_code == 0, done.output
    assert f"vllm serve {R1}" in done.stdout and "--quantization" not in done.stdout
    assert "# nvidia/DeepSeek-R1-0528-NVFP4 is read as deepseek-r1" in done.stdout


def test_a_path_must_be_there(tmp_path: Path) -> None:
    for path in ("./qwen3-30b-a3b-nvfp4", f"{tmp_path}/qwen3-30b-a3b-nvfp4", "~/no/qwen3-30b-a3b"):
        with pytest.raises(tc.InputError, match="no such file or directory"):
            named_model(path)
    (tmp_path / "qwen3-30b-a3b").mkdir()
    with pytest.raises(tc.InputError, match=r"no config\.json there"):
        named_model(str(tmp_path / "qwen3-30b-a3b"))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "t5", "num_layers": 2, "d_model": 64, "num_heads": 4}, "t5 is an encoder and a decoder"),
        ({"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 512}, ""),
    ],
)
def test_launch_asks_what_transformers_reads(tmp_path: Path, config: dict[str, object], said: str) -> None:
    """Sizes by a family's own names; no encoder."""
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 96}))
    arguments = ["launch", str(tmp_path), "-d", "h100", "--layout", "tp1", "-i", "100", "--output-len", "20"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == (2 if said else 0), done.output
    assert said in done.stderr and done.stderr.count("\n") == bool(said)
