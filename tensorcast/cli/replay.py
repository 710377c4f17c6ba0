"""``tensorcast replay``: every request of a trace through an engine's scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorcast.cli.app import CHOICES, DEPLOYMENT, OUTPUT, Part, command, console, patience
from tensorcast.cli.options import Device, Engine, Model, deployment_options, time_limit
from tensorcast.cli.values import check_beside, duration, listed_names, numbers, whole_numbers
from tensorcast.deploy.options import SERVED_ROUTING
from tensorcast.errors import InputError
from tensorcast.parallel import note
from tensorcast.scheduling.rules import Waits, read_graph_sizes

if TYPE_CHECKING:
    from tensorcast.scheduling.requests import Requests
    from tensorcast.scheduling.sweep import Sent

REQUESTS, LIMITS = "Requests", "Limits and capacity"

EXAMPLES = """[bold]Examples[/bold]

[dim]A public trace on four replicas; what the slowest one in a hundred waited for[/dim]

tensorcast replay deepseek-v3 -d h200 --layout "4 x tp8-ep8" --trace mooncake.jsonl.gz

[dim]Prompts read by two servers, replies written by one; requests at random, 6 per second[/dim]

tensorcast replay qwen3-235b-a22b -d h200 --layout "2 x tp4-ep4 > tp8-ep8" --rate 6 -i 4000 --output-len 500

[dim]64 users in a closed loop, as benchmarks run them, prompts and replies of 80 to 100 % of the length[/dim]

tensorcast replay gpt-oss-120b -d h100 --layout tp4 --users 64 -i 922 --output-len 922 --spread 0.11 -r 640

[dim]The largest rate at which 99 % of the requests keep both limits[/dim]

tensorcast replay qwen3-235b-a22b -d h200 --layout tp8-ep8 -i 2000 --output-len 300 --ttft 2s --tpot 50ms --find-rate

[dim]Conversations of six turns behind a system prompt; one of four servers is lost after a minute, another comes[/dim]

tensorcast replay qwen3-235b-a22b -d h200 -l "4 x tp8-ep8" --rate 2 --turns 6 --think 20s --shared-len 1000
--workers "60s -1, 3min +1"

[dim]Two layouts at three rates with two seeds each, on a cluster[/dim]

tensorcast replay deepseek-v3 -d h200 -l "4 x tp8-ep8, 2 x tp8-ep8 > dp16-ep16" --rate 4,8,12 --seed 0,1
--executor dask:tcp://10.0.0.1:8786"""


