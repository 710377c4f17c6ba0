"""Names of checkpoints: a shipped profile, and the precision that the name says, wherever a model is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import public_configs
import pytest
import yaml
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from typer.testing import CliRunner

import tensorcast as tc
from tensorcast.cli import app
from tensorcast.cost.memory import weight_bytes
from tensorcast.deploy.model_names import named_model
from tensorcast.errors import InputError
from tensorcast.modeling.checkpoint.read import checkpoint, from_config
from tensorcast.modeling.checkpoint.released import released
from tensorcast.modeling.quantization import override
from tensorcast.predict.run_columns import read_run
from tensorcast.profiles.store import load_model, profile_roots
from tensorcast.trace.cache import traced
from tensorcast.trace.precision import by_precision

R1 = "nvidia/DeepSeek-R1-0528-NVFP4"


@pytest.mark.parametrize(
    ("name", "profile", "stored"),
    [
        (R1, "deepseek-r1", "linear=nvfp4,experts=nvfp4,kv=bf16"),
        ("deepseek-ai/DeepSeek-R1-0528-FP8", "deepseek-r1", "linear=fp8_block,experts=fp8_block,kv=bf16"),
        ("RedHatAI/Qwen3-30B-A3B-quantized.w4a16", "qwen3-30b-a3b", "linear=w4a16,experts=w4a16,kv=bf16"),
        ("amd/Mixtral-8x7B-Instruct-v0.1-FP8-KV", "mixtral-8x7b", "linear=fp8,experts=fp8,kv=bf16"),
        ("RedHatAI/Qwen3-8B-NVFP4A16", "qwen3-8b", "linear=w4a16_nvfp4,experts=w4a16_nvfp4,kv=bf16"),
        ("unsloth/Qwen3-8B-unsloth-bnb-4bit", "qwen3-8b", "linear=w4a16_nf4_double,experts=w4a16_nf4_double,kv=bf16"),
        ("mlx-community/Qwen3-30B-A3B-8bit", "qwen3-30b-a3b", "linear=w8a16_g64_bias,experts=w8a16_g64_bias,kv=bf16"),
        ("Intel/Qwen3-30B-A3B-int4-AutoRound", "qwen3-30b-a3b", "linear=w4a16,experts=w4a16,kv=bf16"),
        ("someone/GLM-4.5-Air-AWQ-4bit", "glm-4.5-air", "linear=w4a16,experts=w4a16,kv=bf16"),
        ("someone/GLM-4.5-Air-AWQ-8bit", "glm-4.5-air", "linear=w8a16_g128_zp,experts=w8a16_g128_zp,kv=bf16"),
        ("someone/Qwen3-30B-A3B-Instruct", "qwen3-30b-a3b", "linear=bf16,experts=bf16,kv=bf16"),
        ("qwen3-30b-a3b", "qwen3-30b-a3b", "linear=bf16,experts=bf16,kv=bf16"),
    ],
)
def test_commands_and_tables_understand_a_name_alike(name: str, profile: str, stored: str) -> None:
    model, said = named_model(name)
    row = read_run({"model": name, "device": "h200"})
    assert model.name == named_model(row.model)[0].name == profile
    assert checkpoint(model) == override(checkpoint(named_model(row.model)[0]), row.options.quant)
    assert checkpoint(model).describe() == stored
    assert (said == "") == (name == profile) and said.count("\n") == 0


@pytest.mark.parametrize(
    ("model", "precision", "device", "record", "stored"),
    [
        ("nvidia/Kimi-K2.5-NVFP4", None, "b200", False, "nvidia/Kimi-K2.5-NVFP4"),
        ("nvidia/Kimi-K2.5-NVFP4", "fp4", "b200", True, "nvidia/Kimi-K2.5-NVFP4"),
        ("nvidia/Kimi-K2.5-NVFP4", "int4", "b200", False, "kimi-k2.5"),  # says another precision than its name
        ("moonshotai/Kimi-K2.5", "fp4", "b200", True, "nvidia/Kimi-K2.5-NVFP4"),
        ("moonshotai/Kimi-K2.5", "fp4", "b200", False, "moonshotai/Kimi-K2.5"),  # of one's own: as the column says
        ("moonshotai/Kimi-K2.5", "int4", "b200", True, "moonshotai/Kimi-K2.5"),
        ("moonshotai/Kimi-K2.5", "fp4", "mi355x", True, "moonshotai/Kimi-K2.5"),
        ("openai/gpt-oss-120b", "fp4", "b200", True, "openai/gpt-oss-120b"),  # nobody stores it otherwise
        ("deepseek-ai/DeepSeek-V4-Pro", "fp4", "b200", True, "deepseek-ai/DeepSeek-V4-Pro"),  # 4 bits of its own
        ("MiniMaxAI/MiniMax-M3", "fp8", "h200", True, "MiniMaxAI/MiniMax-M3-MXFP8"),  # whatever the device
        ("minimax-m3", "fp8", "mi355x", True, "MiniMaxAI/MiniMax-M3-MXFP8"),
        ("minimax-m3", "fp8", "h200", False, "minimax-m3"),
        ("minimax-m3", "mxfp8", "h200", True, "minimax-m3"),
    ],
)
def test_a_row_is_stored_as_the_release_that_it_names_or_that_a_record_ran(
    model: str, precision: str | None, device: str, record: bool, stored: str
) -> None:
    cells = {"model": model, "device": device, "tp": 4, "dp": 1, "precision": precision}
    row = read_run(cells, frozenset({"moe_ep_size"}) if record else frozenset())
    assert row.model == stored
    if released(stored) is not None:
        assert row.options.quant is None
        format_, kept = ("mxfp8,kv=bf16", "head") if "MXFP8" in stored else ("nvfp4,kv=fp8", "attention")
        scheme = format_.partition(",")[0]
        assert checkpoint(named_model(stored)[0]).describe() == f"linear={scheme},experts={format_}"
        assert any(f"{kept} in bf16" in said for said in row.assumed)


@pytest.mark.parametrize(("model", "record", "quant"), [
    ("Qwen/Qwen3-30B-A3B", True, "linear=fp8_block,experts=fp8_block"), ("glm-4.6", True, "linear=fp8,experts=fp8"),
    ("Qwen/Qwen3-30B-A3B", False, "linear=fp8,experts=fp8"), ("MiniMaxAI/MiniMax-M2.5", True, None),
])  # fmt: skip
def test_fp8_of_a_record_is_what_its_vendors_release_stores(model: str, record: bool, quant: str | None) -> None:
    """Qwen's own FP8 releases scale blocks; MiniMax-M2.5 ships so."""
    cells = {"model": model, "device": "h200", "tp": 4, "dp": 1, "precision": "fp8"}
    assert read_run(cells, frozenset({"moe_ep_size"}) if record else frozenset()).options.quant == quant


