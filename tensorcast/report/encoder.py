"""Images through a vision tower, on a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tensorcast.deploy.encoder.encoder import EncodeStep
from tensorcast.report import units
from tensorcast.report.plain import to_json
from tensorcast.report.units import plural


def print_encode(step: EncodeStep, console: Console, top: int, as_json: bool = False) -> None:
    """Print a step: its time, what images are to the model, memory, and its ``top`` costliest rows."""
    t = step.totals()
    if as_json:
        console.out(to_json({**t, "ops": step.rows()}, indent=2), highlight=False)
        return
    console.print(Text(
        f"{t['model']}, vision tower on {t['world_size']} {t['device']}: {plural(t['images'], 'image')} in "
        f"{units.seconds(t['step_s'])}, {units.rate(t['images_per_s_per_gpu'])} images/s per GPU", style="bold",
    ))  # fmt: skip
    views = " and ".join(f"{one['pictures']} of {one['patches']} patches" for one in t["views"])
    console.print(Text(
        f"an image is {views}: {t['tokens_per_image']} tokens of the prompt, {t['embeddings_per_image']} of them "
        f"embeddings; 80 % of the time {units.seconds(t['step_low_s'])} to {units.seconds(t['step_high_s'])}"
    ))  # fmt: skip
    memory = t["memory_bytes"]
    whole = "whole on every GPU" if t["encoder_tp_mode"] == "data" or t["world_size"] == 1 else "cut over the GPUs"
    console.print(Text(
        f"{units.count(t['parameters'])} parameters, {whole}: {units.nbytes(memory['weights'])} of weights and "
        f"{units.nbytes(memory['activations'])} of activations; {units.nbytes(t['embedding_bytes_per_image'])} of "
        f"embeddings an image; engine {units.seconds(t['overhead_s'])} a step", style="dim",
    ))  # fmt: skip
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("op", "module", "calls", "time", "share", "evidence"):
        table.add_column(name, justify="left" if name in ("op", "module", "evidence") else "right")
    for row in step.rows()[:top]:
        table.add_row(
            row["op"], row["module"][-40:], f"{row['count']:g}", units.seconds(row["seconds"]),
            units.percent(row["seconds"] / t["step_s"]), row["evidence"],
        )
    if top:
        console.print(table)
    for note in t["notes"]:
        console.print(Text(f"note: {note}", style="dim"))
