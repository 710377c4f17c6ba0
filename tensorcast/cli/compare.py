"""``tensorcast compare``: which layout, for a load and its limits."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorcast.cli.app import CHOICES, DEPLOYMENT, LOAD, OUTPUT, SEARCH, AsJson, command, console, patience
from tensorcast.cli.options import Model, deployment_options
from tensorcast.cli.values import (
    check_beside,
    device_prices,
    duration,
    layouts_of,
    listed_names,
    split_names,
    whole_numbers,
)
from tensorcast.deploy.options import SERVED_ROUTING
from tensorcast.errors import InputError

if TYPE_CHECKING:
    from tensorcast.scheduling.requests import Requests
    from tensorcast.search.compare import Comparison
    from tensorcast.search.replayed import ReplayedComparison

REPLAY = "Replay"

SEVERAL_NAMES = ("kv_dtype", "all2all", "dispatch", "combine")
NUMBERS = {"mtp_depth": "--mtp", "dcp": "--dcp", "pcp": "--pcp", "chunk_tokens": "--chunk-tokens"}
"""Options that are lists here, of names and of whole numbers with their flags."""

EXAMPLES = """[bold]Examples[/bold]

[dim]Which layout, when users wait 2 s for a first token and 50 ms for each of the others?[/dim]

tensorcast compare deepseek-v3 -d h200 -n 32 -i 4096 -o 1024 --ttft 2s --tpot 50ms

[dim]Three devices, three sizes; a report with figures in reports/qwen3-235b[/dim]

tensorcast compare qwen3-235b-a22b -d h100,h200,b200 -n 8,16,32 --out reports/qwen3-235b

[dim]Just these layouts[/dim]

tensorcast compare gpt-oss-120b -d h200 -n 8 --layouts tp8,tp8-ep8,dp8-ep8

[dim]The same question again, of two engines now[/dim]

tensorcast compare --config reports/qwen3-235b/question.yaml --engine vllm,sglang

[dim]Two models, three prompt lengths: a table, and a report of each below out/[/dim]

tensorcast compare deepseek-v3,qwen3-235b-a22b -d h200 -n 32 -i 1000,4000,16000 --tpot 50ms --out out

[dim]300 users at once for 60 USD an hour at most, limits kept four times in five[/dim]

tensorcast compare gpt-oss-120b -d h100,h200 -n 8 --users 300 --budget 60 --ttft 2s --tpot 50ms --confidence 0.8

[dim]Fewest GPUs for 20 requests per second; cheapest tokens at your prices[/dim]

tensorcast compare qwen3-30b-a3b -d h100 -n 16 --objective gpus --request-rate 20 --tpot 30ms

tensorcast compare qwen3-30b-a3b -d h100,h200 -n 8 --objective cost --price h100=2,h200=2.6

[dim]Which of the best layouts keeps the limits for most requests of a real trace?[/dim]

tensorcast compare deepseek-v3 -d h200 -n 32 --ttft 5s --tpot 80ms --trace mooncake.jsonl.gz

[dim]Prompts on H100s, replies on H200s, 24 of both at most[/dim]

tensorcast compare qwen3-235b-a22b -d h100 --decode-device h200 -n 24 --ttft 2s --tpot 30ms

[dim]Is an FP8 cache worth it, and drafting one or two tokens?[/dim]

tensorcast compare deepseek-v3 -d h200 -n 16 --kv-dtype bf16,fp8 --mtp 0,1,2 --mtp-acceptance 0.7

[dim]Over a Dask cluster[/dim]

tensorcast compare deepseek-v3 -d h100,h200,b200 -n 16,32,64,128 --executor dask:tcp://10.0.0.1:8786"""


