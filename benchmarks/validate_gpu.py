"""Everything that needs a GPU, in one go: `make validate-gpu`. Any part that ran is kept; a second run goes on.

1. MoE numerics of ten families, float32 and bfloat16, every experts backend against transformers' eager block.
2. One full-size MoE layer of DeepSeek-V3 and Qwen3-235B, timed per backend at 1 to 16384 tokens.
3. `tensorcast validate` of whole models that fit and of one-rank shards of those that do not.
4. `tensorcast calibrate` on all that was measured.

`--device cpu --tiny` runs the same parts at toy sizes, which is how they are tested without a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

FAMILIES: tuple[str, ...] = (
    "deepseek_v3", "qwen3_moe", "mixtral", "gpt_oss", "llama4_text", "glm4_moe", "ernie4_5_moe", "minimax_m2",
    "qwen2_moe", "olmoe",
)
TINY_FAMILIES = ("qwen3_moe", "gpt_oss")
BOUND = {"float32": 1e-5, "bfloat16": 5e-2}

MOE_LAYERS = ("deepseek-v3", "qwen3-235b-a22b")

RUNS: dict[str, list[str]] = {
    "qwen3-30b-a3b": ["qwen3-30b-a3b"],
    "mixtral-8x7b": ["mixtral-8x7b"],
    "gpt-oss-20b": ["gpt-oss-20b", "--quant", "bf16"],
    "deepseek-v3-tp8-ep8": ["deepseek-v3", "--tp", "8", "--ep", "8", "--shrink"],
    "deepseek-v3-ep32": ["deepseek-v3", "--ep", "32", "--shrink"],
    "qwen3-235b-tp8-ep8": ["qwen3-235b-a22b", "--tp", "8", "--ep", "8", "--shrink"],
}
"""Folder: arguments of `tensorcast validate`."""

TINY = {"model_type": "qwen3_moe", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2, "num_experts": 16,
        "num_experts_per_tok": 4, "moe_intermediate_size": 48, "norm_topk_prob": True}


def numerics(torch_device: Any, families: Sequence[str]) -> list[dict[str, Any]]:
    """Largest relative error of every backend against transformers' eager block, fresh random weights and inputs."""
    import torch
    from moe_blocks import block_of

    from tensorcast.modeling.moe.backends import BACKENDS
    from tensorcast.modeling.moe.layer import MoELayer

    rows = []
    for family in families:
        for dtype in (torch.float32, torch.bfloat16):
            block = block_of(family, dtype, seed=torch.seed() % 1000).to(torch_device)
            name = str(dtype).removeprefix("torch.")
            x = torch.randn(1, 33, 64, device=torch_device).to(dtype)
            with torch.inference_mode():
                expected = block(x)
                expected = (expected[0] if isinstance(expected, tuple) else expected).reshape(x.shape).float()
                for backend in BACKENDS:
                    row: dict[str, Any] = {"family": family, "dtype": name, "backend": backend}
                    try:
                        found = MoELayer(block, backend=backend)(x).float()
                        row["relative_error"] = float((found - expected).abs().max() / expected.abs().max())
                        row["ok"] = row["relative_error"] < BOUND[name]
                    except (RuntimeError, NotImplementedError, ValueError) as reason:
                        row |= {"ok": False, "problem": str(reason).splitlines()[0][:160]}
                    rows.append(row)
    return rows


def moe_layers(
    models: Sequence[Any], torch_device: Any, out: Path, tokens: Sequence[int], effort: float
) -> list[dict[str, Any]]:
    """Rows of `tensorcast.measure.moe_layer` for all models."""
    from tensorcast.measure.environment import environment, fingerprint
    from tensorcast.measure.moe_layer import measure_moe_layer
    from tensorcast.measure.store import Store

    store = Store(out / "moe_layers.jsonl")
    belongs = fingerprint(environment(torch_device.type))
    rows: list[dict[str, Any]] = []
    for model in models:
        rows += measure_moe_layer(
            model, torch_device, store, belongs, tokens=tokens, effort=effort, say=lambda text: print(text, flush=True)
        )
    return rows