@command(epilog=EXAMPLES)
@deployment_options(
    "quant", "kv_dtype", "state_dtype", "routing", "all2all", "placement", "redundant_experts", "mtp_depth",
    "speculative_method", "draft_model", "dcp", "pp_partition", "experts_kernels", "attention_kernels",
    "hand_over_gbs",
    defaults={"routing": SERVED_ROUTING},
)
def replay(
    model: Model,
    *,
    device: Device,
    layout: Annotated[str, typer.Option(
        "--layout", "-l", metavar="[N x] LAYOUT [> [N x] LAYOUT]", show_default=False, rich_help_panel=DEPLOYMENT,
        help="Servers: tp8-ep8, \"4 x tp8-ep8\", or prefill > decode: \"2 x tp8 > dp8-ep8\"; pools beside one another "
        "with &, another device with @: \"2 x tp8 & 4 x tp4@h100\". Several with commas: a row each.",
    )],
    trace: Annotated[Path | None, typer.Option(
        "--trace", "-t", metavar="FILE", show_default=False, rich_help_panel=REQUESTS,
        help="Requests: JSON lines (Mooncake's, Bailian's), CSV or Parquet (ours, Azure's, BurstGPT's, Vidur's), "
        "results of vllm bench, SGLang's bench_serving, guidellm (FILE#2: the second of several) or aiperf.",
    )] = None,
    skip_bad: Annotated[bool, typer.Option(
        "--skip-bad", help="Leave rows out that cannot be read, and count them.", rich_help_panel=REQUESTS,
    )] = False,
    requests: Annotated[int | None, typer.Option(
        "--requests", "-r", min=1, show_default=False, rich_help_panel=REQUESTS,
        help="How many: the first of a trace, or drawn.  [dim]\\[default: all of a trace, 1000 drawn][/dim]",
    )] = None,
    rate: Annotated[str | None, typer.Option(
        "--rate", metavar="RATES", show_default=False, rich_help_panel=REQUESTS,
        help="Requests (of --turns, conversations) per second, inf for all at once; a trace is stretched to it. "
        "Several with commas: a row each.  [dim]\\[default: the trace's; all at once][/dim]",
    )] = None,
    users: Annotated[int | None, typer.Option(
        "--users", "-u", min=1, show_default=False, help="Most requests in flight.", rich_help_panel=REQUESTS,
    )] = None,
    burstiness: Annotated[float | None, typer.Option(
        "--burstiness", rich_help_panel=REQUESTS, show_default=False,
        help="Shape of the gaps between drawn requests: 1 is Poisson, less comes in bursts, inf evenly spaced."
        "  [dim]\\[default: 1][/dim]",
    )] = None,
    ramp: Annotated[str | None, typer.Option(
        "--ramp", metavar="TIME", show_default=False, rich_help_panel=REQUESTS,
        help="The rate climbs from 0 for so long.",
    )] = None,
    input_len: Annotated[int | None, typer.Option(
        "--input-len", "-i", min=1, show_default=False, rich_help_panel=REQUESTS,
        help="Mean tokens of a drawn prompt; with --turns, of what a turn adds.  [dim]\\[default: 4096][/dim]",
    )] = None,
    output_len: Annotated[int | None, typer.Option(
        "--output-len", min=1, show_default=False, help="Mean tokens of a drawn reply.  [dim]\\[default: 1024][/dim]",
        rich_help_panel=REQUESTS,
    )] = None,
    spread: Annotated[float | None, typer.Option(
        "--spread", show_default=False, rich_help_panel=REQUESTS,
        help="Of drawn lengths: uniform, this share below and above the mean; lognormal, standard deviation of the "
        "logarithm.  [dim]\\[default: 0][/dim]",
    )] = None,
    law: Annotated[str | None, typer.Option(
        "--law", metavar="uniform|lognormal", show_default=False, rich_help_panel=REQUESTS,
        help="Law of drawn lengths.  [dim]\\[default: uniform][/dim]",
    )] = None,
    lengths: Annotated[Path | None, typer.Option(
        "--lengths", metavar="FILE", show_default=False, rich_help_panel=REQUESTS,
        help="Draw lengths of prompt and reply together from a file's requests, kinds as of --trace.",
    )] = None,
    turns: Annotated[int | None, typer.Option(
        "--turns", min=1, show_default=False, rich_help_panel=REQUESTS,
        help="Conversations of so many turns, each of which repeats all that was said; -r counts conversations.",
    )] = None,
    think: Annotated[str | None, typer.Option(
        "--think", metavar="TIME", show_default=False, rich_help_panel=REQUESTS,
        help="Mean time from a reply to the next turn.  [dim]\\[default: none][/dim]",
    )] = None,
    shared_len: Annotated[int | None, typer.Option(
        "--shared-len", min=0, show_default=False, rich_help_panel=REQUESTS,
        help="Tokens of a system prompt with which all conversations begin.  [dim]\\[default: 0][/dim]",
    )] = None,
    scale_input: Annotated[float, typer.Option(
        "--scale-input", help="Prompts so many times as long as the trace's.", rich_help_panel=REQUESTS,
    )] = 1.0,
    scale_output: Annotated[float, typer.Option(
        "--scale-output", help="Replies so many times as long as the trace's.", rich_help_panel=REQUESTS,
    )] = 1.0,
    seed: Annotated[str, typer.Option(
        "--seed", metavar="SEEDS", help="Of what is drawn; several with commas: a row each.", rich_help_panel=REQUESTS,
    )] = "0",
    workers: Annotated[str, typer.Option(
        "--workers", metavar="\"TIME +-N, ...\"", show_default=False, rich_help_panel=DEPLOYMENT,
        help="Servers lost and added meanwhile: \"600s -1, 15min +2\"; of the second pool: \"600s -1 of 2\".",
    )] = "",
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
    graph_sizes: Annotated[str, typer.Option(
        "--graph-sizes", metavar="N,N,...", rich_help_panel=CHOICES, show_default=False,
        help="Batches that decode steps are padded to (TensorRT-LLM's cuda_graph_config).",
    )] = "",
    balance_steps: Annotated[int, typer.Option(
        "--balance-steps", min=0, rich_help_panel=CHOICES,
        help="Steps that prompts wait until every data-parallel rank has one (TensorRT-LLM's attention_dp_config: "
        "timeout_iters).",
    )] = 0,
    batching_steps: Annotated[int, typer.Option(
        "--batching-steps", min=0, rich_help_panel=CHOICES,
        help="With --balance-steps: steps that they gather once every rank has one (batching_wait_iters).",
    )] = 0,
    batch_wait_steps: Annotated[int, typer.Option(
        "--batch-wait-steps", min=0, rich_help_panel=CHOICES,
        help="Without data-parallel ranks: steps that prompts wait for more of them (batch_wait_timeout_iters).",
    )] = 0,
    batch_wait_share: Annotated[float | None, typer.Option(
        "--batch-wait-share", min=0, max=1, show_default=False, rich_help_panel=CHOICES,
        help="With --batch-wait-steps: share of tokens that is enough (batch_wait_max_tokens_ratio).  [default: 0.9]",
    )] = None,
    mtp_acceptance: Annotated[str, typer.Option(
        "--mtp-acceptance", "--acceptance", metavar="CHANCE|TASK", rich_help_panel=CHOICES,
        help="Chance that a drafted token is accepted, given that those before it were, or a task whose published one "
        "is taken, as mt-bench.",
    )] = "0.8",
    engine: Engine = "vllm",
    ttft: Annotated[str | None, time_limit("--ttft", LIMITS)] = None,
    tpot: Annotated[str | None, time_limit("--tpot", LIMITS)] = None,
    e2e: Annotated[str | None, time_limit("--e2e", LIMITS)] = None,
    search_rate: Annotated[bool, typer.Option(
        "--find-rate", rich_help_panel=LIMITS,
        help="Find the largest rate at which --percentile of the requests keep the limits.",
    )] = False,
    percentile: Annotated[float | None, typer.Option(
        "--percentile", min=0, max=100, show_default=False, rich_help_panel=LIMITS,
        help="Of --find-rate: percent of the requests that must keep them.  [default: 99]",
    )] = None,
    usd: Annotated[float, typer.Option(
        "--usd-per-gpu-hour", min=0, show_default=False, rich_help_panel=LIMITS,
        help="What a GPU costs, for the cost of a million tokens.",
    )] = 0.0,
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
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Processes, for several rows.")] = 1,
    executor: Annotated[str | None, typer.Option(
        "--executor", metavar="dask:ADDRESS", help="Spread several rows over a Dask cluster.", show_default=False,
    )] = None,
    **options: Any,
) -> None:
    """Replay requests one by one through an engine's scheduler: percentiles, goodput, what slow ones waited for."""
    from tensorcast.files import check_directory
    from tensorcast.scheduling.sweep import Sent

    if out is not None:
        check_directory(out)
    limits = [duration(flag, text) for flag, text in (("--ttft", ttft), ("--tpot", tpot), ("--e2e", e2e))]
    rates = _rates(rate, search_rate)
    check_beside("--find-rate", search_rate, {"--percentile": percentile})
    scaled = {"--scale-input": scale_input != 1 and scale_input, "--scale-output": scale_output != 1 and scale_output}
    check_beside("a --trace", trace is not None, {"--skip-bad": skip_bad, **scaled})
    check_beside("--batch-wait-steps", batch_wait_steps > 0, {"--batch-wait-share": batch_wait_share})
    if search_rate and not any(limits):
        raise InputError("--find-rate: needs a limit: --ttft, --tpot or --e2e")
    seeds = whole_numbers("--seed", seed, 0)
    said = {
        "turns": turns, "think": duration("--think", think), "shared_len": shared_len, "law": law, "spread": spread,
        "input_len": input_len, "output_len": output_len, "burstiness": burstiness, "ramp": duration("--ramp", ramp),
        "lengths": lengths,
    }
    skipped = 0
    if trace is not None:
        for name, value in said.items():
            if value is not None:
                raise InputError(f"--{name.replace('_', '-')}: is about drawn requests, not about a --trace")
        asked, skipped = _of_trace(trace, skip_bad, requests, users)
        asked = asked.scaled(input_len=scale_input, output_len=scale_output)
        sent = [Sent(requests=_at_rate(asked, one), said={"rate": one or asked.rate}) for one in rates]
    else:
        if search_rate and rate is None:
            rates = [1.0]  # any will do: it is scaled
        sent = [
            Sent(requests=_drawn(requests or 1000, one, users, seed, **said), said={"rate": one, "seed": seed})
            for one in rates for seed in seeds
        ]  # fmt: skip
    layouts = listed_names("--layout", layout)
    # a number, or the name of a task
    accepted = float(mtp_acceptance) if mtp_acceptance.replace(".", "", 1).isdigit() else mtp_acceptance
    alike = {
        "device": device, "engine": engine, "router": router, "prefill_chunk": chunk, "max_sequences": max_sequences,
        "graph_sizes": read_graph_sizes(graph_sizes), "mtp_acceptance": accepted, "seed": seeds[0],
        "percentile": 99.0 if percentile is None else percentile,
        "waits": Waits(
            balance_steps=balance_steps, batching_steps=batching_steps, batch_wait_steps=batch_wait_steps,
            batch_wait_share=Waits.batch_wait_share if batch_wait_share is None else batch_wait_share,
        ),
        "find_rate": search_rate, "ttft_s": limits[0], "tpot_s": limits[1], "request_s": limits[2], "workers": workers,
        "usd_per_gpu_hour": usd,
        **options,
    }
    if len(layouts) * len(sent) > 1:
        if draws:
            raise InputError(f"--draws {draws}: is about one replay, and {len(layouts) * len(sent)} are asked for")
        _many(model, layouts, sent, jobs=jobs, executor=executor, out=out, as_json=as_json, alike=alike)
    else:
        if line := note(1, jobs, executor, of="layouts, rates and seeds"):
            typer.echo(f"note: {line}", err=True)
        _one(
            model, layouts[0], sent[0].requests, draws=draws, skipped=skipped, out=out, as_json=as_json, alike=alike
        )


