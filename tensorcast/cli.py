"""The command line: arguments in, one call, report out. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from tensorcast.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

PATIENCE_S = 1.0
"""Seconds after which a terminal is told that work is going on."""

EXAMPLES = """[bold]Examples[/bold]

tensorcast models

tensorcast simulate mixtral-8x7b --device h100 --world-size 2 --batch 32

tensorcast simulate deepseek-v3 -d h200 -n 32 --dp 32 --ep 32 --batch 128

tensorcast simulate --help"""

SIMULATE_EXAMPLES = """[bold]Examples[/bold]

[dim]DeepSeek-V3 decoding on 32 GPUs: attention data-parallel, 8 experts per GPU[/dim]

tensorcast simulate deepseek-v3 -d h200 -n 32 --dp 32 --ep 32 --batch 128

[dim]A prompt of 4096 tokens on one node, everything tensor-parallel but the experts[/dim]

tensorcast simulate qwen3-235b-a22b -d h100 -n 8 --ep 8 --phase prefill

[dim]Some experts busier than others; tables, CSV and a trace for Perfetto in out/[/dim]

tensorcast simulate gpt-oss-120b -d h100 -n 2 --routing zipf:0.8 --out out

[dim]Your own model directory, as JSON for scripts[/dim]

tensorcast simulate ./my-model -d b200 --json | jq .step_s"""


class _Commands(TyperGroup):
    """Bad input: one line on stderr, exit code 2. Ctrl-C: one line, 130. Anything else is a bug: a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXAMPLES,
)


def main() -> None:
    """Entry point of the console script."""
    # A terminal that cannot show a character gets a ? instead of a traceback.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        app(prog_name="tensorcast")
    except BrokenPipeError:
        _reader_left()
    except SystemExit as leaving:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            _reader_left()
        raise leaving from None


