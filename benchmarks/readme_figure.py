"""The README's picture: where a DeepSeek-V3 decode step goes on 32 H200, under four layouts. `make figures`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorcast as tc
from tensorcast.report.figures import step_bars

LAYOUTS: dict[str, dict[str, Any]] = {
    "TP8 x DP4, EP32, low latency": {"tp": 8, "dp": 4, "ep": 32, "all2all": "low_latency"},
    "DP32, EP32, gather and scatter": {"tp": 1, "dp": 32, "ep": 32, "all2all": "allgather_reducescatter"},
    "DP32, EP32, high throughput": {"tp": 1, "dp": 32, "ep": 32, "all2all": "high_throughput"},
    "DP32, EP32, low latency": {"tp": 1, "dp": 32, "ep": 32, "all2all": "low_latency"},
}
TOKENS = 1024  # in flight over all 32 GPUs: 32 per GPU


def main(path: Path = Path("reports/readme.png")) -> None:
    """Simulate each layout at the same load and draw them."""
    runs = {
        name: tc.simulate(
            "deepseek-v3",
            device="h200",
            world_size=32,
            batch=TOKENS // layout["dp"],
            context=4096,
            engine="vllm",  # SGLang cannot cut the FP8 shared expert over 32 ranks, as gathering tokens asks
            **layout,
        )
        for name, layout in LAYOUTS.items()
    }
    ranked = sorted(runs, key=lambda name: runs[name].step_s)
    best, worst = ranked[0], ranked[-1]
    ratio = runs[worst].step_s / runs[best].step_s
    alike = [name for name in ranked[1:] if runs[name].interval_s[0] <= runs[best].interval_s[1]]
    title = (
        f"DeepSeek-V3 decode on 32 H200, {TOKENS} sequences of 4096 tokens:\n"
        f"{best} is {ratio:.1f}x as fast as {worst}; "
        + (f"{len(alike)} other{'s' if len(alike) > 1 else ''} too close to call" if alike else "no other comes close")
    )
    print(step_bars(runs, title, path))
    for name, run in runs.items():
        print(f"{name:34s} {1e3 * run.step_s:7.1f} ms  {run.tokens_per_s_per_gpu:7.0f} tokens/s per GPU")


if __name__ == "__main__":
    main()