def _rates(text: str | None, search: bool) -> list[float | None]:
    found: list[float | None] = [None] if text is None else [float(one) for one in numbers("--rate", text)]
    if search and len(found) > 1:
        raise InputError(f"--rate {text}: --find-rate finds the rate; leave one of both out")
    return found


def _one(
    model: str, layout: str, asked: Requests, *, draws: int, skipped: int, out: Path | None, as_json: bool,
    alike: dict[str, Any],
) -> None:
    from tensorcast.api import replay as run

    part = Part(of=len(asked))

    def watch(finished: int, now_s: float) -> None:
        part.done = finished

    with patience(model, "replaying", part):
        found = run(model, layout=layout, requests=asked, draws=draws, watch=watch, **alike)
        if out is not None:
            from tensorcast.report.replay.files import write_replay

            written = write_replay(found, out)
    if as_json:
        from tensorcast.report.plain import to_json
        from tensorcast.report.replay.words import document

        typer.echo(to_json({**document(found), "skipped_rows": skipped}, indent=2))
    else:
        from tensorcast.report.replay.terminal import print_replay

        print_replay(found, console(), skipped)
        if out is not None:
            typer.echo(f"wrote {', '.join(path.name for path in written)} to {out}")
    if found.stopped:
        typer.echo(f"interrupted: {found.served} of {len(asked)} requests were served by then", err=True)
        raise typer.Exit(130)


