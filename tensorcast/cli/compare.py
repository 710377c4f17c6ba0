"""``tensorcast compare``: which layout, for a load and its limits."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorcast.cli.app import CHOICES, DEPLOYMENT, OUTPUT, AsJson, app, console, patience
from tensorcast.cli.options import Engine, Model
from tensorcast.errors import InputError

if TYPE_CHECKING:
    from tensorcast.deploy.compare import Comparison

LOAD, SEARCH = "Load and limits", "What is searched"

EXAMPLES = """[bold]Examples[/bold]

[dim]Which layout, when users wait 2 s for a first token and 50 ms for each of the others?[/dim]

tensorcast compare deepseek-v3 -d h200 -n 32 -i 4096 -o 1024 --ttft 2s --tpot 50ms

[dim]Three devices, three sizes; a report with figures in reports/qwen3-235b[/dim]

tensorcast compare qwen3-235b-a22b -d h100,h200,b200 -n 8,16,32 --out reports/qwen3-235b

[dim]Just these layouts, of a YAML list such as \\[tp8, tp8-ep8, dp8-ep8][/dim]

tensorcast compare gpt-oss-120b -d h200 -n 8 --layouts layouts.yaml

[dim]Fewest GPUs for 20 requests per second; cheapest tokens at your prices[/dim]

tensorcast compare qwen3-30b-a3b -d h100 -n 16 --objective gpus --request-rate 20 --tpot 30ms

tensorcast compare qwen3-30b-a3b -d h100,h200 -n 8 --objective cost --price h100=2,h200=2.6

[dim]Is an FP8 cache worth it, and drafting one or two tokens?[/dim]

tensorcast compare deepseek-v3 -d h200 -n 16 --kv-dtype bf16,fp8 --mtp 0,1,2 --mtp-acceptance 0.7

[dim]Over a Dask cluster[/dim]

tensorcast compare deepseek-v3 -d h100,h200,b200 -n 16,32,64,128 --executor dask:tcp://10.0.0.1:8786"""


