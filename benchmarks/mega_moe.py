"""Kernels that exchange tokens inside the experts' own (DeepGEMM's mega-MoE): how much of an exchange they hide.

``python benchmarks/mega_moe.py --tables DIR`` reads ``dsv4_megamoe_module_perf.parquet`` of aiconfigurator-core
(0.12.0: SGLang on B200, GB200 and GB300), prices the same exchange and the same experts apart (``low_latency``), and
prints the share of the shorter of both that the whole call hides, with how far calls are off at that share and with
none and all of it hidden. The share is the median of every other size; errors are those of the others.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import tensorcast as tc

MODELS = {(7168, 384): "deepseek-v4-pro", (3584, 896): "kimi-k3"}
"""Shipped models with these experts, by hidden size and number."""


def parts(model: str, device: str, ranks: int, tokens: int) -> tuple[float, float]:
    """Seconds of one layer's exchange and experts, ``tokens`` on each of the ranks, balanced."""
    decode = tokens <= 1024
    sizes: dict[str, Any] = {"batch": tokens, "context": 1024} if decode else {"batch": 1, "input_len": tokens}
    run = tc.simulate(
        model, device=device, engine="sglang", tp=1, dp=ranks, ep=ranks, world_size=ranks, all2all="low_latency",
        routing="balanced", phase="decode" if decode else "prefill", allow_oversize=True, **sizes,
    )  # fmt: skip
    found, rows = {"exchange": 0.0, "experts": 0.0}, run.records()
    layers = sum(row["count"] for row in rows if row["shape"] == "dispatch")
    for row in rows:
        if row["shape"] in ("dispatch", "combine"):
            found["exchange"] += row["seconds"]
        elif "experts" in str(row["module"]) and "shared" not in str(row["module"]):
            found["experts"] += row["seconds"]
    return found["exchange"] / layers, found["experts"] / layers


def measured(tables: Path) -> pd.DataFrame:
    """Every balanced call, with the parts that it is made of."""
    found = []
    for path in sorted(tables.rglob("dsv4_megamoe_module_perf.parquet")):
        device = path.relative_to(tables).parts[0].replace("_", "-")
        calls = pd.read_parquet(path).query("distribution == 'balanced'")
        keys = ["hidden_size", "num_experts", "moe_ep_size", "num_tokens"]
        for key, rows in calls.groupby(keys):
            hidden, experts, ranks, tokens = (int(str(one)) for one in key)
            model = MODELS.get((hidden, experts))
            if model is None:
                continue
            exchange_s, experts_s = parts(model, device, ranks, tokens)
            found.append({"device": device, "ranks": ranks, "tokens": tokens, "seconds": rows.latency.mean() / 1e3,
                          "exchange_s": exchange_s, "experts_s": experts_s})  # fmt: skip
    return pd.DataFrame(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tables", type=Path, required=True, help="aiconfigurator_core/systems/data")
    calls = measured(parser.parse_args().tables)
    shorter = np.minimum(calls.exchange_s, calls.experts_s)
    both = calls.exchange_s + calls.experts_s
    fitted = np.arange(len(calls)) % 2 == 0
    large = calls.tokens >= 512
    share = float(((both - calls.seconds) / shorter)[fitted & large].clip(0, 1).median())
    print(calls.assign(hidden=(both - calls.seconds) / shorter).to_string(float_format="{:.3g}".format))
    print(f"share hidden: {share:.2f}, of {int((fitted & large).sum())} calls of 512 tokens and more")
    for name, some in (("512 tokens and more", large), ("fewer", ~large)):
        for said, hides in ((f"{share:.2f}", share), ("none", 0.0), ("all", 1.0)):
            off = np.abs((both - hides * shorter) / calls.seconds - 1)[some & ~fitted]
            print(f"{name}, {said} hidden: {100 * off.median():.0f} % off in the median of {len(off)} others")


if __name__ == "__main__":
    main()