def _many(
    model: str, layouts: list[str], sent: list[Sent], *, jobs: int, executor: str | None, out: Path | None,
    as_json: bool, alike: dict[str, Any],
) -> None:
    from tensorcast.api import replay_sweep

    part = Part(of=len(layouts) * len(sent))

    def done(many: int) -> None:
        part.done = many

    with patience(model, "replaying", part):
        frame = replay_sweep(
            model, layouts=layouts, requests=sent, jobs=jobs, executor=executor, done=done, keep=True, **alike
        )
    if out is not None and len(frame):
        from tensorcast.report.replay.sweep import write_sweep

        written = write_sweep(frame, out)
    if as_json:
        from tensorcast.report.plain import to_json

        typer.echo(to_json({"replays": frame.to_dict("records")}, indent=2))
    else:
        from tensorcast.report.replay.sweep import print_sweep

        print_sweep(frame, console())
        if out is not None and len(frame):
            typer.echo(f"wrote {', '.join(path.name for path in written)} to {out}")
    if frame.attrs["stopped"]:
        typer.echo(f"interrupted: {len(frame)} of {part.of} replays were done by then", err=True)
        raise typer.Exit(130)


def _of_trace(trace: Path, skip_bad: bool, count: int | None, users: int | None) -> tuple[Requests, int]:
    from dataclasses import replace

    from tensorcast.scheduling.trace_files import read_trace

    read = read_trace(trace, skip_bad)
    asked = read.requests if count is None else read.requests.first(count)
    return (asked if users is None else replace(asked, users=users)), read.skipped