@app.command(epilog=EXAMPLES)
def compare(
    model: Model,
    device: Annotated[str, typer.Option(
        "--device", "-d", metavar="NAME,...", help="One or more (see [bold]tensorcast devices[/bold]).",
        show_default=False, rich_help_panel=DEPLOYMENT,
    )],
    world_size: Annotated[str, typer.Option(
        "--world-size", "-n", metavar="N,...", help="GPUs in all; one or more sizes.", show_default=False,
        rich_help_panel=DEPLOYMENT,
    )],
    input_len: Annotated[int, typer.Option(
        "--input-len", "-i", min=1, help="Tokens of a prompt.", rich_help_panel=LOAD,
    )] = 4096,
    output_len: Annotated[int, typer.Option(
        "--output-len", "-o", min=1, help="Tokens of a reply.", rich_help_panel=LOAD,
    )] = 1024,
    ttft: Annotated[str | None, typer.Option(
        "--ttft", metavar="TIME", help="Longest mean time to first token, such as 2s or 500ms.", show_default=False,
        rich_help_panel=LOAD,
    )] = None,
    tpot: Annotated[str | None, typer.Option(
        "--tpot", metavar="TIME", help="Longest mean time per output token, such as 50ms.", show_default=False,
        rich_help_panel=LOAD,
    )] = None,
    objective: Annotated[str, typer.Option(
        "--objective", metavar="NAME", rich_help_panel=LOAD,
        help="tokens_per_gpu (most), latency (shortest request), cost (least per token), gpus (fewest).",
    )] = "tokens_per_gpu",
    request_rate: Annotated[float | None, typer.Option(
        "--request-rate", help="Requests per second, for --objective gpus.", show_default=False, rich_help_panel=LOAD,
    )] = None,
    price: Annotated[str | None, typer.Option(
        "--price", metavar="DEVICE=USD,...", help="US dollars per GPU hour.  [dim]\\[default: the device's][/dim]",
        show_default=False, rich_help_panel=LOAD,
    )] = None,
    prefix_cached: Annotated[int, typer.Option(
        "--prefix-cached", min=0, help="Prompt tokens that are in the cache already.", rich_help_panel=LOAD,
    )] = 0,
    layouts: Annotated[Path | None, typer.Option(
        "--layouts", metavar="FILE", help="YAML list of layouts, such as tp8-ep8: only these.", show_default=False,
        rich_help_panel=SEARCH,
    )] = None,
    form: Annotated[str, typer.Option(
        "--form", metavar="NAME,...", help="One engine for both phases, pools of prefill and decode, or both.",
        rich_help_panel=SEARCH,
    )] = "aggregated,disaggregated",
    kv_dtype: Annotated[str | None, typer.Option(
        "--kv-dtype", metavar="bf16,fp8", help="KV cache.  [dim]\\[default: the model's][/dim]", show_default=False,
        rich_help_panel=SEARCH,
    )] = None,
    mtp: Annotated[str | None, typer.Option(
        "--mtp", metavar="N,...", help="Tokens drafted per step.  [dim]\\[default: 0][/dim]", show_default=False,
        rich_help_panel=SEARCH,
    )] = None,
    mtp_acceptance: Annotated[float, typer.Option(
        "--mtp-acceptance", min=0, max=1, help="Chance that a drafted token is accepted.", rich_help_panel=SEARCH,
    )] = 0.8,
    all2all: Annotated[str | None, typer.Option(
        "--all2all", metavar="KIND,...", show_default=False, rich_help_panel=SEARCH,
        help="allgather_reducescatter, deepep (its mode by phase), high_throughput, low_latency, direct, auto.  "
        "[dim]\\[default: the first two][/dim]",
    )] = None,
    dispatch: Annotated[str | None, typer.Option(
        "--dispatch", metavar="SCHEME,...", show_default=False, rich_help_panel=SEARCH,
        help="What tokens are sent in.  [dim]\\[default: as the experts read them, and bf16][/dim]",
    )] = None,
    combine: Annotated[str | None, typer.Option(
        "--combine", metavar="SCHEME,...", show_default=False, rich_help_panel=SEARCH,
        help="What results come back in, as in simulate.  [dim]\\[default: bf16][/dim]",
    )] = None,
    chunk_tokens: Annotated[str | None, typer.Option(
        "--chunk-tokens", metavar="N,...", show_default=False, rich_help_panel=SEARCH,
        help="Prompt tokens per step and rank.  [dim]\\[default: 2048,8192,16384][/dim]",
    )] = None,
    full: Annotated[bool, typer.Option(
        "--full", help="Search every axis: KV dtypes and drafts, too.", rich_help_panel=SEARCH,
    )] = False,
    any_engine: Annotated[bool, typer.Option(
        "--any-engine", help="Also layouts and options that --engine cannot run.", rich_help_panel=SEARCH,
    )] = False,
    engine: Engine = "vllm",
    quant: Annotated[str | None, typer.Option(
        "--quant", metavar="SCHEME", help="Weights, as in simulate.  [dim]\\[default: as the model ships][/dim]",
        show_default=False, rich_help_panel=CHOICES,
    )] = None,
    routing: Annotated[str, typer.Option(
        "--routing", metavar="LAW", help="balanced, uniform, zipf:S, or a CSV of counts per expert.",
        rich_help_panel=CHOICES,
    )] = "uniform",
    placement: Annotated[str, typer.Option(
        "--placement", metavar="POLICY", help="linear, round_robin, or eplb.", rich_help_panel=CHOICES,
    )] = "linear",
    top: Annotated[int, typer.Option("--top", min=0, help="Layouts to list.", rich_help_panel=OUTPUT)] = 12,
    out: Annotated[Path | None, typer.Option(
        "--out", metavar="DIR", show_default=False, rich_help_panel=OUTPUT,
        help="Also write report.html, its figures, candidates.parquet and .csv, summary.json and what starts the best "
        "layout (launch-ENGINE.sh) there.",
    )] = None,
    as_json: AsJson = False,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Processes.", rich_help_panel=SEARCH)] = 1,
    executor: Annotated[str | None, typer.Option(
        "--executor", metavar="dask:ADDRESS", help="Spread devices and sizes over a Dask cluster.", show_default=False,
        rich_help_panel=SEARCH,
    )] = None,
) -> None:
    """Compare every legal layout of MODEL for a load and its limits: the best, why, and what comes close."""
    from tensorcast.api import compare as run_comparison

    if out is not None:
        from tensorcast.report.files import check_directory

        check_directory(out)  # before the work, not after
    with patience(model, "comparing layouts of"), _told(out):
        found = run_comparison(
            model, device=_listed("--device", device), world_size=_numbers("--world-size", world_size),
            input_len=input_len, output_len=output_len,
            ttft_s=duration("--ttft", ttft), tpot_s=duration("--tpot", tpot), objective=objective, engine=engine,
            layouts=read_layouts(layouts) if layouts else None,
            forms=_listed("--form", form), request_rate=request_rate, prices=_prices(price),
            prefix_cached=prefix_cached,
            quant=quant, routing=routing, placement=placement, kv_dtype=_names(kv_dtype) or None,
            mtp_depth=_numbers("--mtp", mtp) if mtp else None, mtp_acceptance=mtp_acceptance,
            all2all=_names(all2all) or None, dispatch=_names(dispatch) or None, combine=_names(combine) or None,
            chunk_tokens=_numbers("--chunk-tokens", chunk_tokens) if chunk_tokens else None, full=full,
            runnable_only=not any_engine, jobs=jobs, executor=executor,
        )
        written = _written(found, out)
    if as_json:
        from tensorcast.report.compare_terminal import comparison_record
        from tensorcast.report.rows import to_json

        typer.echo(to_json(comparison_record(found), indent=2))
        return
    from tensorcast.report.compare_terminal import print_comparison

    print_comparison(found, console(), top)
    if written:
        typer.echo(f"wrote {len(written)} files to {out}: open {out / 'report.html'}")  # type: ignore[operator]


