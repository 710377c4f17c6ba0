"""What recorded routing costs: the balancer, a step and a search, each beside the same without it.

    python benchmarks/expert_load.py [--eplb PATH_OF_EPLB_PY] [--served TABLE]

With the path of the published balancer (github.com/deepseek-ai/EPLB, eplb.py) its time is measured in the same run.
CPU seconds of this process, the least of several rounds taken in turn. With a table of served runs, as ``predict``
reads them, that alone: how far times per token are off under each law, by network, on rows left out of all fits.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

import tensorcast as tc
from tensorcast.cost.recordings.named import recording
from tensorcast.deploy.step.step import Step
from tensorcast.modeling.moe.balancing.published_eplb import published_eplb

ROUNDS = 5


def least(calls: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """CPU seconds of each call, the least of ``rounds`` in which they take turns."""
    found = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            found[name] = min(found[name], time.process_time() - start)
    return found


def balancer(path: str | None) -> None:
    counts = recording("deepseek-r1").of("decode").counts
    for ranks, nodes in ((32, 4), (72, 9), (144, 18)):
        kept = nodes if 8 % nodes == 0 else 1
        calls: dict[str, Callable[[], object]] = {
            "ours": lambda: published_eplb(counts, 288, ranks, nodes=kept, groups=8 if kept > 1 else 1),  # noqa: B023
        }
        if path:
            import torch

            spec = importlib.util.spec_from_file_location("eplb", path)
            assert spec is not None and spec.loader is not None
            theirs = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(theirs)
            torch.set_num_threads(1)
            weight = torch.tensor(counts)
            calls["published"] = lambda: theirs.rebalance_experts(weight, 288, 8, nodes, ranks)  # noqa: B023
        took = least(calls, 3)
        said = f"EPLB, 58 layers x 288 slots on {ranks} ranks: {1e3 * took['ours']:.1f} ms"
        if path:
            said += f", published {1e3 * took['published']:.0f} ms, {took['published'] / took['ours']:.0f} times"
        print(said)


def step_of(routing: str) -> Step:
    return tc.simulate(
        "deepseek-v3", device="h200", world_size=32, tp=1, dp=32, ep=32, batch=64, engine="sglang", routing=routing,
    ).deployment.step


def steps() -> None:
    made = {name: step_of(law) for name, law in (("one law", "zipf:0.5"), ("58 layers", "recorded:deepseek-r1"))}
    one = np.array([64.0])
    many = np.geomspace(1, 512, 120)
    for what, batch in (("a step", one), ("120 steps", many)):
        def priced(step: Step) -> Callable[[], object]:
            def price() -> object:
                fresh = replace(step, memo=None)  # a new memo: nothing is remembered
                return [fresh.price(batch + i * 1e-3, 1.0, 4096.0).seconds for i in range(20)]  # noqa: B023
            return price

        took = least({name: priced(step) for name, step in made.items()})
        print(f"{what}: one law {50 * took['one law']:.2f} ms, 58 layers {50 * took['58 layers']:.2f} ms, "
              f"{took['58 layers'] / took['one law']:.2f} times")


def search(mean: Path) -> None:
    def compared(routing: str) -> Callable[[], object]:
        return lambda: tc.compare(
            "deepseek-v3", device="h200", world_size=32, input_len=4096, output_len=1024, tpot_s=0.05, engine="sglang",
            routing=routing,
        )

    took = least({"one law": compared(f"recorded:{mean}"), "58 layers": compared("recorded:deepseek-r1")}, 2)
    print(f"compare on 32 GPUs: one law {took['one law']:.2f} s, 58 layers {took['58 layers']:.2f} s, "
          f"{took['58 layers'] / took['one law']:.2f} times")


def published() -> None:
    """SGLang's wide expert parallelism (lmsys.org/blog/2025-05-05-large-scale-ep), from the counts alone."""
    def step_s(phase: str, ranks: int, placement: str, copies: int) -> float:
        batch, new, past = (4, 4096, 0) if phase == "prefill" else (256, 1, 2050)
        return tc.simulate(
            "deepseek-v3", device="h100", world_size=ranks, tp=1, dp=ranks, ep=ranks, phase=phase, batch=batch,
            input_len=new, context=past, engine="sglang", routing="recorded:deepseek-r1", placement=placement,
            redundant_experts=copies, dual_batch_overlap=True, allow_oversize=True,
            all2all="high_throughput" if phase == "prefill" else "low_latency",
        ).step_s

    for phase, ranks, plain, tokens, gain, rate in (
        ("prefill", 32, ("linear", 0), 4 * 4096, "1.49", "50,302 at 4,096 tokens"),
        ("decode", 72, ("trivial", 32), 256, "2.54", "22,282"),
    ):
        balanced = step_s(phase, ranks, "eplb", 32)
        gained = step_s(phase, ranks, *plain) / balanced
        print(f"{phase} on {ranks // 8} nodes: EPLB gains {gained:.2f} times (published {gain}), "
              f"{8 * tokens / balanced:,.0f} tokens/s a node (published {rate})")


LAWS = ("served", "typical", "alike", "uniform", "balanced", "recorded:deepseek-r1")


def served(path: Path, folder: Path) -> None:
    """Errors of the time per token, median and mean, by network and law."""
    import pandas as pd

    from tensorcast.predict.predict import predict_file
    from tensorcast.predict.score import left_out, named

    runs = pd.read_csv(path, dtype=str, keep_default_na=False)
    print("| network | rows | " + " | ".join(LAWS) + " |\n|---|---:|" + "---:|" * len(LAWS))
    found: dict[str, dict[str, pd.Series[float]]] = {}
    for law in LAWS:
        table = folder / "runs.csv"
        runs.assign(routing=law).to_csv(table, index=False)
        frame = named(predict_file(table, 1, []))
        frame = frame[left_out(frame) & (frame["mode"] == "aggregated")]
        off = (frame["tpot_s"] / pd.to_numeric(frame["measured_tpot_s"]) - 1).abs().dropna()
        for model, some in off.groupby(frame["model"]):
            found.setdefault(str(model), {})[law] = some
    for model, laws in found.items():
        each = [laws[law] for law in LAWS if law in laws]
        cells = [f"{100 * one.median():.1f}, {100 * one.mean():.1f} %" for one in each]
        if len(set(cells)) > 1:  # a network with experts
            print(f"| {model} | {len(laws[LAWS[0]])} | " + " | ".join([*cells, "-"][: len(LAWS)]) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--eplb", metavar="FILE")
    parser.add_argument("--served", metavar="TABLE", type=Path)
    asked = parser.parse_args()
    if asked.served:
        with tempfile.TemporaryDirectory() as folder:
            served(asked.served, Path(folder))
        return
    balancer(asked.eplb)
    with tempfile.TemporaryDirectory() as folder:
        mean = Path(folder) / "mean.csv"
        shares = recording("deepseek-r1").of("decode").shares.mean(axis=0)
        mean.write_text("count\n" + "\n".join(f"{share:.9f}" for share in shares) + "\n")
        steps()
        search(mean)
    published()


if __name__ == "__main__":
    main()
