"""``tensorcast experts``: what balancing experts would bring, by recorded routing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tensorcast.cli.app import DEPLOYMENT, OUTPUT, SEARCH, WORK, AsJson, command, console, patience
from tensorcast.cli.options import (
    LAYOUT,
    Context,
    Device,
    Engine,
    Model,
    NewTokens,
    Phase,
    deployment_options,
)
from tensorcast.cli.values import whole_numbers

EXAMPLES = """[bold]Examples[/bold]

[dim]What EPLB and redundant experts bring DeepSeek-R1, by the shipped popularity[/dim]

tensorcast experts deepseek-r1 -d h200 -n 32 --layout dp32-ep32 -e sglang

[dim]By your own recording, with figures, and the placement as SGLang and TensorRT-LLM take it[/dim]

tensorcast experts deepseek-r1 -d h200 -n 32 --layout dp32-ep32 -e sglang --routing recorded:dump.pt --out balance

[dim]Prompts; how much is lost where yesterday's counts placed the experts[/dim]

tensorcast experts deepseek-r1 -d h200 -n 32 --layout dp32-ep32 --phase prefill --routing recorded:today.json
--placed-by yesterday.json"""


@command(epilog=EXAMPLES)
@deployment_options(
    "quant", "kv_dtype", "state_dtype", "routing", "all2all", "external_shared_experts", "dual_batch_overlap",
    "mtp_depth",
    defaults={"routing": "recorded:deepseek-r1"},
    routing="How tokens fall on experts, as counted: recorded:FILE (of SGLang, TensorRT-LLM, or a CSV), several as "
    "recorded:A,B or recorded:prefill=A,decode=B, or a shipped one, recorded:NAME.",
)
def experts(
    model: Model,
    *,
    device: Device,
    world_size: Annotated[int, typer.Option(
        "--world-size", "-n", min=1, help="GPUs in all.", show_default=False, rich_help_panel=DEPLOYMENT,
    )],
    layout: Annotated[str, typer.Option(
        "--layout", "-l", metavar=LAYOUT, help="A size left out is 1.", show_default=False, rich_help_panel=DEPLOYMENT,
    )],
    phase: Phase = "decode",
    batch: Annotated[int | None, typer.Option(
        "--batch", "-b", min=1, show_default=False, rich_help_panel=WORK,
        help="Sequences per data-parallel rank.  [dim]\\[default: most that fit with every placement][/dim]",
    )] = None,
    context: Context = None,
    input_len: NewTokens = None,
    copies: Annotated[str | None, typer.Option(
        "--redundant-experts", metavar="N,...", show_default=False, rich_help_panel=SEARCH,
        help="Copies to try.  [dim]\\[default: none, and one, two, four more a rank][/dim]",
    )] = None,
    placed_by: Annotated[list[str], typer.Option(
        "--placed-by", metavar="FILE|NAME", show_default=False, rich_help_panel=SEARCH,
        help="Another recording, by which the experts might have been placed; again for more.  [dim]\\[default: the "
        "other phase][/dim]",
    )] = [],  # noqa: B006 - typer's way of an option that may be given again
    log: Annotated[Path | None, typer.Option(
        "--log", metavar="FILE", show_default=False, rich_help_panel=SEARCH,
        help="A server's log that says how even its ranks were (vLLM's log_balancedness, SGLang's): set beside.",
    )] = None,
    engine: Engine = "vllm",
    out: Annotated[Path | None, typer.Option(
        "--out", "-o", metavar="DIR", show_default=False, rich_help_panel=OUTPUT,
        help="Also write report.html, its figures, experts.json, and the placement for SGLang and TensorRT-LLM there.",
    )] = None,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Price placements of MODEL's experts by recorded routing: EPLB, copies, drift, and what moving them costs."""
    from tensorcast.api import experts as run
    from tensorcast.files import check_directory

    if out is not None:
        check_directory(out)
    tried = whole_numbers("--redundant-experts", copies, least=0) if copies else None
    with patience(model, "placing experts of"):
        found = run(
            model, device=device, world_size=world_size, layout=layout, phase=phase, batch=batch, context=context,
            input_len=input_len, engine=engine, copies=tried, others=placed_by,
            log=None if log is None else str(log), **options,
        )
        if out is not None:
            from tensorcast.report.experts.files import write_experts

            written = write_experts(found, out)
    if as_json:
        from tensorcast.report.experts.words import document
        from tensorcast.report.plain import to_json

        typer.echo(to_json(document(found), indent=2))
        return
    from tensorcast.report.experts.terminal import print_experts

    print_experts(found, console())
    if out is not None:
        typer.echo(f"wrote {', '.join(path.name for path in written)} to {out}")
