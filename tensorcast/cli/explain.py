"""``tensorcast explain``: two layouts at the same load, op group by op group."""

from __future__ import annotations

from typing import Annotated, Any

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
)
from tensorcast.deploy.options import SERVED_ROUTING
from tensorcast.errors import InputError

EXAMPLES = """[bold]Examples[/bold]

[dim]Why data-parallel attention? At the largest batch that fits in both[/dim]

tensorcast explain deepseek-v3 -d h200 -n 32 --layout tp1-dp32-ep32 --versus tp8-dp4-ep32

[dim]At 16 sequences per data-parallel rank of the first, and as many in all of the second[/dim]

tensorcast explain deepseek-v3 -d h200 -n 32 --layout dp32-ep32 --versus tp8-dp4-ep32 --batch 16

[dim]Prompts of 8192 tokens: experts whole, or cut?[/dim]

tensorcast explain qwen3-235b-a22b -d h100 -n 8 --layout tp8-ep8 --versus tp8 --phase prefill -b 1 -i 8192

[dim]A comparison's winner, with the options that it was priced with[/dim]

tensorcast explain deepseek-v3 -d h200 -n 32 -e sglang -l dp32-ep32 -v tp8-dp4-ep32 --all2all low_latency
--dual-batch-overlap"""


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
    world_size: Annotated[int, typer.Option(
        "--world-size", "-n", min=1, help="GPUs of either layout.", show_default=False, rich_help_panel=DEPLOYMENT,
    )],
    layout: Annotated[str, typer.Option(
        "--layout", "-l", metavar=LAYOUT, help="The first, A; a size left out is 1.", show_default=False,
        rich_help_panel=DEPLOYMENT,
    )],
    versus: Annotated[str, typer.Option(
        "--versus", "-v", metavar=LAYOUT, help="The second, B.", show_default=False,
        rich_help_panel=DEPLOYMENT,
    )],
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
    engine: Engine = "vllm",
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Explain why layout A of MODEL is faster or slower than B, and what would help each."""
    from tensorcast.api import explain as run_explanation

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
