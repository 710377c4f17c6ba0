"""Rows of the layer and step level: measured end to end beside the sum of the ops, and the comparison's errors."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tensorcast.deploy.workload import Workload
from tensorcast.measure.store import Store, key_of
from tensorcast.profiles.model import ModelProfile
from tensorcast.trace.table import OpTable

if TYPE_CHECKING:
    import torch

Say = Callable[[str], None]

ROOM = 0.7
"""Share of the free memory that a model may fill: its activations need some too."""


def _parameters(table: OpTable, layers: int) -> float:
    """Parameters of the first ``layers`` layers and of what lies outside them."""
    kinds = table.layer_kinds[:layers]
    return float(sum(p.numel * (kinds.count(p.kind) if p.kind >= 0 else 1) for p in table.params))


def _model(model: ModelProfile, table: OpTable, dtype: str, device: torch.device, problem: list[str]) -> Any:
    """(stock model, config), or None and a note where it does not fit or cannot be built."""
    import torch

    from tensorcast.measure.layers import stock_model
    from tensorcast.measure.operands import Unsupported, free_bytes
    from tensorcast.modeling.config import hf_config

    config = hf_config(model)
    kind = getattr(torch, dtype)
    need, free = _parameters(table, config.num_hidden_layers) * kind.itemsize, free_bytes(device)
    if need > ROOM * free:
        problem.append(
            f"Layers were not run end to end in {dtype}: {config.num_hidden_layers} of them and the embedding need "
            f"{need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free."
        )
        return None
    try:
        torch.manual_seed(0)
        return stock_model(config, kind, device), config
    except Unsupported as reason:
        problem.append(f"Layers were not run end to end: {reason}.")
        return None


def check_rows(
    model: ModelProfile, table: OpTable, device: torch.device, store: Store, *, belongs: str, problem: list[str],
    say: Say,
) -> list[dict[str, Any]]:
    """The rewritten layers against transformers' eager ones in float32, where that fits."""
    from tensorcast.measure.layers import check_layers

    key = key_of("check", model.config, belongs)
    if key not in store.rows:
        say("comparing the rewritten layers with transformers' eager ones")
        built = _model(model, table, "float32", device, problem)
        if built is None:
            return []
        try:
            found = check_layers(built[0], built[1], table.layer_kinds, table.kind_names)
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as reason:
            line = (str(reason).strip() or type(reason).__name__).splitlines()[0][:160]
            problem.append(f"The rewritten layers were not compared with transformers': {line}.")
            return []
        finally:
            del built
            gc.collect()
        store.add(key, rows=[
            {"layers": c.kind, "layer": c.layer, "dtype": c.dtype, "relative_error": c.relative_error} for c in found
        ])
    return list(store.rows[key]["rows"])


def layer_rows(
    model: ModelProfile, table: OpTable, workloads: Sequence[Workload], device: torch.device, store: Store,
    *, belongs: str, ops: list[dict[str, Any]], effort: float, problem: list[str], say: Say,
) -> list[dict[str, Any]]:
    """One row per layer kind and workload, and one per workload for the whole step of the layers that were built."""
    keys = {w: key_of("layers", model.config, w, belongs) for w in workloads}
    if any(key not in store.rows for key in keys.values()):
        from tensorcast.measure.layers import rewrite, time_layers

        built = _model(model, table, "bfloat16", device, problem)
        if built is None:
            return []
        rewrite(built[0])
        for w, key in keys.items():
            if key in store.rows:
                continue
            say(f"{w.phase} batch {w.batch}: layers and step end to end")
            kinds = table.layer_kinds[: built[1].num_hidden_layers]
            rows = []
            for found in time_layers(built[0], built[1], w, kinds, effort):
                timing = found.timing
                rows.append({
                    "kind": found.kind, "problem": found.problem,
                    **({} if timing is None else {
                        "seconds": timing.seconds, "low_s": timing.low_s, "median_s": timing.median_s,
                        "high_s": timing.high_s, "calls": timing.calls, "method": timing.method,
                    }),
                })
            store.add(key, rows=rows, layers=built[1].num_hidden_layers)
        del built
        gc.collect()
    return [
        _row(w, table, found, store.rows[key]["layers"], ops)
        for w, key in keys.items() for found in store.rows[key]["rows"]
    ]


def _row(
    workload: Workload, table: OpTable, found: dict[str, Any], layers: int, ops: list[dict[str, Any]]
) -> dict[str, Any]:
    kind = found["kind"]
    name = f"layers {table.kind_names[kind]}" if kind >= 0 else f"step of {layers} layer{'s' * (layers > 1)}"
    wanted = [kind] if kind >= 0 else [-1, *table.layer_kinds[:layers]]
    size = (workload.phase, workload.batch, workload.input_len, workload.context)
    mine = [row for row in ops if (row["phase"], row["batch"], row["new"], row["past"]) == size]
    sums, missing = {"seconds": 0.0, "predicted_s": 0.0}, 0
    for row in mine:
        counts = {int(k): int(n) for k, _, n in (part.partition(":") for part in row["by_kind"].split(";"))}
        times = sum(counts.get(k, 0) for k in wanted)
        missing += times if not row["seconds"] else 0
        for column in sums:
            sums[column] += times * float(row[column] or 0.0)
    seconds = found.get("seconds")
    return {
        "what": name, "phase": size[0], "batch": size[1], "new": size[2], "past": size[3],
        **{n: found.get(n) for n in ("seconds", "low_s", "median_s", "high_s", "calls", "method")},
        "ops_s": sums["seconds"], "predicted_s": sums["predicted_s"], "ops_missing": missing,
        "gap_s": None if seconds is None else seconds - sums["seconds"],
        "error": None if seconds is None else sums["predicted_s"] / seconds - 1.0, "problem": found["problem"],
    }