def _at_rate(asked: Requests, rate: float | None) -> Requests:
    from tensorcast.scheduling.sweep import sent_at

    return sent_at(asked, [] if rate is None else [rate])[0].requests


def _drawn(count: int, rate: float | None, users: int | None, seed: int, **said: Any) -> Requests:
    from tensorcast.scheduling.requests import Length, drawn, lengths_of, sessions
    from tensorcast.scheduling.trace_files import read_trace

    if rate is None and users is None:
        raise InputError("requests: needs --trace FILE, --rate N or --users N")
    turns, law, spread = said["turns"], said["law"] or "uniform", said["spread"] or 0.0
    for name in ("think", "shared_len"):
        if turns is None and said[name] is not None:
            raise InputError(f"--{name.replace('_', '-')}: is about conversations; --turns says of how many turns")
    prompts, replies = (
        Length(said[name] or default, spread, law) for name, default in (("input_len", 4096), ("output_len", 1024))
    )
    come: dict[str, Any] = {
        "rate": None if rate == float("inf") else rate, "users": users, "seed": seed, "ramp_s": said["ramp"] or 0.0,
        "burstiness": 1.0 if said["burstiness"] is None else said["burstiness"],
    }
    if said["lengths"] is not None:
        for name in ("input_len", "output_len", "spread", "law", "turns"):
            if said[name] is not None:
                raise InputError(f"--{name.replace('_', '-')}: the lengths are those of --lengths {said['lengths']}")
        return lengths_of(read_trace(said["lengths"]).requests, drawn(count, prompts, replies, **come), seed)
    if turns is not None:
        return sessions(
            count, turns, prompts, replies, think_s=said["think"] or 0.0, shared_len=said["shared_len"] or 0, **come
        )
    return drawn(count, prompts, replies, **come)
