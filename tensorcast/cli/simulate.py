"""``tensorcast simulate``: one step of one deployment."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from tensorcast.cli.app import CHOICES, DEPLOYMENT, OUTPUT, WORK, command, console, patience
from tensorcast.cli.options import LAYOUT, Device, Model, deployment_options
from tensorcast.deploy.options import OPTIONS
from tensorcast.errors import InputError

EXAMPLES = """[bold]Examples[/bold]

[dim]DeepSeek-V3 decoding on 32 GPUs: attention data-parallel, 8 experts per GPU[/dim]

tensorcast simulate deepseek-v3 -d h200 -n 32 --dp 32 --ep 32 --batch 128

[dim]A prompt of 4096 tokens on one node, everything tensor-parallel but the experts[/dim]

tensorcast simulate qwen3-235b-a22b -d h100 -n 8 --ep 8 --phase prefill

[dim]Some experts busier than others; tables, CSV and a trace for Perfetto in out/[/dim]

tensorcast simulate gpt-oss-120b -d h100 -n 2 --routing zipf:0.8 --out out

[dim]Attention on 24 GPUs, experts on 8 others (AFD)[/dim]

tensorcast simulate deepseek-v3 -d h200 --dp 24 --ffn-gpus 8 --batch 64

[dim]Two images through the vision tower alone[/dim]

tensorcast simulate qwen3-vl-235b-a22b -d h200 --phase encode --images 2 --image-size 1280x720

[dim]Your own model directory, as JSON for scripts[/dim]

