"""A measured study of prefill/decode ratios, replayed run by run: time per token, throughput and the best ratio.

``python benchmarks/pool_ratios.py FILE [--engine sglang==0.5.6.post2] [--own-sizes]``: the CSV of dstack's study
(https://github.com/dstackai/benchmarks/tree/main/comparison/pd_ratio, Apache-2.0): gpt-oss-120b on 8 H200, SGLang of
September 2025. Runs are read as its scripts make them:

- ``run_benchmark.sh`` sends 500 prompts of one length at once through ``--max-concurrency``, to a round-robin router;
- ``run_all.sh`` goes from many users to few with the client's own seed, so that fewer users send the same prompts once
  more: from the cache, but for those of 32,784 tokens, of which no cache there holds 500. The client tries the server
  with one request first (vllm 0.10.2, benchmarks/serve.py), so that each run sends 501: of two servers that read
  prompts the second run's go to the other one, and are read once more;
- its prompts are numbers that follow one another in the vocabulary (vllm, benchmarks/datasets.py, random): alike;
- replies end by themselves, some before the most that was asked for, and their sum alone is recorded. Over limits of
  128, 2,048 and 32,784 tokens it grows in proportion (to prompts of 2,048 tokens means of 64, 745 and 11,700): a third
  of the replies never ends, the others do within some thirty tokens. So many reach the limit here as make up a run's
  mean, the others are exponential;
- workers are of two GPUs; with one of each, of four (``--own-sizes`` takes two there, too): 32 users' tokens come at
  7.4 ms from them and at 10.5 ms from the same one decode worker behind three that read prompts. Each sees its own
  GPUs alone (``CUDA_VISIBLE_DEVICES``), in a container with no other network than the host's: caches go by TCP, as
  serving/hand_over.py has it, and not over NVLink (``--links``).

Runs in which some requests failed are listed, not counted. Nothing was fitted to any of them.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from tensorcast.deploy.options import Options
from tensorcast.predict.arrivals import beginning_alike
from tensorcast.profiles.store import load_device, load_engine, load_model
from tensorcast.scheduling.pools import parse_servers
from tensorcast.scheduling.replay import PricedServers, priced_servers
from tensorcast.scheduling.requests import Lengths, Requests

USERS = (128, 64, 32)
"""Of the runs of a load, in their order."""

LONG = 5000
"""Tokens of prompts of which no cache holds 500."""

HOST_GBS = 1 / (1 / 10 + 1 / 7)
"""Of a GPU's cache, copied to the host and sent, as UCX states both (tensorcast/serving/hand_over.py)."""

SHORT = 28.0
"""Mean tokens of replies that end: with it, one share of endless ones makes up the means of all three limits."""


def replies(mean: float, most: int, count: int) -> Lengths:
    """``count`` lengths with that mean: exponential with :data:`SHORT` tokens, or ``most``, at random places."""
    random = np.random.default_rng(0)
    long = random.permutation(count) < round(count * (mean - SHORT) / (most - SHORT))
    ends = np.rint(random.exponential(SHORT, count))
    return np.where(long, most, np.clip(ends, 1, most)).astype(np.int64)


def again(users: int, readers: int) -> bool:
    """Whether each of so many servers that read prompts in turn is sent prompts that it has read in an earlier run."""
    run = USERS.index(users)
    return any((run - earlier) * 501 % readers == 0 for earlier in range(run))


def sent(row: dict[str, str]) -> Requests:
    """What a run sent."""
    count, done, users = int(row["num_prompts"]), int(row["completed"]), int(row["conc"])
    prompt = round(float(row["total_input_tokens"]) / done)
    found = Requests(
        arrival_s=np.zeros(count), input_len=np.full(count, prompt), users=users, fixed=False,
        output_len=replies(float(row["total_output_tokens"]) / done, int(row["osl"]), count),
    )
    return beginning_alike(found, prompt) if prompt < LONG and again(users, int(row["prefill"])) else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--engine", default="sglang==0.5.6.post2", help="rules of the oldest release that was read")
    parser.add_argument("--own-sizes", action="store_true", help="workers of two GPUs in every run")
    parser.add_argument("--links", action="store_true", help="caches go over NVLink")
    options = parser.parse_args()
    with options.file.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    priced: dict[str, PricedServers] = {}
    model, device, engine = load_model("gpt-oss-120b"), load_device("h200"), load_engine(options.engine)
    served = Options(routing="alike", hand_over_gbs=None if options.links else HOST_GBS)
    heads = [head for name in ("TPOT ms", "tokens/s", "TTFT ms") for head in (name, "replayed")]
    table = Table("ratio", "users", "lengths", *heads, box=None)
    errors: list[tuple[float, ...]] = []
    loads: dict[tuple[str, ...], list[tuple[str, float, float]]] = {}
    for row in rows:
        tp = 4 if row["prefill"] == row["decode"] == "1" and not options.own_sizes else 2
        layout = f"{row['prefill']} x tp{tp} > {row['decode']} x tp{tp}"
        if layout not in priced:
            priced[layout] = priced_servers(
                model, device, engine, parse_servers(layout), longest=1 << 16, options=served
            )
        said = priced[layout].run(sent(row), router="round_robin").summary()
        measured = float(row["mean_tpot_ms"]), float(row["output_throughput"]), float(row["mean_ttft_ms"])
        found = 1e3 * said["tpot_mean_s"], said["output_tokens_per_s"], 1e3 * said["ttft_mean_s"]
        ratio, load = f"{row['prefill']}:{row['decode']}", (row["conc"], row["isl"], row["osl"])
        cells = [f"{value:,.1f}" for pair in zip(measured, found, strict=True) for value in pair]
        whole = row["completed"] == row["num_prompts"]
        table.add_row(ratio, row["conc"], f"{row['isl']}/{row['osl']}{'' if whole else ' (failed)'}", *cells)
        if whole:
            errors.append(tuple(abs(one / other - 1) for one, other in zip(found, measured, strict=True)))
            loads.setdefault(load, []).append((ratio, measured[1], found[1]))
    console = Console(width=120)
    console.print(table)
    median = np.median(errors, axis=0)
    words = (f"{name} {error:.1%}" for name, error in zip(("TPOT", "tokens/s", "TTFT"), median, strict=True))
    console.print(f"median error of {len(errors)} runs: {', '.join(words)}")
    right = 0
    for asked, runs in loads.items():
        best, chosen = (max(runs, key=lambda run: run[i])[0] for i in (1, 2))
        right += best == chosen
        console.print(f"{asked[0]} users, {asked[1]}/{asked[2]}: best {best}, replayed {chosen}")
    console.print(f"the best ratio is found for {right} of {len(loads)} loads")


if __name__ == "__main__":
    main()