@command(epilog=EXAMPLES)
@deployment_options(
    "quant", "state_dtype", "routing", "placement", "speculative_method", "draft_model", "pp_partition",
    "experts_kernels", "attention_kernels",
    defaults={"routing": SERVED_ROUTING}, searched={
        "kv_dtype": ("bf16,fp8", "the model's"), "mtp_depth": ("N,...", "0"),
        "dcp": ("N,...", "1"), "pcp": ("N,...", "1"), "all2all": ("KIND,...", "the first two"),
        "dispatch": ("SCHEME,...", "as the experts read them, and bf16"), "combine": ("SCHEME,...", "bf16"),
        "chunk_tokens": ("N,...", "2048,8192,16384"),
    },
    all2all="allgather_reducescatter, deepep (its mode by phase), high_throughput, low_latency, direct, auto.",
    chunk_tokens="Prompt tokens per step and rank.",
    pp_partition="Layers of each pipeline stage, as 15,15,16,15, in layouts with as many stages.",
    pcp="Prefill context parallelism of pools of prompts: data-parallel groups of GPUs that read each prompt together.",
)
def compare(
    model: Model,
    *,
    device: Annotated[str, typer.Option(
        "--device", "-d", metavar="NAME,...", help="One or more (see [bold]tensorcast devices[/bold]).",
        show_default=False, rich_help_panel=DEPLOYMENT,
    )],
    world_size: Annotated[str, typer.Option(
        "--world-size", "-n", metavar="N,...", help="GPUs in all; one or more sizes.", show_default=False,
        rich_help_panel=DEPLOYMENT,
    )],
    decode_device: Annotated[str | None, typer.Option(
        "--decode-device", metavar="NAME", show_default=False, rich_help_panel=DEPLOYMENT,
        help="Pools alone: prompts on --device, replies on this one; --world-size is then of both together.",
    )] = None,
    decode_world_size: Annotated[int | None, typer.Option(
        "--decode-world-size", metavar="N", show_default=False, rich_help_panel=DEPLOYMENT,
        help="GPUs of --decode-device; --world-size is then of --device alone.",
    )] = None,
    input_len: Annotated[str | None, typer.Option(
        "--input-len", "-i", metavar="N,...", show_default=False, rich_help_panel=LOAD,
        help="Tokens of a prompt; of several lengths, as of several models, each is a question of its own.  "
        "[dim]\\[default: 4096, or the --trace's mean][/dim]",
    )] = None,
    output_len: Annotated[int | None, typer.Option(
        "--output-len", "-o", min=1, show_default=False, rich_help_panel=LOAD,
        help="Tokens of a reply.  [dim]\\[default: 1024, or the --trace's mean][/dim]",
    )] = None,
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
        help="tokens_per_gpu (most), throughput (most of all GPUs), users (most at once), latency (shortest request), "
        "cost (least per token), gpus (fewest).",
    )] = "tokens_per_gpu",
    request_rate: Annotated[float | None, typer.Option(
        "--request-rate", help="Least requests per second to serve.", show_default=False, rich_help_panel=LOAD,
    )] = None,
    users: Annotated[int | None, typer.Option(
        "--users", min=1, help="Least users to serve at once.", show_default=False, rich_help_panel=LOAD,
    )] = None,
    budget: Annotated[float | None, typer.Option(
        "--budget", metavar="USD", help="Most US dollars per hour.", show_default=False, rich_help_panel=LOAD,
    )] = None,
    confidence: Annotated[float | None, typer.Option(
        "--confidence", metavar="CHANCE", show_default=False, rich_help_panel=LOAD,
        help="Chance to keep each limit, such as 0.8; lower bounds decide.  [dim]\\[default: as expected][/dim]",
    )] = None,
    price: Annotated[str | None, typer.Option(
        "--price", metavar="DEVICE=USD,...", help="US dollars per GPU hour.  [dim]\\[default: the device's][/dim]",
        show_default=False, rich_help_panel=LOAD,
    )] = None,
    prefix_cached: Annotated[int, typer.Option(
        "--prefix-cached", min=0, help="Prompt tokens that are in the cache already.", rich_help_panel=LOAD,
    )] = 0,
    images_per_request: Annotated[int | None, typer.Option(
        "--images-per-request", metavar="N", min=1, rich_help_panel=LOAD, show_default=False,
        help="Images with every prompt; their tokens come beside --input-len.",
    )] = None,
    image_size: Annotated[str | None, typer.Option(
        "--image-size", metavar="WxH", help="Pixels of each, as 1280x720.", show_default=False, rich_help_panel=LOAD,
    )] = None,
    encoder_tp_mode: Annotated[str | None, typer.Option(
        "--encoder-tp-mode", metavar="MODE", show_default=False, rich_help_panel=SEARCH,
        help="The vision tower on a server's tensor-parallel GPUs: weights, cut over them, or data, whole on each with "
        "images of its own.  [dim]\\[default: weights][/dim]",
    )] = None,
    layouts: Annotated[str | None, typer.Option(
        "--layouts", metavar="LAYOUT,...|FILE", help="Only these, such as tp8-ep8,dp8-ep8, or a YAML list of them.",
        show_default=False, rich_help_panel=SEARCH,
    )] = None,
    mode: Annotated[str, typer.Option(
        "--mode", "--form", metavar="NAME,...",
        help="One engine for both phases, pools of prefill and decode, or both.",
        rich_help_panel=SEARCH,
    )] = "aggregated,disaggregated",
    mtp_acceptance: Annotated[str, typer.Option(
        "--mtp-acceptance", "--acceptance", metavar="CHANCE|TASK", rich_help_panel=SEARCH,
        help="Chance that a drafted token is accepted, or a task whose published one is taken, as mt-bench.",
    )] = "0.8",
    full: Annotated[bool, typer.Option(
        "--full", help="Search every axis: KV dtypes and drafts, too.", rich_help_panel=SEARCH,
    )] = False,
    any_engine: Annotated[bool, typer.Option(
        "--any-engine", help="Also layouts and options that --engine cannot run.", rich_help_panel=SEARCH,
    )] = False,
    trace: Annotated[Path | None, typer.Option(
        "--trace", metavar="FILE", show_default=False, rich_help_panel=REPLAY,
        help="Replay the best layouts under these requests (as in [bold]replay[/bold]) and rank them by how many keep "
        "the limits.",
    )] = None,
    requests: Annotated[int | None, typer.Option(
        "--requests", min=1, show_default=False, help="The first so many of the trace.", rich_help_panel=REPLAY,
    )] = None,
    skip_bad: Annotated[bool, typer.Option(
        "--skip-bad", help="Leave rows of the trace out that cannot be read, and count them.", rich_help_panel=REPLAY,
    )] = False,
    percentile: Annotated[float | None, typer.Option(
        "--percentile", min=0, max=100, show_default=False, rich_help_panel=REPLAY,
        help="Send the trace to each layout as fast as leaves so many percent of its requests within the limits.",
    )] = None,
    replay_top: Annotated[int | None, typer.Option(
        "--replay-top", min=1, help="Layouts to replay.  [default: 12]", show_default=False, rich_help_panel=REPLAY,
    )] = None,
    engine: Annotated[str, typer.Option(
        "--engine", "-e", metavar="NAME,...", rich_help_panel=CHOICES,
        help="vllm, sglang, trtllm or a profile file, one or more; an older release as vllm==0.24.0.",
    )] = "vllm",
    ffn_apart: Annotated[bool, typer.Option(
        "--ffn-apart", help="Also decode servers whose experts are on GPUs of their own (AFD): are they worth it?",
        rich_help_panel=SEARCH,
    )] = False,
    encoder_gpus: Annotated[str | None, typer.Option(
        "--encoder-gpus", metavar="N,...|auto", show_default=False, rich_help_panel=SEARCH,
        help="Also vision towers on so many GPUs of their own, of those in all: are they worth it?",
    )] = None,
    top: Annotated[int, typer.Option("--top", min=0, help="Layouts to list.", rich_help_panel=OUTPUT)] = 12,
    config: Annotated[Path | None, typer.Option(
        "--config", metavar="FILE", show_default=False, rich_help_panel=OUTPUT,
        help="A saved question (question.yaml of --out, or the explorer's): asked again; options beside it stand.",
    )] = None,
    out: Annotated[Path | None, typer.Option(
        "--out", metavar="DIR", show_default=False, rich_help_panel=OUTPUT,
        help="Also write report.html, its figures, candidates.parquet and .csv, summary.json, question.yaml (for "
        "--config) and what starts the best layout (launch-ENGINE.sh) there.",
    )] = None,
    as_json: AsJson = False,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Processes.", rich_help_panel=SEARCH)] = 1,
    executor: Annotated[str | None, typer.Option(
        "--executor", metavar="dask:ADDRESS", help="Spread devices and sizes over a Dask cluster.", show_default=False,
        rich_help_panel=SEARCH,
    )] = None,
    **options: Any,
) -> None:
    """Compare every legal layout of MODEL for a load and its limits: the best, why, and what comes close."""
    from tensorcast.api import compare as run_comparison
    from tensorcast.search.compare import NoLayoutMeets

    if out is not None:
        from tensorcast.files import check_directory

        check_directory(out)  # before the work, not after
    sent, means = None, (4096, 1024)
    given = {"--requests": requests, "--percentile": percentile, "--replay-top": replay_top, "--skip-bad": skip_bad}
    check_beside("a --trace", trace is not None, given)
    if trace is not None:
        sent, means = _requests(trace, requests, images_per_request, skip_bad)
    # a number, or the name of a task
    accepted = float(mtp_acceptance) if mtp_acceptance.replace(".", "", 1).isdigit() else mtp_acceptance
    # options that are searched: lists of what was typed
    searched: dict[str, Any] = {name: split_names(options[name]) or None for name in SEVERAL_NAMES}
    searched |= {name: whole_numbers(flag, options[name]) if options[name] else None for name, flag in NUMBERS.items()}
    models = [model] if Path(model).exists() else split_names(model)
    lengths = whole_numbers("--input-len", input_len, 1) if input_len else [means[0]]
    ask = partial(
        run_comparison, device=listed_names("--device", device), world_size=whole_numbers("--world-size", world_size),
        output_len=output_len or means[1], ttft_s=duration("--ttft", ttft), tpot_s=duration("--tpot", tpot),
        objective=objective, engine=listed_names("--engine", engine), layouts=layouts_of(layouts) if layouts else None,
        modes=listed_names("--mode", mode), request_rate=request_rate, users=users, budget=budget,
        confidence=confidence, prices=device_prices(price) if price else None, prefix_cached=prefix_cached,
        mtp_acceptance=accepted, full=full, runnable_only=not any_engine, jobs=jobs, executor=executor,
        decode_device=decode_device, decode_world_size=decode_world_size,
        images_per_request=images_per_request, image_size=image_size, encoder_tp_mode=encoder_tp_mode,
        **options | searched,
    )  # fmt: skip
    if len(models) * len(lengths) > 1:
        from tensorcast.cli.several import compare_several

        if sent is not None:
            raise InputError(f"--trace {trace}: is of one model and its own lengths")
        if ffn_apart or encoder_gpus:
            raise InputError(f"{'--ffn-apart' if ffn_apart else '--encoder-gpus'}: is of one model and one length")
        questions = [(name, length) for name in models for length in lengths]
        compare_several(lambda name, length: ask(model=name, input_len=length), questions, out, as_json)
        return
    with patience(model, "comparing layouts of"):
        try:
            found = ask(model=model, input_len=lengths[0])
        except NoLayoutMeets as error:  # the report says so, too; it is still the same error
            if out is not None and _written(error.comparison, out):
                raise NoLayoutMeets(f"{error}; all candidates are in {out}", error.comparison) from None
            raise
        replayed, written = _replayed(found, sent, replay_top, percentile, out)
        split = _apart(found, ffn_apart, encoder_gpus) if ffn_apart or encoder_gpus else []
    if as_json:
        from tensorcast.report.compare.terminal import comparison_record
        from tensorcast.report.plain import to_json

        beside = {name: [one.record() for one in some] for name, some, _ in split}
        typer.echo(to_json(comparison_record(found, replayed) | beside, indent=2))
        return
    from tensorcast.report.compare.terminal import print_comparison

    print_comparison(found, console(), top)
    if replayed is not None:
        from tensorcast.report.compare.replayed import print_replayed

        print_replayed(found, replayed, console())
    for _, some, show in split:
        show(some, console())
    if written:
        typer.echo(f"wrote {len(written)} files to {out}: open {out / 'report.html'}")  # type: ignore[operator]


