"""Images through a vision tower, on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tensorcast.deploy.encoder.encoder import EncodeStep
from tensorcast.report import units
from tensorcast.report.plain import to_json
from tensorcast.report.simulate.terminal import fit_path
from tensorcast.report.units import plural
from tensorcast.serving.encoder_apart import EncodedServing, EncoderSplit

MOST = 4
"""Numbers of encoders that are listed."""


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
            row["op"], fit_path(row["module"], max(16, console.width - 57)), f"{row['count']:g}",
            units.seconds(row["seconds"]), units.percent(row["seconds"] / t["step_s"]), row["evidence"],
        )
    if top:
        console.print(table)
    for note in t["notes"]:
        console.print(Text(f"note: {note}", style="dim"))


def print_encoder_splits(found: Sequence[EncoderSplit], console: Console) -> None:
    """A sentence and a table for every device, engine and size."""
    for one in found:
        console.print(Text(f"Encoders apart: {encoders_sentence(one)}", style="bold"))
        if not one.apart:
            continue
        table = Table(box=box.SIMPLE_HEAD)
        for name in ("apart", "language model", "GPUs", "TTFT", "TPOT", "req/s", "tok/s/GPU", "busy"):
            words = name == "language model"
            table.add_column(name, justify="left" if words else "right", no_wrap=not words)
        for way in (*one.apart[:MOST], *filter(None, [one.together])):
            table.add_row(*_way(way))
        console.print(table)
        console.print(Text(
            f"a request's images take one GPU {units.seconds(one.encode_s)}, their embeddings "
            f"{units.seconds(one.hand_over_s)} to the other GPUs; apart: GPUs that encode, busy: their time "
            "(docs/vision.md)", style="dim",
        ))  # fmt: skip


def encoders_sentence(one: EncoderSplit) -> str:
    """Whether encoders on GPUs of their own are worth it, with both numbers."""
    where = f"{one.gpus} {one.device} under {one.engine}"
    if not one.apart:
        return f"none of the numbers tried keeps the limits on {where}"
    best = one.apart[0]
    said = f"{units.rate(best.tokens_per_s_per_gpu)} tokens/s per GPU with {plural(best.encoder_gpus, 'encoder')}"
    if one.together is None:
        return f"{said} on {where}; together nothing keeps the limits"
    base = one.together.tokens_per_s_per_gpu
    ratio = best.tokens_per_s_per_gpu / base
    return f"{units.worth(ratio)}: {said} on {where}, {ratio:.2f} times {units.rate(base)} together"


def _way(way: EncodedServing) -> tuple[str, ...]:
    return (
        str(way.encoder_gpus) if way.encoder_gpus else "none", way.layout, str(way.gpus),
        units.seconds(way.ttft_s), units.seconds(way.tpot_s), f"{way.requests_per_s:.3g}",
        units.rate(way.tokens_per_s_per_gpu), "" if way.encoder_busy is None else units.percent(way.encoder_busy),
    )
