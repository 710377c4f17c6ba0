"""``tensorcast launch``: the commands that start a layout under a serving engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from tensorcast.cli.app import CHOICES, DEPLOYMENT, OUTPUT, WORK, app
from tensorcast.cli.options import Device, DualBatchOverlap, KVDtype, Model, MTPDepth, RedundantExperts
from tensorcast.errors import InputError

EXAMPLES = """[bold]Examples[/bold]

[dim]DeepSeek-V3 on four nodes, attention data-parallel, 8 experts per GPU: a command per node[/dim]

tensorcast launch deepseek-v3 -d h200 -n 32 --layout tp1-dp32-ep32 --engine sglang --batch 128

[dim]One node, two tokens drafted per step[/dim]

tensorcast launch deepseek-v3 -d h200 --layout tp8-ep8 --engine vllm --batch 64 --mtp-depth 2

[dim]The decode half of a disaggregated deployment; trtllm-serve reads its options from a file[/dim]

tensorcast launch deepseek-v3 -d h200 --layout dp8-ep8 --engine trtllm --batch 128 --role decode

[dim]Which release and file every flag was read from[/dim]

tensorcast launch qwen3-235b-a22b -d h100 --layout tp8 --batch 32 --json | jq .flags"""


@app.command(epilog=EXAMPLES)
def launch(
    model: Model,
    device: Device,
    layout: Annotated[str, typer.Option(
        "--layout", "-l", metavar="tpN-dpN-epN-ppN", help="Sizes of the parallel groups; one left out is 1.",
        show_default=False, rich_help_panel=DEPLOYMENT,
    )],
    world_size: Annotated[int | None, typer.Option(
        "--world-size", "-n", help="GPUs in all.  [dim]\\[default: tp*dp*pp][/dim]", show_default=False,
        rich_help_panel=DEPLOYMENT,
    )] = None,
    gpus_per_node: Annotated[int, typer.Option(
        "--gpus-per-node", min=1, help="GPUs of one machine (4 on GB200 NVL72).", rich_help_panel=DEPLOYMENT,
    )] = 8,
    role: Annotated[str | None, typer.Option(
        "--role", metavar="prefill|decode", help="Half of a disaggregated deployment.  [dim]\\[default: both][/dim]",
        show_default=False, rich_help_panel=DEPLOYMENT,
    )] = None,
    batch: Annotated[int, typer.Option(
        "--batch", "-b", min=1, help="Most sequences [bold]per data-parallel rank[/bold].", rich_help_panel=WORK,
    )] = 1,
    input_len: Annotated[int, typer.Option(
        "--input-len", "-i", min=1, help="Longest prompt in tokens.", rich_help_panel=WORK,
    )] = 4096,
    output_len: Annotated[int, typer.Option(
        "--output-len", min=1, help="Longest answer in tokens.", rich_help_panel=WORK,
    )] = 1024,
    chunk: Annotated[int | None, typer.Option(
        "--prefill-chunk", min=1, help="Prompt tokens per step and rank.  [dim]\\[default: the engine's][/dim]",
        show_default=False, rich_help_panel=WORK,
    )] = None,
    engine: Annotated[str, typer.Option(
        "--engine", "-e", metavar="NAME", help="vllm, sglang or trtllm.", rich_help_panel=CHOICES,
    )] = "vllm",
    quant: Annotated[str | None, typer.Option(
        "--quant", metavar="SCHEME", help="Quantise weights at load.  [dim]\\[default: as the model ships][/dim]",
        show_default=False, rich_help_panel=CHOICES,
    )] = None,
    kv_dtype: KVDtype = None,
    all2all: Annotated[str, typer.Option(
        "--all2all", metavar="KIND", rich_help_panel=CHOICES,
        help="How tokens reach their experts at dp > 1: allgather_reducescatter, high_throughput, low_latency, auto.",
    )] = "auto",
    redundant_experts: RedundantExperts = 0,
    mtp_depth: MTPDepth = 0,
    dual_batch_overlap: DualBatchOverlap = False,
    as_json: Annotated[bool, typer.Option(
        "--json", help="Print JSON alone: commands, files, every flag with version and source.", rich_help_panel=OUTPUT,
    )] = False,
) -> None:
    """Print the commands that start MODEL in a layout, one per node, ready for a shell."""
    from tensorcast.api import device_profile
    from tensorcast.deploy.layout import ALL2ALL, check, parse_layout
    from tensorcast.deploy.model_names import named_model
    from tensorcast.deploy.options import Options
    from tensorcast.deploy.plan.rank_tables import traced_table
    from tensorcast.launch.launch import launch as write
    from tensorcast.launch.launch import script, with_room

    if role not in (None, "prefill", "decode"):
        raise InputError(f"--role {role!r}: must be prefill or decode")
    if all2all not in ALL2ALL:
        raise InputError(f"--all2all {all2all!r}: choose one of {', '.join(ALL2ALL)}")
    chosen, gpu = parse_layout(layout, world_size), device_profile(device)
    profile, read_as = named_model(model)
    check(chosen, traced_table(profile, role or "decode").facts, gpu)  # of a decoder: nothing else is traced
    options = Options(
        quant=quant, kv_dtype=kv_dtype, all2all=all2all, redundant_experts=redundant_experts, mtp_depth=mtp_depth,
        dual_batch_overlap=dual_batch_overlap,
    )
    found = write(
        engine, profile, chosen, options, batch=batch, input_len=input_len, output_len=output_len, chunk_tokens=chunk,
        gpus_per_node=gpus_per_node, role=role, device=gpu,
    )
    if found.problem:
        raise InputError(f"{found.engine} {found.version} cannot run {chosen}: {found.problem}")
    found = with_room(found, profile, gpu, chosen, options, role=role, batch=batch, length=input_len + output_len)
    if read_as:
        found = replace(found, notes=(*found.notes, read_as))
    if as_json:
        from tensorcast.report.plain import to_json

        typer.echo(to_json(found.record(), indent=2))
        return
    typer.echo(script(found))