tensorcast simulate ./my-model -d b200 --json | jq .step_s"""


@command(epilog=EXAMPLES)
@deployment_options(*OPTIONS)
def simulate(
    model: Model,
    *,
    device: Device,
    world_size: Annotated[int | None, typer.Option(
        "--world-size", "-n", min=1, help="GPUs in all.  [dim]\\[default: tp*dp*pp][/dim]", show_default=False,
        rich_help_panel=DEPLOYMENT,
    )] = None,
    layout: Annotated[str | None, typer.Option(
        "--layout", "-l", metavar=LAYOUT, show_default=False, rich_help_panel=DEPLOYMENT,
        help="Instead of sizes one by one; of several servers one, of pools (2 x tp8@h100 > dp8-ep8) the phase's, on "
        "the device behind @, if there is one; with attention and FFN apart tp1-dp24 + ffn8.",
    )] = None,
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
    phase: Annotated[str, typer.Option(
        "--phase", metavar="prefill|decode|encode", rich_help_panel=WORK,
        help="Read prompts, make one token per sequence, or make embeddings of images.",
    )] = "decode",
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
        help="vllm, sglang, trtllm, eager (see [bold]tensorcast engines[/bold]) or a profile file; an older release as "
        "vllm==0.24.0.",
        rich_help_panel=CHOICES,
    )] = "vllm",
    ffn_gpus: Annotated[int | None, typer.Option(
        "--ffn-gpus", metavar="N", show_default=False, rich_help_panel=DEPLOYMENT,
        help="Decode with the FFN blocks apart: experts on N GPUs of their own, attention on tp*dp others.",
    )] = None,
    ffn_device: Annotated[str | None, typer.Option(
        "--ffn-device", metavar="NAME", help="Device of --ffn-gpus, if it is another one.", show_default=False,
        rich_help_panel=DEPLOYMENT,
    )] = None,
    micro_batches: Annotated[int | None, typer.Option(
        "--micro-batches", metavar="N", show_default=False, rich_help_panel=WORK,
        help="Parts of the batch that go to and fro between attention and --ffn-gpus.  [dim]\\[default: 2][/dim]",
    )] = None,
    images: Annotated[int | None, typer.Option(
        "--images", metavar="N", show_default=False, rich_help_panel=WORK,
        help="Images at once, of --phase encode.  [dim]\\[default: 1][/dim]",
    )] = None,
    image_size: Annotated[str | None, typer.Option(
        "--image-size", metavar="WxH", show_default=False, rich_help_panel=WORK,
        help="Pixels of each, as 1280x720, of --phase encode.",
    )] = None,
    encoder_tp_mode: Annotated[str | None, typer.Option(
        "--encoder-tp-mode", metavar="MODE", show_default=False, rich_help_panel=CHOICES,
        help="The tower on --tp GPUs: its weights cut over them, or each with all of it and images of its own (data)."
        "  [dim]\\[default: weights][/dim]",
    )] = None,
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
    **options: Any,
) -> None:
    """Simulate one step of MODEL: its time, its memory, and the ops that cost it."""
    from tensorcast.api import simulate as run_simulation
    from tensorcast.files import check_directory
    from tensorcast.report.simulate.files import write_report

    (layout, ffn_gpus), pooled = _named_split(layout, ffn_gpus), False
    if layout is not None:
        if (tp, dp, ep, pp) != (None, 1, 1, 1):
            raise InputError(f"--layout {layout}: says the sizes; leave out --tp, --dp, --ep and --pp")
        from tensorcast.scheduling.pools import parse_servers

        pool = parse_servers(layout)[0 if phase == "prefill" else -1]
        one, device, pooled = pool.layout, pool.named or device, pool.role != "both"
        tp, dp, ep, pp = one.tp, one.dp, one.ep, one.pp
    tower = {"--images": images, "--image-size": image_size, "--encoder-tp-mode": encoder_tp_mode}
    if phase == "encode":
        _simulate_encoder(
            model, as_json, top, tower, device=device, tp=tp, engine=engine, fusion=options["fusion"],
            beside={"--dp": dp - 1, "--ep": ep - 1, "--pp": pp - 1, "--batch": batch - 1, "--context": context,
                    "--input-len": input_len, "--ffn-gpus": ffn_gpus, "--out": out,
                    "--world-size": world_size if world_size != (tp or 1) else None},
        )  # fmt: skip
        return
    _of_others("--phase encode", tower)
    if ffn_gpus is not None:
        if (ep, pp, phase, input_len, out) != (1, 1, "decode", None, None):
            raise InputError(
                f"--ffn-gpus {ffn_gpus}: is of decode steps with attention on tp*dp GPUs; leave out --ep, --pp, "
                "--phase, --input-len and --out"
            )
        _simulate_apart(
            model, as_json, world_size, device=device, ffn_gpus=ffn_gpus, tp=tp or 1, dp=dp, batch=batch,
            context=4096 if context is None else context, engine=engine,
            micro_batches=2 if micro_batches is None else micro_batches, ffn_device=ffn_device,
            allow_oversize=allow_oversize, **options,
        )  # fmt: skip
        return
    _of_others("--ffn-gpus", {"--ffn-device": ffn_device, "--micro-batches": micro_batches})
    if out is not None:
        check_directory(out)  # before minutes of work, not after
    with patience(model):
        run = run_simulation(
            model, device=device, world_size=world_size, tp=tp, dp=dp, ep=ep, pp=pp, phase=phase, batch=batch,
            input_len=input_len, context=context, engine=engine, pooled=pooled, allow_oversize=allow_oversize,
            **options,
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


def _of_others(other: str, said: dict[str, Any]) -> None:
    """Raise :class:`InputError` on the first value that only ``other`` has a meaning for."""
    for flag, value in said.items():
        if value is not None:
            raise InputError(f"{flag} {value}: is of {other}, and none is given")


def _simulate_encoder(
    model: str, as_json: bool, top: int, tower: dict[str, Any], *, beside: dict[str, Any], tp: int | None, **asked: Any
) -> None:
    """Images through the vision tower alone. ``beside``: what must not be said, with it."""
    from tensorcast.api import simulate_encoder
    from tensorcast.report.encoder import print_encode

    if said := [name for name, value in beside.items() if value]:
        raise InputError(f"{said[0]}: is not of --phase encode, images through the vision tower on --tp GPUs")
    if tower["--image-size"] is None:
        raise InputError("--phase encode: say how large images are, as in --image-size 1280x720")
    with patience(model):
        step = simulate_encoder(
            model, image_size=tower["--image-size"], images=1 if tower["--images"] is None else tower["--images"],
            encoder_tp_mode=tower["--encoder-tp-mode"] or "weights", tp=1 if tp is None else tp, **asked,
        )
    print_encode(step, console(), top, as_json)


def _named_split(layout: str | None, ffn_gpus: int | None) -> tuple[str | None, int | None]:
    """The attention side's layout and the GPUs of the FFN side, of a name such as ``tp1-dp24 + ffn8``."""
    split = re.fullmatch(r"(.*?)\s*\+\s*ffn(\d+)", layout.strip()) if layout is not None else None
    if split is None:
        return layout, ffn_gpus
    if ffn_gpus is not None:
        raise InputError(f"--layout {layout}: says the GPUs of the FFN side; leave out --ffn-gpus")
    return split[1], int(split[2])


def _simulate_apart(model: str, as_json: bool, world_size: int | None, **asked: Any) -> None:
    """A step with attention and FFN on GPUs of their own; ``world_size`` must be of both sides."""
    from tensorcast.api import simulate_apart
    from tensorcast.report.ffn_apart import print_apart

    ranks, ffn = asked["tp"] * asked["dp"], asked["ffn_gpus"]
    if world_size not in (None, ranks + ffn):
        raise InputError(
            f"--world-size {world_size}: {ranks} attention GPUs (tp*dp) and --ffn-gpus {ffn} are {ranks + ffn}"
        )
    with patience(model):
        apart = simulate_apart(model, **asked)
    print_apart(apart.totals(), console(), as_json)
