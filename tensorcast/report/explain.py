"""Two layouts side by side on a terminal of 80 columns or more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tensorcast.report import units
from tensorcast.report.units import plural

if TYPE_CHECKING:
    from tensorcast.deploy.explain import Explanation, Side

WIDEST = 100


def print_explanation(why: Explanation, console: Console) -> None:
    """Print the verdict, the groups of ops, what fits, and what more of each resource would bring."""
    width = min(console.width, WIDEST)
    a = why.a.deployment
    console.print(
        Text(f"{a.model.name} {why.phase} on {a.layout.world_size} x {a.device.name}, {a.engine.name}", style="dim"),
        width=width,
    )
    console.print(Text(verdict(why), style="bold"), width=width)
    console.print(Text(reason(why)), width=width)
    for letter, side in (("A", why.a), ("B", why.b)):
        console.print(Text(f"{letter}  {_side(side)}"), width=width)
    console.print()
    console.print(_groups(why, width), width=width)
    console.print()
    console.print(_elasticities(why), width=width)
    for note in why.notes:
        console.print(Text(f"note: {note}"), width=width)


def verdict(why: Explanation) -> str:
    """Which layout's step is shorter, and by how much."""
    fast, slow = (why.a, why.b) if why.faster >= 1 else (why.b, why.a)
    ratio = slow.step_s / fast.step_s
    times = f"{units.seconds(why.a.step_s)} against {units.seconds(why.b.step_s)}"
    if ratio < 1.01:
        return f"{why.a.name} and {why.b.name} take the same: {times}"
    return f"{fast.name} is {ratio:.2f} x as fast as {slow.name} at the same load: {times} (A against B)"


def reason(why: Explanation) -> str:
    """The groups that decide: what the faster one saves most in, and what it pays for that."""
    sign = 1.0 if why.faster >= 1 else -1.0
    moved = sorted(((sign * row["saved_s"], row["group"]) for row in why.groups.to_dict("records")), reverse=True)
    saves = [f"{units.seconds(s)} in {name}" for s, name in moved[:2] if s > 0]
    pays = [f"{units.seconds(-s)} in {name}" for s, name in moved[:-3:-1] if s < 0]
    text = f"It saves {' and '.join(saves)}" if saves else "It saves nothing"
    return f"{text}, and pays {' and '.join(pays)}." if pays else f"{text}."


def _side(side: Side) -> str:
    price = side.price
    exposed, hidden = float(price.exposed_comm_s), float(price.hidden_comm_s)
    return (
        f"{side.name}: {plural(round(side.batch), 'sequence')} per dp rank of {units.count(side.largest_batch)} that "
        f"fit ({units.count(side.most_sequences)} in all); communication {units.seconds(exposed)} exposed, "
        f"{units.seconds(hidden)} hidden"
    )


def _groups(why: Explanation, width: int) -> Table:
    """Milliseconds and traffic (memory and wire) per GPU; FLOPs where there is room."""
    wide = width >= WIDEST
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0, header_style="bold",
        title=Text("Where the step goes: ms, bytes moved and FLOPs of one GPU", style="bold"), title_justify="left",
        title_style="",
    )
    heads = ["group", "A", "B", "B - A", "bytes A", "bytes B", *(["FLOPs A", "FLOPs B"] if wide else []), "why"]
    for head in heads:
        words = head in ("group", "why")  # wrap where room is short; numbers and their heads never do
        table.add_column(head, justify="left" if words else "right", no_wrap=not words)
    for row in why.groups.to_dict("records"):
        sizes = [units.short(row[f"bytes_{s}"] + row[f"wire_bytes_{s}"]) for s in "ab"]
        sizes += [units.short(row[f"flops_{s}"]) for s in "ab"] if wide else []
        table.add_row(
            row["group"], *(_ms(row[f"seconds_{s}"]) for s in "ab"), _ms(row["saved_s"], True), *sizes,
            row["why"],
        )
    totals = (_ms(why.a.step_s), _ms(why.b.step_s), _ms(why.b.step_s - why.a.step_s, True))
    table.add_row(Text("step", style="bold"), *(Text(total, style="bold") for total in totals))
    return table


def _ms(seconds: float, plus: bool = False) -> str:
    """Milliseconds to a hundredth."""
    return "-" if seconds == 0 else f"{1e3 * seconds:+.2f}" if plus else f"{1e3 * seconds:.2f}"


def _elasticities(why: Explanation) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold",
        title=Text("Gain in tokens/s from 10 % more (of latency: less)", style="bold"), title_justify="left",
        title_style="",
    )
    for head in ("resource", "A", "B"):
        table.add_column(head, justify="left" if head == "resource" else "right", no_wrap=True)
    for row in why.elasticities.to_dict("records"):
        note = " (at the best batch)" if row["resource"] == "memory size" else ""
        table.add_row(f"{row['resource']}{note}", *(f"{100 * row[f'gain_{s}']:+.1f} %" for s in "ab"))
    return table


def explanation_record(why: Explanation) -> dict[str, Any]:
    """The explanation for ``--json``."""
    sides = {
        letter: {
            "layout": side.name, "batch_per_dp_rank": side.batch, "step_s": side.step_s,
            "largest_batch_per_dp_rank": side.largest_batch, "sequences_that_fit": side.most_sequences,
            "exposed_comm_s": side.price.exposed_comm_s, "hidden_comm_s": side.price.hidden_comm_s,
        }
        for letter, side in (("a", why.a), ("b", why.b))
    }
    return {
        **sides, "phase": why.phase, "input_len": why.new, "context": why.past, "verdict": verdict(why),
        "reason": reason(why), "groups": why.groups.to_dict("records"),
        "elasticities": why.elasticities.to_dict("records"), "notes": list(why.notes),
    }