def _reader_left() -> None:
    """Whoever read our output (``| head``) has seen enough: leave without a word, also while Python shuts down."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(1) from None


def _version(asked: bool) -> None:
    if asked:
        from tensorcast import __version__

        typer.echo(f"tensorcast {__version__}")
        raise typer.Exit


@app.callback()
def _tensorcast(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """What a Mixture-of-Experts model will cost on a cluster, before you rent it."""


_DEPLOYMENT, _WORK, _CHOICES, _OUTPUT = "Deployment", "One step", "Engine and numerics", "Output"


@app.command(epilog=SIMULATE_EXAMPLES)
def simulate(
    model: Annotated[str, typer.Argument(
        help="Name (see [bold]tensorcast models[/bold]), profile file, or directory with a Hugging Face config.json.",
        show_default=False,
    )],
    device: Annotated[str, typer.Option(
        "--device", "-d", help="Name (see [bold]tensorcast devices[/bold]) or profile file; cpu is this machine.",
        show_default=False, rich_help_panel=_DEPLOYMENT,
    )],
    world_size: Annotated[int, typer.Option(
        "--world-size", "-n", help="GPUs in all: tp*dp*pp.", rich_help_panel=_DEPLOYMENT,
    )] = 1,
    tp: Annotated[int | None, typer.Option(
        "--tp", help="Tensor-parallel GPUs.  [dim]\\[default: what dp and pp leave][/dim]", show_default=False,
        rich_help_panel=_DEPLOYMENT,
    )] = None,
    dp: Annotated[int, typer.Option(
        "--dp", help="Data-parallel replicas of attention.", rich_help_panel=_DEPLOYMENT,
    )] = 1,
    ep: Annotated[int, typer.Option(
        "--ep", rich_help_panel=_DEPLOYMENT,
        help="Expert-parallel groups, a divisor of tp*dp: whole experts are dealt out to them. At 1 every expert is "
        "cut over tp*dp GPUs.",
    )] = 1,
    pp: Annotated[int, typer.Option("--pp", help="Pipeline stages.", rich_help_panel=_DEPLOYMENT)] = 1,
    phase: Annotated[str, typer.Option(
        "--phase", metavar="prefill|decode", help="Read prompts, or make one token per sequence.",
        rich_help_panel=_WORK,
    )] = "decode",
    batch: Annotated[int, typer.Option(
        "--batch", "-b", help="Sequences [bold]per data-parallel rank[/bold]: dp times as many in all.",
        rich_help_panel=_WORK,
    )] = 1,
    context: Annotated[int | None, typer.Option(
        "--context", "-c", help="Cached tokens per sequence.  [dim]\\[default: 4096 in decode, 0 in prefill][/dim]",
        show_default=False, rich_help_panel=_WORK,
    )] = None,
    input_len: Annotated[int | None, typer.Option(
        "--input-len", "-i", help="New tokens per sequence.  [dim]\\[default: 4096 in prefill; 1 in decode][/dim]",
        show_default=False, rich_help_panel=_WORK,
    )] = None,
    engine: Annotated[str, typer.Option(
        "--engine", "-e", metavar="NAME",
        help="vllm, sglang, trtllm, eager (see [bold]tensorcast engines[/bold]) or a profile file.",
        rich_help_panel=_CHOICES,
    )] = "vllm",
    quant: Annotated[str | None, typer.Option(
        "--quant", metavar="SCHEME",
        help="Weights: bf16, fp8, fp8_block, int8, w4a16, mxfp4 or nvfp4, or apart as linear=bf16,experts=mxfp4.  "
        "[dim]\\[default: as the model ships][/dim]",
        show_default=False, rich_help_panel=_CHOICES,
    )] = None,
    kv_dtype: Annotated[str | None, typer.Option(
        "--kv-dtype", metavar="bf16|fp8", help="KV cache.  [dim]\\[default: the model's][/dim]", show_default=False,
        rich_help_panel=_CHOICES,
    )] = None,
    routing: Annotated[str, typer.Option(
        "--routing", metavar="LAW", rich_help_panel=_CHOICES,
        help="How tokens fall on experts: balanced, uniform, zipf:S, or a CSV of counts per expert.",
    )] = "balanced",
    fusion: Annotated[str, typer.Option(
        "--fusion", metavar="engine|none", help="Fuse kernels as the engine does, or not at all.",
        rich_help_panel=_CHOICES,
    )] = "engine",
    all2all: Annotated[str, typer.Option(
        "--all2all", metavar="KIND",
        help="How tokens reach their experts at dp > 1: allgather_reducescatter, high_throughput, low_latency, direct, "
        "or auto, the engine's.",
        rich_help_panel=_CHOICES,
    )] = "auto",
    dispatch: Annotated[str | None, typer.Option(
        "--dispatch", metavar="SCHEME",
        help="What tokens are sent in, such as bf16 or fp8_block.  [dim]\\[default: as the experts read them][/dim]",
        show_default=False, rich_help_panel=_CHOICES,
    )] = None,
    redundant_experts: Annotated[int, typer.Option(
        "--redundant-experts", min=0, rich_help_panel=_CHOICES,
        help="Copies of experts in each MoE layer, over all expert-parallel groups.",
    )] = 0,
    placement: Annotated[str, typer.Option(
        "--placement", metavar="POLICY", rich_help_panel=_CHOICES,
        help="Which group holds which experts: linear, round_robin, or eplb, balanced for --routing.",
    )] = "linear",
    allow_oversize: Annotated[bool, typer.Option(
        "--allow-oversize", help="Price a batch that does not fit into memory.", rich_help_panel=_CHOICES,
    )] = False,
    top: Annotated[int, typer.Option(
        "--top", min=0, help="Costliest ops to list.", rich_help_panel=_OUTPUT,
    )] = 20,
    out: Annotated[Path | None, typer.Option(
        "--out", "-o", metavar="DIR", show_default=False, rich_help_panel=_OUTPUT,
        help="Also write report.md, ops.csv, summary.json and trace.json (for Perfetto) there.",
    )] = None,
    as_json: Annotated[bool, typer.Option(
        "--json", help="Print JSON alone: totals and all ops, units in the names.", rich_help_panel=_OUTPUT,
    )] = False,
) -> None:
    """Simulate one step of MODEL: its time, its memory, and the ops that cost it."""
    from tensorcast.api import simulate as run_simulation
    from tensorcast.report.files import check_directory, write_report

    if out is not None:
        check_directory(out)  # before minutes of work, not after
    with _patience(model):
        run = run_simulation(
            model, device=device, world_size=world_size, tp=tp, dp=dp, ep=ep, pp=pp, phase=phase, batch=batch,
            input_len=input_len, context=context, engine=engine, quant=quant, kv_dtype=kv_dtype, routing=routing,
            fusion=fusion, all2all=all2all, dispatch=dispatch, redundant_experts=redundant_experts,
            placement=placement, allow_oversize=allow_oversize,
        )
        written = write_report(run, out, top) if out is not None else []
    if as_json:
        from tensorcast.report.rows import records, to_json

        typer.echo(to_json({**run.totals(), "ops": records(run)}, indent=2))
        return
    from tensorcast.report.terminal import print_simulation

    print_simulation(run, _console(), top)
    if written:
        names = [path.name for path in written]
        typer.echo(f"wrote {', '.join(names[:-1])} and {names[-1]} to {out}")


_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON alone, units in the names.")]


@app.command()
def models(as_json: _AsJson = False) -> None:
    """Models that are there, with sizes and source."""
    from tensorcast.profiles import list_models, load_model
    from tensorcast.report import catalog

    _catalog(list_models(), lambda name: catalog.model_record(load_model(name)), catalog.print_models, as_json)


@app.command()
def devices(as_json: _AsJson = False) -> None:
    """Devices that are there: memory, peaks, interconnect, and how well each is known."""
    from tensorcast.profiles import list_devices, load_device
    from tensorcast.report import catalog

    _catalog(list_devices(), lambda name: catalog.device_record(load_device(name)), catalog.print_devices, as_json)


@app.command()
def engines(as_json: _AsJson = False) -> None:
    """Serving engines that are there: what they fuse, capture and cost."""
    from tensorcast.profiles import list_engines, load_engine
    from tensorcast.report import catalog

    _catalog(list_engines(), lambda name: catalog.engine_record(load_engine(name)), catalog.print_engines, as_json)


def _catalog(
    names: tuple[str, ...], read: Callable[[str], dict[str, Any]],
    show: Callable[[list[dict[str, Any]], Console], None], as_json: bool,
) -> None:
    """List every profile that can be read; one that cannot does not hide the others."""
    found, broken = [], []
    for name in names:
        try:
            found.append(read(name))
        except InputError as error:
            broken.append(str(error))
    if as_json:
        from tensorcast.report.rows import to_json

        typer.echo(to_json(found, indent=2))
    else:
        show(found, _console())
    if broken:
        raise InputError("; ".join(broken))


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


@contextlib.contextmanager
def _patience(model: str) -> Iterator[None]:
    """On a terminal, say what takes so long once it has taken :data:`PATIENCE_S`; elsewhere be silent."""
    if not sys.stderr.isatty():
        yield
        return
    import threading

    done = threading.Event()

    def report() -> None:
        if done.wait(PATIENCE_S):
            return
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(*columns, console=_console(stderr=True), transient=True) as progress:
            task = progress.add_task("")
            while not done.wait(0.1):
                progress.update(task, description=_doing(model))

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _doing(model: str) -> str:
    """What is under way, by what has been loaded for it."""
    if "tensorcast.trace.tracer" in sys.modules:
        return f"tracing {model}, once: later runs read it from the cache"
    if "tensorcast.validate.host" in sys.modules:
        return "measuring this machine, once"
    return f"simulating {model}"
