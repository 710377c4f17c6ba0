"""Public runs that no steady load says, predicted as they were sent: bursts and rates, replayed request by request.

``python benchmarks/public_runs.py [--bursts perf-overview.md] [--rates FOLDER]``

- ``--bursts``: NVIDIA's page of TensorRT-LLM (docs/source/developer-guide/perf-overview.md in NVIDIA/TensorRT-LLM,
  Apache-2.0): output tokens per second and GPU of ``trtllm-bench throughput``, which sends 1,000 to 3,000 requests of
  one length at once. ``DEP4`` is attention DP and experts over four GPUs, as its options say. The client chooses
  sequences and tokens of a step by its own estimate of the cache's room (tensorrt_llm/bench/build/tuning.py,
  ``calc_engine_setting``; build.py keeps the engine's defaults for precisions that it has not tuned, as gpt-oss's) and
  gives it room for the longest prompt beside a whole batch (benchmark/utils/general.py). Decode steps are padded to the
  graphs that the page lists. Caches are fp8 but for gpt-oss on Hopper. Experts run by CUTLASS, as its options say or
  leave it, but for gpt-oss on Hopper (Triton).
- ``--rates``: a checkout of https://github.com/inference-sim/training (Apache-2.0): inference-perf against vLLM on
  H100, evenly spaced requests, at most 128 sequences and 2,048 tokens a step. Some 45 prompts are sent again and again,
  so that vLLM's prefix cache, on unless asked, holds them but for their last block. Replies were sent with
  ``ignore_eos``: they have the length asked for. Runs of which more than a tenth failed are left out, as their authors
  do. A time per token is what a whole request took behind its first token.

Nothing was fitted to either.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from rich.console import Console
from rich.table import Table

from tensorcast.predict.predict import predict
from tensorcast.profiles.model import text_of
from tensorcast.profiles.store import load_device, load_model
from tensorcast.trace.cache import traced

MODELS = {
    "Deepseek R1 0528": "deepseek-r1", "GPT-OSS 120B": "gpt-oss-120b", "GPT-OSS 20B": "gpt-oss-20b",
    "LLaMA v3.3 70B": "llama-3.1-70b", "LLaMA v4 Maverick": "llama-4-maverick", "Qwen3 235B A22B": "qwen3-235b-a22b",
    "Qwen3 30B A3B": "qwen3-30b-a3b",
}
"""Headings of the page, and the models that they are."""

DEVICES = {"B200": "b200", "GB200": "gb200", "H200": "h200", "H100": "h100"}

SENT = {(1024, 1024): 3000, (8192, 1024): 1500, (1024, 8192): 1500, (32768, 1024): 1000, (1024, 32768): 1000}
"""Requests of a run, by lengths of prompt and reply; 1,000 and 1,000 tokens as 1,024."""

BATCH, TOKENS = 2048, 8192
"""Sequences and tokens of a step as the engine has them unasked."""

GRAPHS = "1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512, 1024, 2048, 4096, 8192"
"""Batches of captured graphs, all else padded to them."""

CACHE_SHARE = 0.95
"""Of the memory that weights leave: the page's, but where that was too much."""

COUNTED = {"fp8": (1.0, 1.0), "fp4": (0.5 + 1 / 16, 0.5)}
"""Elements that a checkpoint stores per parameter (two numbers of 4 bits in one, and a scale for 16), and the bytes
that the client takes each for."""

MOST_FAILED = 0.1

QUARTERS = (25, 50, 75)


def step_sizes(row: dict[str, Any], gpus: int) -> dict[str, int]:
    """Sequences and tokens of a step as the client sets them for a row of ``predict``."""
    isl, osl = row["isl"], row["osl"]
    sequences, tokens = BATCH, TOKENS
    if "precision" in row:
        model, device = load_model(row["model"]), load_device(row["device"])
        config = text_of(model.config)
        stored, bytes_each = COUNTED[row["precision"]]
        heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
        width = config.get("head_dim") or config["hidden_size"] // heads
        token_bytes = 2 * layers * max(gpus, config.get("num_key_value_heads") or heads) * width  # of fp8
        weight_bytes = traced(model, "decode").total_params() * stored * bytes_each
        left = gpus * float(device.memory_bytes) - weight_bytes
        most = min(left * CACHE_SHARE / (token_bytes * (isl + osl)), 4096)
        needed = min(most * (1 + isl / osl), 32768)
        whole = 32 if most < 256 else 128 if most < 1024 else 256
        sequences = max(64, whole * math.ceil(most / whole))
        whole = 256 if needed < 4096 else 512 if needed < 8192 else 1024
        tokens = max(2048, whole * math.ceil(needed / whole))
    return {"max_num_seqs": sequences, "chunk_tokens": max(tokens, isl + sequences)}


