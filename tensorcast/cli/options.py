"""Arguments and options that several commands take, declared once; ``=`` in a signature gives the default."""

from __future__ import annotations

from typing import Annotated

import typer

from tensorcast.cli.app import CHOICES, DEPLOYMENT, WORK

Model = Annotated[str, typer.Argument(
    help="Name (see [bold]tensorcast models[/bold]), profile file, directory with a Hugging Face config.json, or a "
    "shipped one's checkpoint, as nvidia/DeepSeek-R1-0528-NVFP4.",
    show_default=False,
)]
Device = Annotated[str, typer.Option(
    "--device", "-d", help="Name (see [bold]tensorcast devices[/bold]) or profile file.", show_default=False,
    rich_help_panel=DEPLOYMENT,
)]
Phase = Annotated[str, typer.Option(
    "--phase", metavar="prefill|decode", help="Read prompts, or make one token per sequence.", rich_help_panel=WORK,
)]
Engine = Annotated[str, typer.Option(
    "--engine", "-e", metavar="NAME", help="vllm, sglang, trtllm or a profile file.", rich_help_panel=CHOICES,
)]
KVDtype = Annotated[str | None, typer.Option(
    "--kv-dtype", metavar="bf16|fp8", help="KV cache.  [dim]\\[default: the model's][/dim]", show_default=False,
    rich_help_panel=CHOICES,
)]
Dispatch = Annotated[str | None, typer.Option(
    "--dispatch", metavar="SCHEME", show_default=False, rich_help_panel=CHOICES,
    help="What tokens are sent in, such as bf16 or fp8_block.  [dim]\\[default: as the experts read them][/dim]",
)]
Combine = Annotated[str | None, typer.Option(
    "--combine", metavar="SCHEME", show_default=False, rich_help_panel=CHOICES,
    help="What results come back in, such as fp8_block, or logfmt10 at low_latency.  [dim]\\[default: bf16][/dim]",
)]
RedundantExperts = Annotated[int, typer.Option(
    "--redundant-experts", min=0, help="Copies of experts in each MoE layer.", rich_help_panel=CHOICES,
)]
SharedExpertTP = Annotated[bool, typer.Option(
    "--shared-expert-tp/--no-shared-expert-tp", rich_help_panel=CHOICES,
    help="Cut shared experts over tp, or keep them whole on every GPU.",
)]
ExternalSharedExperts = Annotated[int, typer.Option(
    "--external-shared-experts", min=0, rich_help_panel=CHOICES,
    help="Expert-parallel groups that hold only the shared expert.",
)]
DualBatchOverlap = Annotated[bool, typer.Option(
    "--dual-batch-overlap", rich_help_panel=CHOICES,
    help="Two half batches: one computes while the other exchanges tokens.",
)]
MTPDepth = Annotated[int, typer.Option(
    "--mtp-depth", min=0, help="Tokens drafted per sequence and step.", rich_help_panel=CHOICES,
)]