def page(environment: dict[str, str], errors: list[dict[str, Any]], layers: list[dict[str, Any]]) -> str:
    """Markdown: environment, numerics, one table per model with a column per backend."""
    from tensorcast.modeling.moe.backends import BACKENDS
    from tensorcast.report import units

    lines = [f"# MoE layers on {environment['device']}", "", "Made by `make validate-gpu`; do not edit.", ""]
    lines += [f"- {name}: {value}" for name, value in environment.items()]
    lines += ["", "## Numerics", "", "Largest relative error over the backends, against transformers' eager block.", ""]
    lines += ["| family | dtype | error | worst backend |", "|---|---|---:|---|"]
    for key in dict.fromkeys((r["family"], r["dtype"]) for r in errors):
        mine = [r for r in errors if (r["family"], r["dtype"]) == key]
        worst = max(mine, key=lambda r: r.get("relative_error", float("inf")))
        told = f"{worst['relative_error']:.1e}" if "relative_error" in worst else worst["problem"]
        lines.append(f"| {key[0]} | {key[1]} | {told} | {worst['backend']} |")
    for model in dict.fromkeys(r["model"] for r in layers):
        lines += ["", f"## {model}: one MoE layer, bf16", "", "| tokens | " + " | ".join(BACKENDS) + " |"]
        lines.append("|---:|" + "---:|" * len(BACKENDS))
        cell = {(r["tokens"], r["backend"]): r for r in layers if r["model"] == model}
        for count in dict.fromkeys(r["tokens"] for r in layers if r["model"] == model):
            cells = (cell[count, b] for b in BACKENDS)
            texts = (units.seconds(c["seconds"]) if c.get("seconds") else c["problem"] for c in cells)
            lines.append(f"| {count} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def _tensorcast(*arguments: str) -> bool:
    """One command in a process of its own: a kernel that crashes takes only it along. Tried again once."""
    for _ in range(2):
        print("tensorcast", *arguments, flush=True)
        if subprocess.run([sys.executable, "-m", "tensorcast", *arguments], check=False).returncode == 0:
            return True
    return False


def command(words: str | None, out: str) -> argparse.ArgumentParser:
    """The arguments of a script that runs on a GPU, or on the CPU to try it."""
    parser = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="h200", help="profile to compare with; cpu is this machine")
    parser.add_argument("--out", type=Path, default=Path(out), help="folder to write")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the parts")
    return parser


def ready(options: argparse.Namespace) -> Any:
    """The torch device that the profile stands for, the folder made; None, and a line, where there is none."""
    import torch

    from tensorcast.api import device_profile

    on_cpu = device_profile(options.device).name == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        print("error: this machine has no CUDA device; try the parts with --device cpu --tiny", file=sys.stderr)
        return None
    options.out.mkdir(parents=True, exist_ok=True)
    return torch.device("cpu" if on_cpu else "cuda")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. 0 where all parts ran and the numerics hold."""
    options = command(__doc__, "reports/validate-gpu").parse_args(arguments)
    if (device := ready(options)) is None:
        return 2
    import pandas as pd

    from tensorcast.files import write_atomically
    from tensorcast.measure.environment import environment
    from tensorcast.measure.moe_layer import TOKENS
    from tensorcast.profiles.store import load_model

    out: Path = options.out
    runs, families, effort = RUNS, FAMILIES, 1.0
    tokens: Sequence[int] = TOKENS
    if options.tiny:
        (out / "tiny").mkdir(exist_ok=True)
        (out / "tiny" / "config.json").write_text(json.dumps(TINY), encoding="utf-8")
        small = [str(out / "tiny"), "--effort", "0.05", "--batch", "1,2,4,8", "--phase", "decode", "--context", "16"]
        runs, families, tokens, effort = {"tiny-run": [*small, "--shrink"]}, TINY_FAMILIES, (1, 16), 0.05
    models = [load_model(str(out / "tiny"))] if options.tiny else [load_model(name) for name in MOE_LAYERS]
    errors = numerics(device, families)
    write_atomically(out / "numerics.csv", pd.DataFrame(errors).to_csv(index=False))
    layers = moe_layers(models, device, out, tokens, effort)
    write_atomically(out / "moe_layers.csv", pd.DataFrame(layers).drop(columns="key").to_csv(index=False))
    write_atomically(out / "moe_layers.md", page(environment(device.type), errors, layers))
    done = {name: _tensorcast("validate", *given, "--device", options.device, "--out", str(out / name))
            for name, given in runs.items()}
    tables = [pd.read_csv(out / name / "measurements.csv") for name, ok in done.items() if ok]
    fitted = False
    if tables:
        write_atomically(out / "measurements.csv", pd.concat(tables, ignore_index=True).to_csv(index=False))
        fitted = _tensorcast(
            "calibrate", "--device", options.device, "--from", str(out / "measurements.csv"), "--write",
            str(out / f"{Path(options.device).stem}-fitted.yaml"),
        )
    wrong = [f"{r['family']} {r['dtype']} {r['backend']}" for r in errors if not r["ok"]]
    failed = [*(f"numerics of {name}" for name in wrong), *(name for name, ok in done.items() if not ok)]
    failed += [] if fitted else ["calibrate"]
    print(f"{'failed: ' + ', '.join(failed) if failed else 'all parts ran'}; results in {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
