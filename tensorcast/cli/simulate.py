"""``tensorcast simulate``: one step of one deployment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tensorcast.cli.app import CHOICES, DEPLOYMENT, OUTPUT, WORK, app, console, patience
from tensorcast.cli.options import (
    Combine,
    Dispatch,
    DualBatchOverlap,
    ExternalSharedExperts,
    KVDtype,
    Model,
    MTPDepth,
    Phase,
    SharedExpertTP,
)

EXAMPLES = """[bold]Examples[/bold]

[dim]DeepSeek-V3 decoding on 32 GPUs: attention data-parallel, 8 experts per GPU[/dim]

tensorcast simulate deepseek-v3 -d h200 -n 32 --dp 32 --ep 32 --batch 128

[dim]A prompt of 4096 tokens on one node, everything tensor-parallel but the experts[/dim]

tensorcast simulate qwen3-235b-a22b -d h100 -n 8 --ep 8 --phase prefill

[dim]Some experts busier than others; tables, CSV and a trace for Perfetto in out/[/dim]

tensorcast simulate gpt-oss-120b -d h100 -n 2 --routing zipf:0.8 --out out

[dim]Your own model directory, as JSON for scripts[/dim]

tensorcast simulate ./my-model -d b200 --json | jq .step_s"""


@app.command(epilog=EXAMPLES)
def simulate(
    model: Model,
    device: Annotated[str, typer.Option(
        "--device", "-d", help="Name (see [bold]tensorcast devices[/bold]) or profile file; cpu is this machine.",
        show_default=False, rich_help_panel=DEPLOYMENT,
    )],
    world_size: Annotated[int, typer.Option(
        "--world-size", "-n", min=1, help="GPUs in all: tp*dp*pp.", rich_help_panel=DEPLOYMENT,
    )] = 1,
    tp: Annotated[int | None, typer.Option(
        "--tp", min=1, help="Tensor-parallel GPUs.  [dim]\\[default: what dp and pp leave][/dim]", show_default=False,
        rich_help_panel=DEPLOYMENT,
    )] = None,
    dp: Annotated[int, typer.Option(
        "--dp", min=1, help="Data-parallel replicas of attention.", rich_help_panel=DEPLOYMENT,
    )] = 1,
    ep: Annotated[int, typer.Option(
        "--ep", min=1, rich_help_panel=DEPLOYMENT,
        help="Expert-parallel groups, a divisor of tp*dp: whole experts are dealt out to them. At 1 every expert is "
        "cut over tp*dp GPUs.",
    )] = 1,
    pp: Annotated[int, typer.Option("--pp", min=1, help="Pipeline stages.", rich_help_panel=DEPLOYMENT)] = 1,
    phase: Phase = "decode",
    batch: Annotated[int, typer.Option(
        "--batch", "-b", min=1, help="Sequences [bold]per data-parallel rank[/bold]: dp times as many in all.",
        rich_help_panel=WORK,
    )] = 1,
    context: Annotated[int | None, typer.Option(
        "--context", "-c", help="Cached tokens per sequence.  [dim]\\[default: 4096 in decode, 0 in prefill][/dim]",
        show_default=False, rich_help_panel=WORK,
    )] = None,
    input_len: Annotated[int | None, typer.Option(
        "--input-len", "-i", help="New tokens per sequence.  [dim]\\[default: 4096 in prefill; 1 in decode][/dim]",
        show_default=False, rich_help_panel=WORK,
    )] = None,
    engine: Annotated[str, typer.Option(
        "--engine", "-e", metavar="NAME",
        help="vllm, sglang, trtllm, eager (see [bold]tensorcast engines[/bold]) or a profile file.",
        rich_help_panel=CHOICES,
    )] = "vllm",
    quant: Annotated[str | None, typer.Option(
        "--quant", metavar="SCHEME",
        help="Weights: bf16, fp8, fp8_block, int8, w4a16, w4a16_g32, mxfp4 or nvfp4, or apart as "
        "linear=bf16,experts=mxfp4.  [dim]\\[default: as the model ships][/dim]",
        show_default=False, rich_help_panel=CHOICES,
    )] = None,
    kv_dtype: KVDtype = None,
    routing: Annotated[str, typer.Option(
        "--routing", metavar="LAW", rich_help_panel=CHOICES,
        help="How tokens fall on experts: balanced, uniform, zipf:S, or a CSV of counts per expert.",
    )] = "balanced",
    fusion: Annotated[str, typer.Option(
        "--fusion", metavar="engine|none", help="Fuse kernels as the engine does, or not at all.",
        rich_help_panel=CHOICES,
    )] = "engine",
    all2all: Annotated[str, typer.Option(
        "--all2all", metavar="KIND",
        help="How tokens reach their experts at dp > 1: allgather_reducescatter, high_throughput, low_latency, direct, "
        "or auto, the engine's.",
        rich_help_panel=CHOICES,
    )] = "auto",
    dispatch: Dispatch = None,
    combine: Combine = None,
    redundant_experts: Annotated[int, typer.Option(
        "--redundant-experts", min=0, rich_help_panel=CHOICES,
        help="Copies of experts in each MoE layer, over all expert-parallel groups.",
    )] = 0,
    placement: Annotated[str, typer.Option(
        "--placement", metavar="POLICY", rich_help_panel=CHOICES,
        help="Which group holds which experts: linear, round_robin, or eplb, balanced for --routing.",
    )] = "linear",
    experts_backend: Annotated[str, typer.Option(
        "--experts-backend", metavar="NAME", rich_help_panel=CHOICES,
        help="How expert matmuls run: grouped_mm, batched_mm, eager, contiguous, masked, or auto; by phase as "
        "prefill=contiguous,decode=masked.",
    )] = "auto",
    shared_expert_tp: SharedExpertTP = True,
    external_shared_experts: ExternalSharedExperts = 0,
    dual_batch_overlap: DualBatchOverlap = False,
    mtp_depth: MTPDepth = 0,
    chunk_tokens: Annotated[int, typer.Option(
        "--chunk-tokens", min=0, rich_help_panel=CHOICES,
        help="Tokens that pass the experts at a time; 0 is all.",
    )] = 0,
    allow_oversize: Annotated[bool, typer.Option(
        "--allow-oversize", help="Price a batch that does not fit into memory.", rich_help_panel=CHOICES,
    )] = False,
    top: Annotated[int, typer.Option(
        "--top", min=0, help="Costliest ops to list.", rich_help_panel=OUTPUT,
    )] = 20,
    out: Annotated[Path | None, typer.Option(
        "--out", "-o", metavar="DIR", show_default=False, rich_help_panel=OUTPUT,
        help="Also write report.md, ops.csv, summary.json and trace.json (for Perfetto) there.",
    )] = None,
    as_json: Annotated[bool, typer.Option(
        "--json", help="Print JSON alone: totals and all ops, units in the names.", rich_help_panel=OUTPUT,
    )] = False,
) -> None:
    """Simulate one step of MODEL: its time, its memory, and the ops that cost it."""
    from tensorcast.api import simulate as run_simulation
    from tensorcast.files import check_directory
    from tensorcast.report.simulate.files import write_report

    if out is not None:
        check_directory(out)  # before minutes of work, not after
    with patience(model):
        run = run_simulation(
            model, device=device, world_size=world_size, tp=tp, dp=dp, ep=ep, pp=pp, phase=phase, batch=batch,
            input_len=input_len, context=context, engine=engine, quant=quant, kv_dtype=kv_dtype, routing=routing,
            fusion=fusion, all2all=all2all, dispatch=dispatch, combine=combine, redundant_experts=redundant_experts,
            placement=placement, experts_backend=experts_backend, shared_expert_tp=shared_expert_tp,
            external_shared_experts=external_shared_experts, dual_batch_overlap=dual_batch_overlap,
            mtp_depth=mtp_depth, chunk_tokens=chunk_tokens, allow_oversize=allow_oversize,
        )
        written = write_report(run, out, top) if out is not None else []
    if as_json:
        from tensorcast.report.plain import to_json
        from tensorcast.report.simulate.rows import records

        typer.echo(to_json({**run.totals(), "ops": records(run)}, indent=2))
        return
    from tensorcast.report.simulate.terminal import print_simulation

    print_simulation(run, console(), top)
    if written:
        names = [path.name for path in written]
        typer.echo(f"wrote {', '.join(names[:-1])} and {names[-1]} to {out}")
