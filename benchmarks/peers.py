"""Public served runs that no fit of ours has seen, predicted by us and by aiconfigurator.

``python benchmarks/peers.py PYTHON [--out reports/peers.md]``: ``PYTHON`` is the interpreter of an environment with
aiconfigurator (``make peers`` makes one). Both are told the same: model and precision as published, layout, mean
lengths, users, and how many drafted tokens are accepted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd

from tensorcast.files import write_atomically
from tensorcast.measure.environment import cpu_model
from tensorcast.predict.launch_records import LENGTH_RATIO, MTP_ACCEPTANCE
from tensorcast.predict.predict import predict_file

RUNS = Path(__file__).with_name("inferencex_runs.csv")

CHECKPOINTS = {
    ("glm-5", "fp4"): "nvidia/GLM-5-NVFP4", ("glm-5", "fp8"): "zai-org/GLM-5-FP8",
    ("kimi-k2.5", "fp4"): "nvidia/Kimi-K2.5-NVFP4", ("kimi-k2.5", "int4"): "moonshotai/Kimi-K2.5",
    ("minimax-m2.5", "fp4"): "nvidia/MiniMax-M2.5-NVFP4", ("minimax-m2.5", "fp8"): "MiniMaxAI/MiniMax-M2.5",
    ("minimax-m3", "mxfp8"): "MiniMaxAI/MiniMax-M3",
}
"""Configs that aiconfigurator-core ships, by model and precision of the runs."""

PREDICTED = ("tpot_s", "tpot_low_s", "tpot_high_s")
"""What is taken of our predictions."""

SYSTEMS = {"h100": "h100_sxm", "h200": "h200_sxm", "b200": "b200_sxm"}

ASK = """
import contextlib, json, logging, os, sys
logging.disable(logging.WARNING)
from aiconfigurator.cli.api import cli_estimate
for line in sys.stdin:
    model, system, asked = json.loads(line)
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        try:
            found = {"tpot_s": float(cli_estimate(model, system, **asked).tpot) / 1e3}
        except Exception as error:
            found = {"problem": str(error)}
    print(json.dumps(found), flush=True)
"""


def asked(run: dict[str, Any]) -> str:
    """A line for :data:`ASK`."""
    ranks, depth = int(run["attention_dp_size"]), 0 if pd.isna(run["mtp_depth"]) else int(run["mtp_depth"])
    mean = (1 + LENGTH_RATIO) / 2  # of the stated lengths
    drafts: dict[str, Any] = {}
    if depth:
        drafts = {"nextn": depth, "nextn_accepted": sum(MTP_ACCEPTANCE**i for i in range(1, depth + 1))}
    return json.dumps((
        CHECKPOINTS[run["model_path"], run["precision"]], SYSTEMS[run["system"]],
        {
            "mode": "agg", "backend_name": run["backend"], "isl": round(mean * run["isl"]),
            "osl": round(mean * run["osl"]), "batch_size": max(1, int(run["concurrency"]) // ranks),
            "tp_size": int(run["tp_size"]), "attention_dp_size": ranks, "moe_tp_size": int(run["moe_tp_size"]),
            "moe_ep_size": int(run["moe_ep_size"]), **drafts,
        },
    ))  # fmt: skip


def table(runs: pd.DataFrame) -> str:
    """Errors of time per token by model, where both tell one."""
    lines = [
        "| model | runs | tensorcast | predicted / measured | aiconfigurator | predicted / measured |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    both = runs[runs["theirs"].notna()]
    for name, some in [("**all**", both), *both.groupby("model_path")]:
        cells = [f"{name}", f"{len(some)}"]
        for column in ("tpot_s", "theirs"):
            ratio = some[column] / some["measured_tpot_s"]
            cells += [f"{100 * (ratio - 1).abs().median():.1f} %", f"{ratio.median():.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="interpreter that has aiconfigurator")
    parser.add_argument("--out", type=Path, default=Path("reports/peers.md"))
    chosen = parser.parse_args()
    runs, found = pd.read_csv(RUNS), predict_file(RUNS)
    for name in PREDICTED:
        runs[name] = pd.to_numeric(found[name])
    shipped = runs.set_index(["model_path", "precision"]).index.isin(CHECKPOINTS.keys())
    runs = runs[shipped & runs["system"].isin(SYSTEMS.keys()) & (runs["mode"] == "agg")].reset_index(drop=True)
    lines = [asked({str(name): value for name, value in run.items()}) for run in runs.to_dict("records")]
    version = "import importlib.metadata as m; print(m.version('aiconfigurator'), m.version('aiconfigurator-core'))"
    release, core = subprocess.check_output([chosen.python, "-c", version], text=True).split()
    before = os.times()
    done = subprocess.run(
        [chosen.python, "-c", ASK], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    after = os.times()  # CPU seconds of all children
    theirs_s = after.children_user + after.children_system - before.children_user - before.children_system
    told = [json.loads(line) for line in done.stdout.splitlines()]
    runs["theirs"] = pd.Series([one.get("tpot_s") for one in told], dtype=float)
    refused = runs[runs["theirs"].isna()]
    memory = sum("OOM" in one.get("problem", "") for one in told)
    alone = (refused["tpot_s"] / refused["measured_tpot_s"] - 1).abs().median()
    inside = runs["measured_tpot_s"].between(runs["tpot_low_s"], runs["tpot_high_s"])
    page = f"""# Beside aiconfigurator: public runs that no fit of ours has seen

Made by `make peers`. Time per token of {len(runs)} aggregated runs on H100, H200 and B200 out of InferenceX's posts
(`benchmarks/inferencex_runs.csv`, sources in it), predicted by tensorcast and by aiconfigurator {release} (tables of
aiconfigurator-core {core}, newest ones of each engine, as it takes them unasked). Both are told the checkpoint, the
layout, mean lengths, users and how many drafted tokens are accepted. Errors are medians of
|predicted / measured - 1|. Our kernels are fitted to the same tables; what the two differ in is everything else.

{table(runs)}

Of the {len(runs)} runs aiconfigurator refuses {len(refused)}, {memory} of them for want of memory on machines that ran
them, with more users than have room at once; tensorcast lets the others wait, and is {100 * alone:.1f} % off on these.
aiconfigurator gives no interval; tensorcast's of 80 % hold {100 * inside.mean():.0f} % of all {len(runs)}.
aiconfigurator took {theirs_s / len(runs):.1f} CPU seconds for a run (one process for all, {cpu_model()}).
"""
    write_atomically(chosen.out, page.encode())
    print(page)


if __name__ == "__main__":
    main()