def _apart(found: Comparison, ffn: bool, encoders: str | None) -> list[tuple[str, list[Any], Any]]:
    """Parts of the model on GPUs of their own, where they are asked about: a name, what was found, what prints it."""
    from tensorcast.api import compare_apart, compare_encoders

    asked = list[tuple[str, list[Any], Any]]()
    if ffn:
        from tensorcast.report.ffn_apart import print_splits

        asked.append(("ffn_apart", compare_apart(found), partial(print_splits, tpot_s=found.targets[1])))
    if encoders:
        from tensorcast.report.encoder import print_encoder_splits

        numbers = None if encoders == "auto" else whole_numbers("--encoder-gpus", encoders, 1)
        asked.append(("encoders_apart", compare_encoders(found, numbers), print_encoder_splits))
    return asked


def _requests(
    trace: Path, count: int | None, images: int | None, skip_bad: bool
) -> tuple[Requests, tuple[int, int]]:
    """Requests to replay, and the lengths of prompts and replies to compare for."""
    if images is not None:
        raise InputError(f"--images-per-request {images}: is of steady loads, not of a --trace")
    from tensorcast.scheduling.trace_files import read_trace

    read = read_trace(trace, skip_bad)
    if read.skipped:
        typer.echo(f"note: {read.skipped} rows of {trace} could not be read", err=True)
    found = read.requests
    found = found if count is None else found.first(count)
    return found, (max(1, round(float(found.input_len.mean()))), max(1, round(float(found.output_len.mean()))))


def _replayed(
    found: Comparison, sent: Requests | None, top: int | None, percentile: float | None, out: Path | None
) -> tuple[ReplayedComparison | None, list[Path]]:
    """The best layouts under a trace, where there is one, and the files that are written, also where none fits."""
    if sent is None:
        return None, [] if out is None else _written(found, out)
    from tensorcast.search.replayed import TOP, replay_best

    replayed = None
    try:
        replayed = replay_best(found, sent, top=top or TOP, percentile=percentile)
    finally:
        written = [] if out is None else _written(found, out, replayed)
    return replayed, written


def _written(found: Comparison, out: Path, replayed: ReplayedComparison | None = None) -> list[Path]:
    from tensorcast.report.compare.files import write_comparison

    return write_comparison(found, out, replayed=replayed)
