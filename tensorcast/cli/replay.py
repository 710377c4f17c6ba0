"""``tensorcast replay``: every request of a trace through an engine's scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorcast.cli.app import CHOICES, DEPLOYMENT, OUTPUT, command, console, patience
from tensorcast.cli.options import Device, Engine, Model, deployment_options
from tensorcast.cli.values import duration
from tensorcast.deploy.options import SERVED_ROUTING
from tensorcast.errors import InputError

if TYPE_CHECKING:
    from tensorcast.scheduling.requests import Requests

REQUESTS, LIMITS = "Requests", "Limits and capacity"

EXAMPLES = """[bold]Examples[/bold]

[dim]A public trace on four replicas; what the slowest one in a hundred waited for[/dim]

tensorcast replay deepseek-v3 -d h200 --layout "4 x tp8-ep8" --trace mooncake.jsonl.gz

[dim]Prompts read by two servers, replies written by one; requests at random, 6 per second[/dim]

tensorcast replay qwen3-235b-a22b -d h200 --layout "2 x tp4-ep4 > tp8-ep8" --rate 6 -i 4000 --output-len 500

[dim]64 users in a closed loop, as benchmarks run them, prompts and replies of 80 to 100 % of the length[/dim]

tensorcast replay gpt-oss-120b -d h100 --layout tp4 --users 64 -i 922 --output-len 922 --spread 0.11 -r 640

[dim]The largest rate at which 99 % of the requests keep both limits[/dim]

