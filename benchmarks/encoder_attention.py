"""Attention of vision towers as aiconfigurator's tables have it, beside ours, for ``profiles/vision``.

``python benchmarks/encoder_attention.py FOLDER``: ``systems/data`` of aiconfigurator-core (0.12), whose
``encoder_attention_perf.parquet`` hold bidirectional attention of one call in milliseconds. Half of each table's rows
give a factor for a head width, the other half its error. A second argument is a file that keeps a few of those for the
tests.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tensorcast.deploy.deployment import Deployment, deploy
from tensorcast.deploy.layout import Layout
from tensorcast.errors import InputError
from tensorcast.profiles.store import load_device, load_engine, load_model
from tensorcast.trace.dims import Dim
from tensorcast.trace.table import Op

MODEL = "qwen3-vl-30b-a3b"
LEAST_TOKENS, LEAST_HEADS, LEAST_S = 256, 4, 30e-6
"""Of rows that tell of a kernel rather than of its launch."""
ROWS = 1400
"""Of a table, drawn at random."""


def seconds(tower: Deployment, heads: int, width: int, batch: float, tokens: float) -> float:
    """Of one call of attention by kernel models of causal prompts."""
    op = next(row for row in tower.step.plan.rows if isinstance(row, Op) and row.name == "attention")
    q = replace(op.inputs[0], dims=(Dim(B=1), Dim(heads), Dim(S=1), Dim(width)))
    out = replace(op.outputs[0], dims=(Dim(B=1), Dim(S=1), Dim(heads), Dim(width)))
    plan = replace(tower.step.plan, rows=(op.but(inputs=(q, q, q), outputs=(out,)),))
    return float(replace(tower.step, plan=plan, memo=None).price(batch, tokens, 0.0).rows[0].seconds)


def tables(folder: Path) -> Iterator[tuple[str, str, str, pd.DataFrame]]:
    """Device, engine, release and rows of each table, with ``predicted_s`` and ``half``."""
    model = load_model(MODEL)
    for path in sorted(folder.glob("*/encoder_attention/*/*/*.parquet")):
        engine, release = path.parts[-3:-1]
        try:
            device = load_device(path.parts[-5].replace("_", "-"))
        except InputError:
            continue
        tower = deploy(model, device, load_engine(engine), Layout(1), "encode")
        rows = pd.read_parquet(path)
        rows = rows[(rows["isl"] >= LEAST_TOKENS) & (rows["num_heads"] >= LEAST_HEADS)]
        rows = rows[rows["latency"] > 1e3 * LEAST_S]
        rows = rows.sample(min(ROWS, len(rows)), random_state=3)
        asked = zip(rows["num_heads"], rows["head_dim"], rows["batch_size"], rows["isl"], strict=True)
        rows["predicted_s"] = [seconds(tower, int(h), int(w), float(b), float(n)) for h, w, b, n in asked]
        rows["half"] = np.random.default_rng(0).random(len(rows)) < 0.5
        yield device.name, engine, release, rows


def main(folder: str, sample: str = "") -> None:
    import yaml

    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    kept = []
    for device, engine, release, rows in tables(Path(folder)):
        for width, group in rows.groupby("head_dim"):
            ratio = group["latency"] / 1e3 / group["predicted_s"]
            factor = float(np.exp(np.median(np.log(ratio[group["half"]]))))
            off = float(np.median(np.abs(factor / ratio[~group["half"]] - 1)))
            found.setdefault(device, {}).setdefault(engine, {})[int(str(width))] = [round(factor, 3), round(off, 3)]
            kept.append(group[~group["half"]].head(6).assign(on=device, engine=engine, release=release))
        print(device, engine, release, found[device][engine], flush=True)
    said: dict[str, Any] = {
        "source": "aiconfigurator-core 0.12, systems/data/*/encoder_attention (TensorRT-LLM 1.3.0rc20, vLLM 0.24.0, "
        "SGLang 0.5.14); by benchmarks/encoder_attention.py",
        "devices": found,
    }
    target = Path(__file__).parent.parent / "profiles" / "vision" / "encoder_attention.yaml"
    text = yaml.safe_dump(said, sort_keys=False, default_flow_style=None, width=120)
    head = "# By device, engine and head width: measured over predicted, and the error that is left."
    target.write_text(f"{head}\n{text}")
    if sample:
        columns = ["on", "engine", "release", "batch_size", "isl", "num_heads", "head_dim", "latency"]
        pd.concat(kept)[columns].rename(columns={"on": "device", "latency": "latency_ms"}).to_csv(sample, index=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
