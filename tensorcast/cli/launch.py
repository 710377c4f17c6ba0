"""``tensorcast launch``: the commands that start a layout under a serving engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorcast.cli.app import DEPLOYMENT, OUTPUT, WORK, command
from tensorcast.cli.options import LAYOUT, Device, Engine, Model, deployment_options
from tensorcast.errors import InputError

if TYPE_CHECKING:
    from tensorcast.launch.launch import Launch
    from tensorcast.scheduling.pools import Servers

EXAMPLES = """[bold]Examples[/bold]

[dim]DeepSeek-V3 on four nodes, attention data-parallel, 8 experts per GPU: a command per node[/dim]

tensorcast launch deepseek-v3 -d h200 -n 32 --layout tp1-dp32-ep32 --engine sglang --batch 128

[dim]One node, two tokens drafted per step[/dim]

tensorcast launch deepseek-v3 -d h200 --layout tp8-ep8 --engine vllm --batch 64 --mtp-depth 2

[dim]The decode half of a disaggregated deployment; trtllm-serve reads its options from a file[/dim]

tensorcast launch deepseek-v3 -d h200 --layout dp8-ep8 --engine trtllm --batch 128 --role decode

[dim]All of a deployment as a folder: a script per role, the router, a health check, a benchmark, manifests[/dim]

tensorcast launch qwen3-235b-a22b -d h200 -e vllm --layout "2 x tp4 > tp8-ep8" -b 128 --out run --manifests kubernetes

[dim]Which release and file every flag was read from[/dim]