tensorcast replay qwen3-235b-a22b -d h200 --layout tp8-ep8 -i 2000 --output-len 300 --ttft 2s --tpot 50ms --find-rate"""


@command(epilog=EXAMPLES)
@deployment_options(
    "quant", "kv_dtype", "state_dtype", "routing", "all2all", "placement", "redundant_experts", "mtp_depth",
    defaults={"routing": SERVED_ROUTING},
)
def replay(
    model: Model,
    *,
    device: Device,
    layout: Annotated[str, typer.Option(
        "--layout", "-l", metavar="[N x] LAYOUT [> [N x] LAYOUT]", show_default=False, rich_help_panel=DEPLOYMENT,
        help="Servers: tp8-ep8, \"4 x tp8-ep8\", or prefill > decode: \"2 x tp8 > dp8-ep8\".",
    )],
    trace: Annotated[Path | None, typer.Option(
        "--trace", "-t", metavar="FILE", show_default=False, rich_help_panel=REQUESTS,
        help="Requests: Mooncake JSON lines, CSV or Parquet (ours, Azure's, BurstGPT's, Vidur's), vllm bench's result.",
    )] = None,
    skip_bad: Annotated[bool, typer.Option(
        "--skip-bad", help="Leave rows out that cannot be read, and count them.", rich_help_panel=REQUESTS,
    )] = False,
    requests: Annotated[int | None, typer.Option(
        "--requests", "-r", min=1, show_default=False, rich_help_panel=REQUESTS,
        help="How many: the first of a trace, or drawn.  [dim]\\[default: all of a trace, 1000 drawn][/dim]",
    )] = None,
    rate: Annotated[float | None, typer.Option(
        "--rate", show_default=False, rich_help_panel=REQUESTS,
        help="Requests per second; a trace is stretched to it.  [dim]\\[default: the trace's; all at once][/dim]",
    )] = None,
    users: Annotated[int | None, typer.Option(
        "--users", "-u", min=1, show_default=False, help="Most requests in flight.", rich_help_panel=REQUESTS,
    )] = None,
    burstiness: Annotated[float, typer.Option(
        "--burstiness", help="Shape of the gaps between drawn requests: 1 is Poisson, less comes in bursts.",
        rich_help_panel=REQUESTS,
    )] = 1.0,
    input_len: Annotated[int, typer.Option(
        "--input-len", "-i", min=1, help="Mean tokens of a drawn prompt.", rich_help_panel=REQUESTS,
    )] = 4096,
    output_len: Annotated[int, typer.Option(
        "--output-len", min=1, help="Mean tokens of a drawn reply.", rich_help_panel=REQUESTS,
    )] = 1024,
    spread: Annotated[float, typer.Option(
        "--spread", help="Drawn lengths are uniform, this share below and above the mean.", rich_help_panel=REQUESTS,
    )] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Of what is drawn.", rich_help_panel=REQUESTS)] = 0,
    router: Annotated[str, typer.Option(
        "--router", help="Which server: least_work, round_robin, power_of_two or prefix_aware.",
        rich_help_panel=DEPLOYMENT,
    )] = "least_work",
    chunk: Annotated[int | None, typer.Option(
        "--prefill-chunk", min=1, show_default=False, rich_help_panel=CHOICES,
        help="Prompt tokens per step and rank.  [dim]\\[default: the engine's][/dim]",
    )] = None,
    max_sequences: Annotated[int | None, typer.Option(
        "--max-sequences", min=1, show_default=False, rich_help_panel=CHOICES,
        help="Sequences of a step per data-parallel rank.  [dim]\\[default: the engine's][/dim]",
    )] = None,
    balance_steps: Annotated[int, typer.Option(
        "--balance-steps", min=0, rich_help_panel=CHOICES,
        help="Steps that prompts wait until every data-parallel rank has one (TensorRT-LLM's attention_dp_config).",
    )] = 0,
    mtp_acceptance: Annotated[float, typer.Option(
        "--mtp-acceptance", min=0, max=1, rich_help_panel=CHOICES,
        help="Chance that a drafted token is accepted, given that those before it were.",
    )] = 0.8,
    engine: Engine = "vllm",
    ttft: Annotated[str | None, typer.Option(
        "--ttft", metavar="TIME", show_default=False, help="Longest time to first token, as 2s.",
        rich_help_panel=LIMITS,
    )] = None,
    tpot: Annotated[str | None, typer.Option(
        "--tpot", metavar="TIME", show_default=False, help="Longest time per output token, as 50ms.",
        rich_help_panel=LIMITS,
    )] = None,
    e2e: Annotated[str | None, typer.Option(
        "--e2e", metavar="TIME", show_default=False, help="Longest time of a whole request.", rich_help_panel=LIMITS,
    )] = None,
    search_rate: Annotated[bool, typer.Option(
        "--find-rate", rich_help_panel=LIMITS,
        help="Find the largest rate at which --percentile of the requests keep the limits.",
    )] = False,
    percentile: Annotated[float, typer.Option(
        "--percentile", help="Share of the requests that must keep them, in percent.", rich_help_panel=LIMITS,
    )] = 99.0,
    draws: Annotated[int, typer.Option(
        "--draws", min=0, rich_help_panel=OUTPUT,
        help="Replay again so often under step times as far off as theirs may be, for 80 % bands.",
    )] = 0,
    out: Annotated[Path | None, typer.Option(
        "--out", "-o", metavar="DIR", show_default=False, rich_help_panel=OUTPUT,
        help="Also write report.html, requests.parquet and .csv, summary.json, replay.png and trace.json (for "
        "ui.perfetto.dev) there.",
    )] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.", rich_help_panel=OUTPUT)] = False,
    **options: Any,
) -> None:
    """Replay requests one by one through an engine's scheduler: percentiles, goodput, what slow ones waited for."""
    from tensorcast.api import replay as run
    from tensorcast.files import check_directory
    from tensorcast.scheduling.trace_files import read_trace

    if out is not None:
        check_directory(out)
    longest = [duration(flag, text) for flag, text in (("--ttft", ttft), ("--tpot", tpot), ("--e2e", e2e))]
    if search_rate and not any(longest):
        raise InputError("--find-rate: needs a limit: --ttft, --tpot or --e2e")
    skipped = 0
    if trace is not None:
        read = read_trace(trace, skip_bad)
        asked, skipped = read.requests, read.skipped
        asked = asked if requests is None else asked.first(requests)
        asked = _paced(asked, rate, users)
    else:
        if search_rate and rate is None:
            rate = 1.0  # any will do: it is scaled
        asked = _drawn(
            requests or 1000, input_len, output_len, spread, rate=rate, burstiness=burstiness, users=users, seed=seed
        )
    with patience(model, "replaying"):
        found = run(
            model, device=device, layout=layout, requests=asked, engine=engine, router=router, prefill_chunk=chunk,
            max_sequences=max_sequences, balance_steps=balance_steps, mtp_acceptance=mtp_acceptance, seed=seed,
            draws=draws, percentile=percentile, find_rate=search_rate,
            ttft_s=longest[0], tpot_s=longest[1], request_s=longest[2], **options,
        )
        if out is not None:
            from tensorcast.report.replay.files import write_replay

            written = write_replay(found, out)
    if as_json:
        from tensorcast.report.plain import to_json
        from tensorcast.report.replay.words import document

        typer.echo(to_json({**document(found), "skipped_rows": skipped}, indent=2))
        return
    from tensorcast.report.replay.terminal import print_replay

    print_replay(found, console(), skipped)
    if out is not None:
        typer.echo(f"wrote {', '.join(path.name for path in written)} to {out}")


def _paced(asked: Requests, rate: float | None, users: int | None) -> Requests:
    from dataclasses import replace

    if rate is not None:
        if not 0 < rate < float("inf"):
            raise InputError(f"--rate {rate}: must be more than 0 requests per second")
        if asked.rate == float("inf"):
            raise InputError("--rate: the requests of this trace all come at once, and cannot be stretched to a rate")
        asked = asked.scaled(rate=rate / asked.rate)
    return asked if users is None else replace(asked, users=users)


def _drawn(
    count: int, input_len: int, output_len: int, spread: float, *, rate: float | None, burstiness: float,
    users: int | None, seed: int,
) -> Requests:
    from tensorcast.scheduling.requests import Length, drawn

    if rate is None and users is None:
        raise InputError("requests: needs --trace FILE, --rate N or --users N")
    return drawn(
        count, Length(input_len, spread), Length(output_len, spread), rate=rate, burstiness=burstiness, users=users,
        seed=seed,
    )
