"""Attention and FFN on GPUs of their own, on a terminal: one step, and decode servers beside the best that is whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tensorcast.report import units
from tensorcast.report.plain import to_json
from tensorcast.serving.ffn_splits import DecodeServer, Split

MOST = 3
"""Splits that are listed."""


def print_apart(totals: dict[str, Any], console: Console, as_json: bool = False) -> None:
    """Print ``totals`` of :meth:`tensorcast.deploy.ffn_apart.ApartPrice.totals`: the step, then either side."""
    t = totals
    if as_json:
        console.out(to_json(t, indent=2), highlight=False)
        return
    console.print(Text(
        f"{t['model']} on {t['world_size']} GPUs, attention and FFN apart: decode step {units.seconds(t['step_s'])}, "
        f"{units.rate(t['tokens_per_s_per_gpu'])} tokens/s per GPU", style="bold",
    ))  # fmt: skip
    console.print(Text(
        f"{t['batch_per_dp_rank']:g} sequences per data-parallel rank of {t['context']} cached tokens, as "
        f"{t['micro_batches']} micro-batches; 80 % of the time {units.seconds(t['step_low_s'])} to "
        f"{units.seconds(t['step_high_s'])} by the kernels"
    ))
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("side", "GPUs", "computes", "busy", "weights", "cache", "of"):
        table.add_column(name, justify="left" if name == "side" else "right")
    sides = (
        ("attention", f"{t['attention_gpus']} {t['device']}", t["attention_s"], t["attention_busy"]),
        ("ffn", f"{t['ffn_gpus']} {t['ffn_device']}", t["ffn_s"], t["ffn_busy"]),
    )
    for name, gpus, seconds, busy in sides:
        memory = t["memory_bytes"][name]
        table.add_row(
            f"attention, tp{t['tp']}-dp{t['dp']}" if name == "attention" else f"FFN, ep{t['ffn_gpus']}", gpus,
            units.seconds(seconds), units.percent(busy), units.nbytes(memory["weights"]),
            units.nbytes(memory["kv_cache"]), units.nbytes(memory["budget"]),
        )
    console.print(table)
    console.print(Text(
        f"a micro-batch's hidden states take {units.seconds(t['hand_over_s'])} each way, every layer; at most "
        f"{t['largest_batch_per_dp_rank']} sequences fit", style="dim",
    ))  # fmt: skip
    for note in t["notes"]:
        console.print(Text(f"note: {note}", style="dim"))


def print_splits(found: Sequence[Split], console: Console, tpot_s: float | None) -> None:
    """A sentence and a table for every device, engine and size."""
    limit = f" within {units.seconds(tpot_s)} a step" if tpot_s is not None else ""
    for one in found:
        console.print(Text(f"Attention and FFN apart: {sentence(one)}", style="bold"))
        if not one.apart:
            continue
        table = Table(box=box.SIMPLE_HEAD)
        for name in ("decode server", "batch", "step", "tok/s/GPU", "attn.", "FFN", "exchange"):
            words = name in ("decode server", "exchange")
            table.add_column(name, justify="left" if words else "right", no_wrap=True)
        for server in (*one.apart[:MOST], *filter(None, [one.whole])):
            table.add_row(*_cells(server))
        console.print(table)
    console.print(Text(
        f"steps of decode servers alone{limit}, {len(found[0].apart)} splits; attn., FFN: busy; how the sides "
        "overlap is modelled, not measured (docs/ffn-apart.md)", style="dim",
    ))  # fmt: skip


def sentence(one: Split) -> str:
    """Whether it is worth it, with both numbers."""
    where = f"{one.device} under {one.engine}"
    if not one.apart:
        return f"no split of {one.gpus} {where} keeps the limit and fits"
    best = one.apart[0]
    said = f"{units.rate(best.tokens_per_s_per_gpu)} tokens/s per GPU at best ({best.layout}) on {where}"
    if one.whole is None:
        return f"{said}; no whole decode server keeps the limit"
    base = one.whole.tokens_per_s_per_gpu
    ratio = best.tokens_per_s_per_gpu / base
    return f"{units.worth(ratio)}: {said}, {ratio:.2f} times the best whole server's {units.rate(base)}"


def _cells(server: DecodeServer) -> tuple[str, ...]:
    busy = ("", "") if server.busy is None else tuple(f"{share:.0%}" for share in server.busy)
    exchange = server.exchange.replace("allgather_reducescatter", "gather").replace("_", " ")
    return (
        server.layout if server.busy else f"whole: {server.layout}", f"{server.batch:g}", units.seconds(server.step_s),
        units.rate(server.tokens_per_s_per_gpu), *busy, exchange,
    )