@pytest.mark.parametrize(
    ("name", "quant"),
    [("x/Qwen3-8B-AWQ-8bit", "w8a16"), ("x/Qwen3-8B-GPTQ-Int8", "w8a16"), ("x/Qwen3-8B-GPTQ", "w4a16"),
     ("x/Qwen3-8B-AWQ-INT4", "w4a16"), ("x/Qwen3-8B-quantized.w8a8", "int8"), ("x/Qwen3-8B-NVFP4A16", "w4a16_nvfp4")],
)  # fmt: skip
def test_a_table_reads_the_bits_that_a_name_says(name: str, quant: str) -> None:
    row = read_run({"model": name, "device": "h200"})
    assert override(checkpoint(named_model(row.model)[0]), row.options.quant).linear.name.startswith(quant)


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


ELSEWHERE = ("meta-llama/Meta-Llama-3.1-405B-Instruct-FP8", "nvidia/MiniMax-M3-NVFP4")
"""The first is kept with two of its 510 entries; the second names modules that its class for text alone has not."""

PUBLIC = {
    one.name: one for one in public_configs.load() if released(one.name) is not None and one.name not in ELSEWHERE
}


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_named_release_is_stored_as_its_own_file_says(name: str) -> None:
    """Weights to 0.1 %, and the cache's precision, by the release's public config.json or hf_quant_config.json."""
    public, (model, said) = PUBLIC[name], named_model(name)
    table, by_name = traced(model, "decode"), checkpoint(model)
    entry = public.config.get("quantization_config") or public.beside
    by_file = from_config({**public.config, "quantization_config": entry})
    held = [float(weight_bytes(by_precision(table, one), one)) for one in (by_name, by_file)]
    assert held[0] == pytest.approx(held[1], rel=1e-3) and by_name.kv == by_file.kv
    assert f"stored {released(name).said}" in said  # type: ignore[union-attr]


def test_most_public_releases_are_known() -> None:
    assert len(PUBLIC) >= 25


def test_minimax_m3_is_stored_in_two_formats() -> None:
    """Experts in NVFP4, all else but embedding, head and routers in MXFP8."""
    model, _ = named_model("nvidia/MiniMax-M3-NVFP4")
    table, stored = traced(model, "decode"), checkpoint(model)
    layers = [p for p in table.params if p.role in ("experts", "linear")]
    names = {p.name: stored.scheme(p.name, p.role, p.stored).name for p in layers}
    assert {scheme for name, scheme in names.items() if ".experts." in name} == {"nvfp4"}
    assert {scheme for name, scheme in names.items() if ".experts." not in name} == {"mxfp8"}


def test_a_release_that_was_made_wider_is_cut_as_it_is() -> None:
    """Qwen's 72B in 4 bits: MLPs of 29,696, so that 232 groups of 128 divide over 2, 4 and 8 ranks, as 231 do not."""
    for name in ("Qwen/Qwen2.5-72B-Instruct-AWQ", "Qwen/Qwen2.5-72B-Instruct-GPTQ-Int4"):
        assert tc.simulate(name, device="a100", world_size=2).memory.weights < 22e9
    with pytest.raises(tc.InputError, match="29568 / 2 = 14784 is no multiple of 128"):
        tc.simulate("someone/Qwen2.5-72B-Instruct-AWQ", device="a100", world_size=2)
    assert checkpoint(named_model("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int8")[0]).linear.name.startswith("w8a16")


def test_names_of_models_that_ship_with_no_profile_say_what_to_do(tmp_path: Path) -> None:
    """Every type that is named is one of transformers', or refused with a reason, by name and by its config.json."""
    entries = yaml.safe_load((profile_roots()[-1] / "unshipped.yaml").read_text("utf-8"))
    for entry in entries:
        for name in entry["names"]:
            with pytest.raises(InputError) as told:
                load_model(f"somebody/{name}-instruct")
            said = entry.get("refused", f"give the folder with its config.json (type {entry['type']})")
            assert said in str(told.value) and (entry["type"] in CONFIG_MAPPING) != ("refused" in entry)
        if "refused" in entry:
            (tmp_path / "config.json").write_text(json.dumps({"model_type": entry["type"], "hidden_size": 64}))
            with pytest.raises(InputError, match="has no price: half of its layers"):
                load_model(tmp_path)
    with pytest.raises(InputError, match="did you mean"):
        load_model("qwen99")
