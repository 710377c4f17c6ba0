"""``tensorcast explain``: two layouts at the same load, op group by op group; or which limits are broken and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorcast.cli.app import DEPLOYMENT, WORK, AsJson, command, console, patience
from tensorcast.cli.options import (
    LAYOUT,
    Context,
    Device,
    Engine,
    Model,
    NewTokens,
    Phase,
    deployment_options,
    time_limit,
)
from tensorcast.cli.values import check_beside, duration
from tensorcast.deploy.options import SERVED_ROUTING
from tensorcast.errors import InputError

if TYPE_CHECKING:
    from tensorcast.scheduling.requests import Requests

LIMITS = "Why limits are broken"

EXAMPLES = """[bold]Examples[/bold]

[dim]Why data-parallel attention? At the largest batch that fits in both[/dim]

tensorcast explain deepseek-v3 -d h200 -n 32 --layout tp1-dp32-ep32 --versus tp8-dp4-ep32

[dim]At 16 sequences per data-parallel rank of the first, and as many in all of the second[/dim]

tensorcast explain deepseek-v3 -d h200 -n 32 --layout dp32-ep32 --versus tp8-dp4-ep32 --batch 16

[dim]Prompts of 8192 tokens: experts whole, or cut?[/dim]

tensorcast explain qwen3-235b-a22b -d h100 -n 8 --layout tp8-ep8 --versus tp8 --phase prefill -b 1 -i 8192

[dim]A comparison's winner, with the options that it was priced with[/dim]

tensorcast explain deepseek-v3 -d h200 -n 32 -e sglang -l dp32-ep32 -v tp8-dp4-ep32 --all2all low_latency
--dual-batch-overlap

[dim]Which requests of a trace break a limit, and by what: queue, own prompt, others' prompts, starting over[/dim]

tensorcast explain deepseek-v3 -d h200 -l "4 x tp8-ep8" -v "3 x tp8 > tp8" --trace mooncake.jsonl.gz --ttft 5s
--tpot 40ms

[dim]Why this one is too slow for 300 users who are always there[/dim]