tensorcast launch qwen3-235b-a22b -d h100 --layout tp8 --batch 32 --json | jq .flags"""


@command(epilog=EXAMPLES)
@deployment_options(
    "quant", "kv_dtype", "state_dtype", "all2all", "placement", "redundant_experts", "mtp_depth",
    "speculative_method", "draft_model", "dcp", "pcp", "pp_partition", "dual_batch_overlap", "shared_experts_fusion",
    "experts_kernels", "attention_kernels",
    quant="Quantise weights at load.",
    placement="Which group holds which experts: linear, round_robin, eplb, eplb_global, or an engine's file, as "
    "[bold]tensorcast experts --out[/bold] writes it.",
    all2all="How tokens reach their experts at dp > 1: allgather_reducescatter, high_throughput, low_latency, or auto, "
    "the engine's.",
)
def launch(
    model: Model,
    *,
    device: Device,
    layout: Annotated[str, typer.Option(
        "--layout", "-l", metavar=LAYOUT, help="Sizes of the parallel groups; one left out is 1. Several servers as "
        "[bold]4 x tp8[/bold], pools as [bold]2 x tp8 > dp8-ep8[/bold], as a comparison names them; another device "
        "than --device behind [bold]@[/bold].",
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
        "--role", metavar="prefill|decode|encode", show_default=False, rich_help_panel=DEPLOYMENT,
        help="Half of a disaggregated deployment, or one encoder of images (tp1).  [dim]\\[default: both halves][/dim]",
    )] = None,
    encoders: Annotated[bool, typer.Option(
        "--encoders", help="Embeddings of images come from encoders apart (--role encode).", rich_help_panel=DEPLOYMENT,
    )] = False,
    encoder_tp_mode: Annotated[str | None, typer.Option(
        "--encoder-tp-mode", metavar="MODE", show_default=False, rich_help_panel=DEPLOYMENT,
        help="The vision tower on tensor-parallel GPUs: weights, cut over them, or data, whole on each.",
    )] = None,
    batch: Annotated[int | None, typer.Option(
        "--batch", "-b", min=1, show_default=False, rich_help_panel=WORK,
        help="Most sequences [bold]per data-parallel rank[/bold].  "
        "[dim]\\[default: what memory holds, at most the engine's own][/dim]",
    )] = None,
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
    engine: Engine = "vllm",
    out: Annotated[Path | None, typer.Option(
        "--out", "-o", metavar="DIR", show_default=False, rich_help_panel=OUTPUT,
        help="Write a folder: a script per role, router, health check, benchmark, and README.md.",
    )] = None,
    manifests: Annotated[str | None, typer.Option(
        "--manifests", metavar="NAME,...", show_default=False, rich_help_panel=OUTPUT,
        help="Also compose (one machine), kubernetes (LeaderWorkerSet) or dynamo there.",
    )] = None,
    as_json: Annotated[bool, typer.Option(
        "--json", help="Print JSON alone: commands, files, every flag with version and source.", rich_help_panel=OUTPUT,
    )] = False,
    **chosen: Any,
) -> None:
    """Print the commands that start MODEL in a layout, one per node, ready for a shell."""
    from tensorcast.api import device_profile
    from tensorcast.deploy.layout import ALL2ALL, check, parse_layout
    from tensorcast.deploy.model_names import named_model
    from tensorcast.deploy.options import options_of
    from tensorcast.launch.launch import launch as write
    from tensorcast.launch.launch import script, sequences_that_fit, unasked_batch
    from tensorcast.scheduling.pools import parse_servers
    from tensorcast.trace.cache import traced

    if role == "encode":
        _encoder(model, device, layout, as_json, engine=engine, batch=batch or ENCODER_REQUESTS, input_len=input_len,
                 output_len=output_len, chunk_tokens=chunk, beside={"--out": out, "--manifests": manifests})
        return
    if role not in ROLES:
        raise InputError(f"--role {role!r}: must be prefill, decode or encode")
    options = options_of(chosen)
    if options.all2all not in ALL2ALL:
        raise InputError(f"--all2all {options.all2all!r}: choose one of {', '.join(ALL2ALL)}")
    servers, gpu = parse_servers(layout), device_profile(device)
    profile, read_as = named_model(model)
    roles = [role if one.role == "both" else one.role for one in servers]
    if roles not in ([role], ["prefill", "decode"]):
        raise InputError(f"--layout {layout}: one kind of servers, or a pool for each phase")
    if role is not None and len(roles) > 1:
        raise InputError(f"--role {role}: --layout {layout} says both; name one pool's layout, or leave the role out")
    gpus = [one.device or gpu for one in servers]
    _check_folder(out, manifests, encoders)
    made, users = [], 0
    for each, own, gpu in zip(servers, roles, gpus, strict=True):
        sizes = parse_layout(str(each.layout), world_size if len(servers) == each.count == 1 else None)
        check(sizes, traced(profile, own or "decode").facts, gpu)  # of a decoder: nothing else is traced
        written = partial(
            write, engine, profile, sizes, options, input_len=input_len, output_len=output_len, chunk_tokens=chunk,
            gpus_per_node=gpus_per_node, role=own, device=gpu, encoders=encoders and own != "decode",
            encoder_tp_mode=encoder_tp_mode,
        )
        found = written(batch=batch or 1)
        if found.problem:
            raise InputError(f"{found.engine} {found.version} cannot run {sizes}: {found.problem}")
        length = input_len + output_len
        fits = sequences_that_fit(found, profile, gpu, sizes, options, role=own, length=length, chunk=chunk)
        most = batch or unasked_batch(engine, own, gpu, fits)
        if batch is None:
            found = written(batch=most)
        elif fits < batch and own != "prefill":
            note = f"memory holds {fits} of {batch} sequences per data-parallel rank at their full {length} tokens"
            found = replace(found, notes=(*found.notes, f"{note}; others wait"))
        users = most * sizes.dp * each.count
        made.append(replace(found, notes=(*found.notes, *filter(None, [read_as]))))
    if out is not None:
        names = " > ".join(dict.fromkeys(one.name for one in gpus))
        row = {"model": model, "device": names, "engine": made[0].engine, "release": made[0].version,
               "layout": " > ".join(map(str, servers)), "kv_dtype": options.kv_dtype or "",
               "mtp_depth": options.mtp_depth}  # fmt: skip
        _write(out, manifests, made, servers, roles, row=row, users=users, sizes=(input_len, output_len, gpus_per_node),
               path=profile.hf_id if "/" in profile.hf_id else f"/path/to/{profile.name}")
        return
    if as_json:
        from tensorcast.report.plain import to_json

        records = [found.record() for found in made]
        typer.echo(to_json(records[0] if len(records) == 1 else dict(zip(roles, records, strict=True)), indent=2))
        return
    typer.echo(script(*made, roles=[own or "" for own in roles] if len(made) > 1 else [""]))


ROLES = (None, "prefill", "decode")


ENCODER_REQUESTS = 128
"""At once, of who asks an encoder for no number."""


def _encoder(
    model: str, device: str, layout: str, as_json: bool, *, engine: str, beside: dict[str, object], **sizes: Any
) -> None:
    """The command of one encoder. ``beside``: what must not be said, with it."""
    from tensorcast.api import device_profile
    from tensorcast.deploy.model_names import named_model
    from tensorcast.launch.launch import launch_encoder, script

    if said := [name for name, value in beside.items() if value is not None]:
        raise InputError(f"{said[0]}: is not of --role encode; print the command and the server's")
    if layout.strip() not in ("tp1", "tp1-dp1"):
        raise InputError(f"--layout {layout}: an encoder is one GPU, tp1; start as many as are wanted")
    profile, _ = named_model(model)
    found = launch_encoder(engine, profile, device=device_profile(device), **sizes)
    if found.problem:
        raise InputError(f"{found.engine} {found.version} cannot run it: {found.problem}")
    if as_json:
        from tensorcast.report.plain import to_json

        typer.echo(to_json(found.record(), indent=2))
        return
    typer.echo(script(found))


def _check_folder(out: Path | None, manifests: str | None, encoders: bool) -> None:
    """Raise :class:`InputError` for manifests that go nowhere, and for encoders, which no folder starts."""
    if manifests and out is None:
        raise InputError("--manifests: are written to a folder: say which, with --out")
    if encoders and out is not None:
        raise InputError("--encoders: is not written to a folder; print the server's command, and --role encode's")


def _write(
    out: Path, manifests: str | None, made: Sequence[Launch], servers: Sequence[Servers], roles: Sequence[str | None],
    *, row: dict[str, object], users: int, sizes: tuple[int, int, int], path: str,
) -> None:
    """The launch folder. ``sizes``: of prompts, replies and nodes; ``users``: of the benchmark."""
    from tensorcast.cli.values import listed_names
    from tensorcast.files import check_directory, write_atomically, writing
    from tensorcast.launch.folder import files
    from tensorcast.launch.pools import Deployment, Pool

    check_directory(out)
    pools = tuple(
        Pool(own or "server", each.count, each.layout.world_size, found)
        for own, each, found in zip(roles, servers, made, strict=True)
    )
    deployment = Deployment(
        pools=pools, model=path, input_len=sizes[0], output_len=sizes[1], users=users, gpus_per_node=sizes[2], row=row
    )
    texts = files(deployment, listed_names("--manifests", manifests) if manifests else ())
    with writing("--out", out):
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_atomically(out / name, text)
    typer.echo(f"wrote {', '.join(texts)} to {out}: begin with {out / 'README.md'}")
