"""Pricing 100,000 decode steps of DeepSeek-V3 on 32 H200 in one call on one core. Target: under one second.

``OMP_NUM_THREADS=1 python benchmarks/price_points.py [--points N]``
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

import numpy as np

from tensorcast.deploy.deployment import deploy
from tensorcast.deploy.layout import Layout
from tensorcast.profiles.store import load_device, load_engine, load_model

TARGET_S = 1.0
CHECKED = 50
"""Points whose price alone must equal their price among the others."""


def main() -> int:
    """Print the seconds; 1 where a price is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--model", default="deepseek-v3")
    parser.add_argument("--device", default="h200")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core, whatever the environment says

    start = time.perf_counter()
    layout = Layout(32, 1, 32, 32)
    step = deploy(
        load_model(options.model), load_device(options.device), load_engine("vllm"), layout, "decode"
    ).step
    print(f"{options.model} decode on {options.device}, {layout}: laid out in {time.perf_counter() - start:.2f} s")

    rng = np.random.default_rng(0)
    batch = np.floor(2.0 ** rng.uniform(0, 9, options.points))
    past = np.floor(2.0 ** rng.uniform(0, 17, options.points))
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        seconds = np.asarray(step.seconds(batch, 1.0, past))
        taken.append(time.perf_counter() - start)
    best, median = min(taken), statistics.median(taken)
    verdict = "under" if best < TARGET_S else "OVER"
    print(
        f"{options.points:,} points in one call, {len(step.plan.rows)} rows each: {best:.2f} s (median of 3"
        f" {median:.2f} s), {verdict} the target of {TARGET_S:g} s; {best / options.points * 1e6:.2f} us per point"
    )

    start = time.perf_counter()
    worst = 0.0
    for i in rng.choice(options.points, min(CHECKED, options.points), replace=False):
        alone = float(step.seconds(float(batch[i]), 1.0, float(past[i])))
        worst = max(worst, abs(float(seconds[i]) / alone - 1.0))
    checked = min(CHECKED, options.points)
    each = (time.perf_counter() - start) / checked
    print(f"{checked} of them priced alone ({each * 1e3:.1f} ms each): largest difference {worst:.1e}")
    if not worst < 1e-9:
        print("error: a price depends on the points around it", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