tensorcast explain deepseek-v3 -d h200 -l "4 x tp8-ep8" --users 300 --ttft 500ms --tpot 40ms"""


@command(epilog=EXAMPLES)
@deployment_options(
    "quant", "kv_dtype", "state_dtype", "routing", "all2all", "dispatch", "combine", "placement", "redundant_experts",
    "shared_expert_tp", "shared_experts_fusion", "external_shared_experts", "dual_batch_overlap", "mtp_depth",
    "speculative_method", "draft_model", "dcp", "pp_partition", "experts_kernels", "attention_kernels",
    defaults={"routing": SERVED_ROUTING},
    quant="Weights, as in simulate; this and what follows holds for B as far as it applies to it.",
)
def explain(
    model: Model,
    *,
    device: Device,
    world_size: Annotated[int | None, typer.Option(
        "--world-size", "-n", min=1, help="GPUs of either layout.", show_default=False, rich_help_panel=DEPLOYMENT,
    )] = None,
    layout: Annotated[str, typer.Option(
        "--layout", "-l", metavar=LAYOUT, help="The first, A; a size left out is 1.", show_default=False,
        rich_help_panel=DEPLOYMENT,
    )],
    versus: Annotated[str | None, typer.Option(
        "--versus", "-v", metavar=LAYOUT, help="The second, B; of limits there may be none.", show_default=False,
        rich_help_panel=DEPLOYMENT,
    )] = None,
    phase: Phase = "decode",
    batch: Annotated[int | None, typer.Option(
        "--batch", "-b", min=1, show_default=False, rich_help_panel=WORK,
        help="Sequences per data-parallel rank of A; B gets as many in all.  [dim]\\[default: most that fit in both]"
        "[/dim]",
    )] = None,
    context: Context = None,
    input_len: NewTokens = None,
    output_len: Annotated[int | None, typer.Option(
        "--output-len", "-o", min=1, show_default=False, rich_help_panel=WORK,
        help="Tokens of a reply: decode is then priced halfway through, after input-len + output-len / 2 cached ones.",
    )] = None,
    ttft: Annotated[str | None, time_limit("--ttft", LIMITS)] = None,
    tpot: Annotated[str | None, time_limit("--tpot", LIMITS)] = None,
    e2e: Annotated[str | None, time_limit("--e2e", LIMITS)] = None,
    users: Annotated[int | None, typer.Option(
        "--users", "-u", min=1, show_default=False, rich_help_panel=LIMITS,
        help="Users who are always there: means, as [bold]compare[/bold] has them.",
    )] = None,
    rate: Annotated[float | None, typer.Option(
        "--rate", min=0, show_default=False, rich_help_panel=LIMITS,
        help="Requests per second that come at random, each replayed; a trace is stretched to it.",
    )] = None,
    trace: Annotated[Path | None, typer.Option(
        "--trace", "-t", metavar="FILE", show_default=False, rich_help_panel=LIMITS,
        help="These requests, each replayed (as in [bold]replay[/bold]).",
    )] = None,
    requests: Annotated[int | None, typer.Option(
        "--requests", "-r", min=1, show_default=False, rich_help_panel=LIMITS,
        help="The first so many of the trace, or so many drawn.  [dim]\\[default: all, 1000][/dim]",
    )] = None,
    skip_bad: Annotated[bool, typer.Option(
        "--skip-bad", help="Leave rows of the trace out that cannot be read, and count them.", rich_help_panel=LIMITS,
    )] = False,
    chunk: Annotated[int | None, typer.Option(
        "--prefill-chunk", min=1, show_default=False, rich_help_panel=LIMITS,
        help="Prompt tokens per step and rank.  [dim]\\[default: the engine's][/dim]",
    )] = None,
    engine: Engine = "vllm",
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Explain why layout A of MODEL is faster or slower than B, and what would help each; or why limits are broken."""
    from tensorcast.api import explain as run_explanation

    limits = {
        name: duration(f"--{flag}", text)
        for flag, name, text in (("ttft", "ttft_s", ttft), ("tpot", "tpot_s", tpot), ("e2e", "request_s", e2e))
    }
    load = {"--users": users, "--rate": rate, "--trace": trace, "--requests": requests, "--prefill-chunk": chunk}
    load |= {"--skip-bad": skip_bad}
    check_beside("limits: --ttft, --tpot or --e2e", any(limits.values()), load)
    if any(limits.values()):
        check_beside("one step", False, {"--batch": batch, "--context": context})
        check_beside("a --trace", trace is not None, {"--skip-bad": skip_bad})
        lengths = input_len or 4096, output_len or 1024
        sent = _sent(trace, rate, users, requests, lengths, skip_bad=skip_bad)
        asked: dict[str, Any] = {"device": device, "engine": engine, "prefill_chunk": chunk, **limits, **options}
        asked |= {"users": users, "input_len": lengths[0], "output_len": lengths[1]} if sent is None else {
            "requests": sent
        }  # fmt: skip
        _limits(model, [layout, *([] if versus is None else [versus])], world_size, asked, as_json)
        return
    for flag, needed in (("--world-size", world_size), ("--versus", versus)):
        if needed is None:
            raise InputError(f"{flag}: is needed, but for limits (--ttft, --tpot, --e2e)")
    assert world_size is not None and versus is not None
    if output_len is not None:
        if phase == "prefill" or context is not None:
            beside = "--phase prefill: a reply is decoded" if phase == "prefill" else f"--context {context}: give one"
            raise InputError(f"--output-len {output_len} does not go with {beside}")
        context, input_len = (input_len or 4096) + output_len // 2, None
    with patience(model, "explaining two layouts of"):
        why = run_explanation(
            model, device=device, world_size=world_size, layout=layout, versus=versus, phase=phase, batch=batch,
            context=context, input_len=input_len, engine=engine, **options,
        )
    if as_json:
        from tensorcast.report.explain import explanation_record
        from tensorcast.report.plain import to_json

        typer.echo(to_json(explanation_record(why), indent=2))
        return
    from tensorcast.report.explain import print_explanation

    print_explanation(why, console())


def _sent(
    trace: Path | None, rate: float | None, users: int | None, count: int | None, lengths: tuple[int, int], *,
    skip_bad: bool,
) -> Requests | None:
    """Requests to replay; None for users who are always there."""
    if users is not None:
        check_beside("requests: --trace or --rate", False, {"--requests": count})
        if trace is not None or rate is not None:
            raise InputError(f"--users {users}: are always there; --trace and --rate send requests when these say")
        return None
    from tensorcast.scheduling.requests import Length, drawn
    from tensorcast.scheduling.sweep import sent_at
    from tensorcast.scheduling.trace_files import read_trace

    if trace is None and rate is None:
        raise InputError("limits: need a load, one of --trace FILE, --rate N and --users N")
    if trace is None:
        return drawn(count or 1000, Length(lengths[0]), Length(lengths[1]), rate=rate)
    read = read_trace(trace, skip_bad)
    if read.skipped:
        typer.echo(f"note: {read.skipped} rows of {trace} could not be read", err=True)
    found = read.requests
    found = found if count is None else found.first(count)
    return sent_at(found, [] if rate is None else [rate])[0].requests


def _limits(model: str, layouts: list[str], world_size: int | None, asked: dict[str, Any], as_json: bool) -> None:
    from tensorcast.api import explain_limits
    from tensorcast.report.limits import limits_record, print_limits
    from tensorcast.scheduling.pools import filling

    with patience(model, "explaining limits of"):
        found = [
            explain_limits(model, layout=one if world_size is None else filling(one, world_size), **asked)
            for one in layouts
        ]
    if as_json:
        from tensorcast.report.plain import to_json

        typer.echo(to_json(limits_record(found), indent=2))
    else:
        print_limits(found, console())
