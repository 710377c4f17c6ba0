"""MoE on a GPU in at most eight minutes: `python benchmarks/moe_gpu.py --device h200`. What ran is kept as it comes.

1. The three routing ops on CUDA against their CPU results.
2. Two families' layers, every experts backend, fp32 and bf16, against the same layer on the CPU.
3. Quantised experts of every scheme against the same experts on the CPU.
4. One full-size layer of two models, timed per backend and number of tokens, beside its prediction.

Rows go to ``DIR/moe_gpu.csv``, with the machine and versions in ``DIR/moe_gpu.json``. `--device cpu --tiny` tries it.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from validate_gpu import BOUND, TINY, command, ready  # noqa: E402  (beside this file)

LAYERS = ("qwen3-30b-a3b", "deepseek-v3")
TOKENS = (1, 16, 128, 1024, 8192)
MOE_OPS = frozenset(
    ("moe_gating_top_k_softmax", "moe_gating_grouped_top_k", "init_routing_v2", "unpermute_tokens", "grouped_matmul")
)

Row = dict[str, Any]


def _row(part: str, what: str, dtype: str, found: Any, expected: Any) -> Row:
    off = float((found.float().cpu() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-30))
    return {"part": part, "what": what, "dtype": dtype, "relative_error": off, "ok": off < BOUND[dtype]}


def ops(device: Any) -> Iterator[Row]:
    """Gating, permutation and the way back; ids are compared exactly."""
    import torch

    TC = torch.ops.tensor_cast
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        logits, x = torch.randn(257, 64), torch.randn(257, 96).to(dtype)
        weights, index = TC.moe_gating_top_k_softmax(logits, 6)
        there = TC.moe_gating_top_k_softmax(logits.to(device), 6)
        yield _row("op", "moe_gating_top_k_softmax", "float32", there[0], weights)
        yield {**_row("op", "its ids", "float32", there[1], index), "ok": bool((there[1].cpu() == index).all())}
        rows = TC.init_routing_v2(x, index)
        yield _row("op", "init_routing_v2", name, TC.init_routing_v2(x.to(device), index.to(device)), rows)
        back = TC.unpermute_tokens(rows, index)
        yield _row("op", "unpermute_tokens", name, TC.unpermute_tokens(rows.to(device), index.to(device)), back)


def layers(device: Any) -> Iterator[Row]:
    """Two families' blocks on every backend."""
    import torch
    from moe_blocks import block_of

    from tensorcast.modeling.moe.backends import BACKENDS
    from tensorcast.modeling.moe.layer import MoELayer

    for family in ("deepseek_v3", "gpt_oss"):
        for dtype in (torch.float32, torch.bfloat16):
            block, x = block_of(family, dtype), torch.randn(1, 33, 64).to(dtype)
            with torch.inference_mode():
                expected = MoELayer(block, backend="eager")(x)
                moved = copy.deepcopy(block).to(device)
                for backend in BACKENDS:
                    found = MoELayer(moved, backend=backend)(x.to(device))
                    yield _row("layer", f"{family} {backend}", str(dtype).removeprefix("torch."), found, expected)


def quantised(device: Any) -> Iterator[Row]:
    """Experts held in every scheme; the CPU's result is that of the dequantised operands."""
    import torch
    from moe_blocks import block_of

    from tensorcast.modeling.moe.experts import FusedMoEBase
    from tensorcast.ops.quantized import FORMATS

    experts = block_of("mixtral", torch.bfloat16).experts
    counts = torch.tensor([5, 0, 9, 1, 3, 7, 0, 8])
    rows = torch.randn(int(counts.sum()), 64).to(torch.bfloat16)
    for scheme in FORMATS:
        held = FusedMoEBase(experts, range(8), scheme=scheme)
        with torch.inference_mode():
            expected = held(rows, counts)
            found = copy.deepcopy(held).to(device)(rows.to(device), counts.to(device))
        yield _row("quantised", scheme, "bfloat16", found, expected)


def predicted_s(model: Any, device: str, tokens: int) -> float:
    """What a step of as many sequences says of one MoE layer's routing and experts, bf16, on one GPU."""
    import tensorcast as tc

    run = tc.simulate(
        model, device=device, world_size=1, batch=tokens, context=1, quant="bf16", engine="eager", allow_oversize=True
    )
    rows = run.ops[run.ops["op"].isin(MOE_OPS)]
    return float((rows["seconds"] / rows["count"]).sum())


def times(
    models: Sequence[Any], device: Any, *, profile: str, out: Path, tokens: Sequence[int], effort: float
) -> Iterator[Row]:
    """Full-size layers; rows as they are timed."""
    from tensorcast.measure.environment import environment, fingerprint
    from tensorcast.measure.moe_layer import measure_moe_layer
    from tensorcast.measure.store import Store
    from tensorcast.profiles.store import load_model

    store, belongs = Store(out / "moe_gpu.jsonl"), fingerprint(environment(device.type))
    for name in models:
        foreseen = {count: predicted_s(name, profile, count) for count in tokens}
        for row in measure_moe_layer(load_model(name), device, store, belongs, tokens=tokens, effort=effort):
            seconds = row.get("seconds")
            yield {
                "part": "time", "what": f"{row['model']} {row['backend']}", "dtype": "bfloat16",
                "tokens": row["tokens"], "seconds": seconds, "predicted_s": foreseen[row["tokens"]],
                "ok": bool(seconds), "problem": row["problem"], "relative_error": row.get("relative_error"),
            }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. 0 where everything agrees with the CPU."""
    parser = command(__doc__, "reports/moe-gpu")
    parser.add_argument("--seconds", type=float, default=480.0, help="no part starts later than this")
    options = parser.parse_args(arguments)
    if (device := ready(options)) is None:
        return 2
    import pandas as pd

    from tensorcast.files import write_atomically
    from tensorcast.measure.environment import environment

    out, start = options.out, time.monotonic()
    models: Sequence[str] = LAYERS
    if options.tiny:
        write_atomically(out / "tiny" / "config.json", json.dumps(TINY))
        models = [str(out / "tiny")]
    tokens, effort = ((1, 16), 0.05) if options.tiny else (TOKENS, 0.5)
    write_atomically(out / "moe_gpu.json", json.dumps(environment(device.type), indent=1))
    rows: list[Row] = []
    timed = times(models, device, profile=options.device, out=out, tokens=tokens, effort=effort)
    for part in (ops(device), layers(device), quantised(device), timed):
        for row in part:
            rows.append(row)
            write_atomically(out / "moe_gpu.csv", pd.DataFrame(rows).to_csv(index=False))
            if time.monotonic() - start > options.seconds:
                print(f"stopped after {options.seconds:.0f} s; results so far in {out}", file=sys.stderr)
                return 1
    wrong = [f"{row['part']} {row['what']} {row['dtype']}" for row in rows if not row["ok"]]
    verdict = f"not as on the CPU, or not run: {', '.join(wrong)}" if wrong else "all as on the CPU"
    print(f"{len(rows)} rows in {out}; {verdict}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