def _written(found: Comparison, out: Path | None) -> list[Path]:
    if out is None:
        return []
    from tensorcast.report.compare.files import write_comparison

    return write_comparison(found, out)


@contextlib.contextmanager
def _told(out: Path | None) -> Iterator[None]:
    """Where no layout keeps the limits, the report says so, too; it is still the same error."""
    from tensorcast.deploy.compare import NoLayoutMeets

    try:
        yield
    except NoLayoutMeets as error:
        if _written(error.comparison, out):
            raise NoLayoutMeets(f"{error}; all candidates are in {out}", error.comparison) from None
        raise


_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}


def duration(flag: str, text: str | None) -> float | None:
    """``2s``, ``50ms`` or ``1.5 s`` in seconds. Raises :class:`InputError` on anything else, a bare number as well:
    50 may be meant as milliseconds."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+\.?\d*(?:e-?\d+)?|\.\d+)\s*(us|ms|s|min|)\s*", text.lower())
    if not found or not 0 < float(found[1]) < math.inf:
        raise InputError(f"{flag} {text!r}: must be a time, such as 2s, 50ms or 0.05s")
    number, unit = found.groups()
    if not unit:
        raise InputError(f"{flag} {text!r}: a time needs its unit: {number}ms or {number}s")
    return float(number) * _UNITS[unit]


def _names(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _listed(flag: str, text: str) -> list[str]:
    found = list(dict.fromkeys(_names(text)))
    if not found:
        raise InputError(f"{flag} {text!r}: must be one name or several with commas between")
    return found


def _numbers(flag: str, text: str) -> list[int]:
    try:
        found = list(dict.fromkeys(int(part) for part in _names(text)))
    except ValueError:
        found = []
    if not found:
        raise InputError(f"{flag} {text!r}: must be whole numbers, such as 8 or 8,16,32")
    return found


def _prices(text: str | None) -> dict[str, float]:
    prices = {}
    for part in _names(text):
        name, _, value = part.partition("=")
        try:
            if not name:
                raise ValueError
            prices[name] = float(value)
        except ValueError:
            raise InputError(f"--price {part!r}: must be DEVICE=USD per GPU hour, as in H200=2.5") from None
    return prices


def read_layouts(path: Path) -> list[str]:
    """Layouts of a YAML file: a list (or ``layouts:`` with one) of words such as ``tp8-ep8`` or of sizes by name."""
    import yaml

    from tensorcast.deploy.layout import parse_layout

    try:
        document: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as reason:
        raise InputError(f"--layouts {path}: cannot be read: {reason.strerror or reason}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as reason:
        raise InputError(f"--layouts {path}: not YAML: {' '.join(str(reason).split())[:120]}") from None
    listed = document.get("layouts") if isinstance(document, dict) else document
    if isinstance(document, dict) and (others := [key for key in document if key != "layouts"]):
        raise InputError(f"--layouts {path}: {others[0]!r} is not known; it must be a list, or layouts: with one")
    if not isinstance(listed, list) or not listed:
        raise InputError(f"--layouts {path}: must be a list of layouts, such as [tp8, tp8-ep8]")
    words = ["-".join(f"{k}{v}" for k, v in one.items()) if isinstance(one, dict) else str(one) for one in listed]
    for word in words:
        try:
            sizes = parse_layout(word)
        except InputError as reason:
            raise InputError(f"--layouts {path}: {reason}") from None
        if min(sizes.tp, sizes.dp, sizes.ep, sizes.pp) < 1:
            raise InputError(f"--layouts {path}: layout {word!r}: sizes must be at least 1")
    return words
