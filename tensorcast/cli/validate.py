"""`tensorcast validate`: run a model's kernels on the machine at hand and put measured beside predicted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from tensorcast.cli.app import CHOICES, DEPLOYMENT, OUTPUT, WORK, AsJson, command, console
from tensorcast.cli.options import Model
from tensorcast.cli.values import whole_numbers
from tensorcast.errors import InputError

EXAMPLES = """[bold]Examples[/bold]

[dim]This machine, one layer: minutes[/dim]

tensorcast validate qwen3-30b-a3b -d cpu --layers 1 --out out/cpu

[dim]One rank's shard of a large model on a GPU[/dim]

tensorcast validate deepseek-v3 -d h200 --tp 8 --ep 8 --phase decode --batch 128 --context 4096 --out out/v3

[dim]Collectives and expert parallelism for real, on 8 GPUs[/dim]

torchrun --nproc-per-node 8 -m tensorcast validate qwen3-30b-a3b -d h200 --ep 8 --out out/ep8

[dim]Then fold what was measured back into the device profile[/dim]

tensorcast calibrate -d cpu --from out/cpu/measurements.parquet --write cpu.yaml"""


@command(epilog=EXAMPLES)
def validate(
    model: Model,
    *,
    device: Annotated[str, typer.Option(
        "--device", "-d", help="Profile to compare with; cpu is this machine, any other runs on its CUDA device.",
        rich_help_panel=DEPLOYMENT,
    )] = "cpu",
    tp: Annotated[int, typer.Option("--tp", min=1, help="Measure one of this many tensor-parallel shards.",
                                    rich_help_panel=DEPLOYMENT)] = 1,
    ep: Annotated[int, typer.Option("--ep", min=1, help="Measure the experts of one of this many ranks.",
                                    rich_help_panel=DEPLOYMENT)] = 1,
    layers: Annotated[int, typer.Option(
        "--layers", min=0, help="Keep the model's first layers only; 0: ops of all, one layer per kind end to end.",
        rich_help_panel=WORK,
    )] = 0,
    phase: Annotated[str | None, typer.Option(
        "--phase", metavar="prefill|decode", show_default=False, rich_help_panel=WORK,
        help="[dim]\\[default: both][/dim]",
    )] = None,
    batch: Annotated[str | None, typer.Option(
        "--batch", "-b", metavar="N,N,..", show_default=False, rich_help_panel=WORK,
        help="Sequences per data-parallel rank.  [dim]\\[default: a range][/dim]",
    )] = None,
    context: Annotated[int | None, typer.Option(
        "--context", "-c", min=0, show_default=False, rich_help_panel=WORK,
        help="Cached tokens per sequence.  [dim]\\[default: 512 on a CPU, 4096 on a GPU; prefill 0][/dim]",
    )] = None,
    input_len: Annotated[str | None, typer.Option(
        "--input-len", "-i", metavar="N,N,..", show_default=False, rich_help_panel=WORK,
        help="New tokens per sequence in prefill.  [dim]\\[default: a range][/dim]",
    )] = None,
    engine: Annotated[str, typer.Option(
        "--engine", "-e", metavar="NAME", rich_help_panel=CHOICES,
        help="Whose ops: eager runs them one by one; an engine's fused runs have no kernel of their own here.",
    )] = "eager",
    quant: Annotated[str | None, typer.Option(
        "--quant", metavar="SCHEME", show_default=False, rich_help_panel=CHOICES,
        help="Weights, as for simulate.  [dim]\\[default: as the model ships][/dim]",
    )] = None,
    shrink: Annotated[bool, typer.Option(
        "--shrink", help="Run ops that do not fit into memory at the largest size that does.", rich_help_panel=CHOICES,
    )] = False,
    effort: Annotated[float, typer.Option(
        "--effort", min=0.05, max=4.0, help="Scales repeats: less is faster and noisier.", rich_help_panel=CHOICES,
    )] = 1.0,
    end_to_end: Annotated[bool, typer.Option(
        "--end-to-end/--ops-only", help="Also run layers and the step, and compare them with transformers'.",
        rich_help_panel=CHOICES,
    )] = True,
    out: Annotated[Path | None, typer.Option(
        "--out", "-o", metavar="DIR", show_default=False, rich_help_panel=OUTPUT,
        help="Also write report.md, report.html, accuracy.png, the measurements and the profile fitted to them. A run "
        "that was interrupted goes on from what it kept there.",
    )] = None,
    as_json: AsJson = False,
) -> None:
    """Run MODEL's kernels on this machine and compare them with what is predicted."""
    from tensorcast.api import device_profile
    from tensorcast.calibrate.constants.from_validation import write_profile
    from tensorcast.deploy.model_names import named_model
    from tensorcast.files import check_directory
    from tensorcast.measure.store import write_table
    from tensorcast.profiles.store import load_engine
    from tensorcast.report.plain import to_json
    from tensorcast.report.validate import headline, write_validation
    from tensorcast.validate.run import Request, summary
    from tensorcast.validate.run import validate as run

    if phase not in (None, "prefill", "decode"):
        raise InputError(f"--phase {phase!r}: must be prefill or decode")
    if out is not None:
        check_directory(out)
    sizes = lambda flag, text: tuple(whole_numbers(flag, text, least=1)) if text is not None else ()  # noqa: E731
    say = _progress()
    profile, read_as = named_model(model)
    request = Request(
        profile, device_profile(device), load_engine(engine), tp=tp, dp=max(1, ep // tp), ep=ep, phase=phase,
        batch=sizes("--batch", batch), input_len=sizes("--input-len", input_len), context=context, layers=layers,
        quant=quant, shrink=shrink, effort=effort, end_to_end=end_to_end, out=out, say=say,
    )
    result = run(request)
    say("")
    if result is None:  # another rank of torchrun tells
        return
    if read_as:
        result = replace(result, notes=(*result.notes, f"{read_as}."))
    written = []
    if out is not None:
        written = [*write_validation(result, out), *write_table(result.measurements(), out)]
        if result.calibrated is not None:
            written.append(out / "calibrated.yaml")
            write_profile(written[-1], result.calibrated, None)
    if as_json:
        told = {**summary(result), "notes": list(result.notes), "environment": result.environment}
        typer.echo(to_json(told, indent=2))
        return
    first, *rest = headline(result)
    typer.echo("\n".join([f"{result.title}: {first}", *rest]))
    for note in result.notes:
        typer.echo(note)
    if written:
        typer.echo(f"wrote {', '.join(path.name for path in written)} to {out}")


def _progress() -> Any:
    """Says on a terminal what is being measured, on one line; elsewhere nothing."""
    import sys

    if not sys.stderr.isatty():
        return lambda text: None
    screen = console(stderr=True)

    def say(text: str) -> None:
        screen.print(text[: max(20, screen.width - 1)].ljust(screen.width - 1), end="\r", style="dim", markup=False)

    return say