def bursts(page: str) -> list[dict[str, Any]]:
    """Rows for ``predict`` of the page's tables."""
    rows: list[dict[str, Any]] = []
    for section in re.split(r"^# ", page, flags=re.MULTILINE):
        name, _, rest = section.partition("\n")
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in rest.splitlines() if line[:1] == "|"]
        if name not in MODELS or not lines:
            continue
        for lengths, *cells in lines[2:]:
            isl, osl = map(int, lengths.split("/"))
            for head, cell in zip(lines[0][1:], cells, strict=True):
                said = re.fullmatch(r"(\w+)<br/>(DEP|TP)(\d+) \((FP4|FP8)\)", head)
                if not said or not cell:
                    continue
                size, apart = int(said[3]), said[2] == "DEP"
                row = {
                    "model": MODELS[name], "device": DEVICES[said[1]], "engine": "trtllm", "isl": isl, "osl": osl,
                    "graph_sizes": GRAPHS, "requests": SENT[max(isl, 1024), max(osl, 1024)], "tp": 1 if apart else size,
                    "dp": size if apart else 1, "ep": size if apart else None,
                    "measured_output_tokens_per_s": float(cell.replace(",", "")) * size,
                }
                if "GPT-OSS" not in name:  # those are published in four bits, whatever the device computes in
                    row["precision"] = said[4].lower()
                if "GPT-OSS" not in name or said[4] == "FP4":
                    row["kv_dtype"] = "fp8"
                if "LLaMA v3.3" not in name:
                    row["experts_kernels"] = "cutlass" if "kv_dtype" in row else "triton"
                rows.append(row | step_sizes(row, size))
    return rows


def rates(folder: Path) -> list[dict[str, Any]]:
    """Rows for ``predict`` of the runs' stages."""
    rows: list[dict[str, Any]] = []
    for profile in sorted(folder.glob("default_args/*/profile.yaml")):
        said = yaml.safe_load(profile.read_text(encoding="utf-8"))
        prompts, tp = said["data"]["shared_prefix"], re.search(r"-tp(\d+)-", profile.parent.name)
        assert tp is not None
        for number, stage in enumerate(said["load"]["stages"]):
            found = json.loads((profile.parent / "results" / f"stage_{number}_lifecycle_metrics.json").read_text())
            sent, done = found["load_summary"]["count"], found["successes"]
            if done["count"] < (1 - MOST_FAILED) * sent:
                continue
            took, osl, isl = done["latency"], int(prompts["output_len"]), round(done["prompt_len"]["mean"])
            ttft_s, whole_s = took["time_to_first_token"]["mean"], took["request_latency"]["mean"]
            config = folder / "model_configs" / said["server"]["model_name"].rsplit("/", 1)[-1] / "config.json"
            rows.append({
                "model": str(config), "device": "h100", "engine": "vllm", "tp": int(tp[1]), "isl": isl, "osl": osl,
                "request_rate": stage["rate"], "burstiness": math.inf, "requests": min(sent, 5000),
                "max_num_seqs": 128, "chunk_tokens": 2048, "prefix_cached": isl - 1,
                "measured_ttft_s": ttft_s, "measured_tpot_s": (whole_s - ttft_s) / (osl - 1),
            })  # fmt: skip
    return rows


def show(console: Console, rows: list[dict[str, Any]], out: Path | None) -> None:
    """Every row and the errors' quarters."""
    found = predict(pd.DataFrame(rows))
    if out is not None:
        found.to_csv(out, index=False)
    errors: dict[str, pd.Series] = {}
    for name in ("output_tokens_per_s", "ttft_s", "tpot_s"):
        if f"measured_{name}" in found:
            errors[name] = found[name] / found[f"measured_{name}"] - 1
    if "ttft_s" in errors:
        whole = [found[f"{of}ttft_s"] + found[f"{of}tpot_s"] * (found["osl"] - 1) for of in ("", "measured_")]
        errors["request_s"] = whole[0] / whole[1] - 1
    table = Table("model", "device", "layout", "lengths", "sent", *errors, box=None)
    for i, row in enumerate(rows):
        layout = f"dp{row['dp']}-ep{row['ep']}" if row.get("dp", 1) > 1 else f"tp{row['tp']}"
        sent = f"{row['request_rate']}/s" if "request_rate" in row else f"{row['requests']:,} at once"
        off = [str(found["problem"][i])[:40] if np.isnan(one[i]) else f"{one[i]:+.0%}" for one in errors.values()]
        model = Path(row["model"]).parent.name or row["model"]
        table.add_row(model, row["device"], layout, f"{row['isl']}/{row['osl']}", sent, *off)
    console.print(table)
    for name, one in errors.items():
        quarters = ", ".join(f"{value:.1%}" for value in np.percentile(one.dropna().abs(), QUARTERS))
        console.print(f"{name}: error of {one.notna().sum()} runs, quarters {quarters}; mean {one.mean():+.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bursts", type=Path, help="TensorRT-LLM's perf-overview.md")
    parser.add_argument("--rates", type=Path, help="a checkout of inference-sim/training")
    parser.add_argument("--out", type=Path, help="CSV of the last set's rows, predicted")
    options = parser.parse_args()
    console = Console(width=130)
    if options.bursts is not None:
        show(console, bursts(options.bursts.read_text(encoding="utf-8")), options.out)
    if options.rates is not None:
        show(console, rates(options.rates), options.out)


if __name__ == "__main__":
    main()
