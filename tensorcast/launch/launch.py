"""Take-away of a choice: the commands that start it under vLLM, SGLang or TensorRT-LLM, every flag with its source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from types import ModuleType
from typing import Any

from tensorcast.cost.stages import broken_stages
from tensorcast.deploy.deployment import deploy
from tensorcast.deploy.engine_limits import Case, Kernels, engine_can_run, halving_note, unasked_exchange
from tensorcast.deploy.layout import Layout, attention_dp, broken_context, broken_prompts
from tensorcast.deploy.options import Options
from tensorcast.deploy.plan.memory_share import memory_share
from tensorcast.deploy.plan.switches import served_with, switched
from tensorcast.errors import InputError, unknown_name
from tensorcast.launch import encoder, sglang, trtllm, vllm
from tensorcast.launch.settings import DRAFT, Plan, Setting, Settings
from tensorcast.modeling.checkpoint.read import checkpoint
from tensorcast.modeling.quantization import KV_DTYPES, Quantization, override
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.engine import EngineProfile
from tensorcast.profiles.launch import LaunchTable, load_launch_table
from tensorcast.profiles.memory import is_latent, unasked_cache
from tensorcast.profiles.model import ModelProfile
from tensorcast.profiles.store import load_engine
from tensorcast.serving.capacity import decode_budget, room
from tensorcast.serving.encoder import without_tower
from tensorcast.trace.cache import whole_model

__all__ = [
    "Launch", "Setting", "engine_can_run", "launch", "launch_encoder", "script", "sequences_that_fit", "unasked_batch",
]

WRITERS: dict[str, ModuleType] = {"vllm": vllm, "sglang": sglang, "trtllm": trtllm}
ROLES = (None, "prefill", "decode")


@dataclass(frozen=True)
class Launch:
    """How to start one engine instance: a command per node (one for all under Slurm) and the files they read.

    ``problem``: why the engine cannot run it, and then nothing else is there; ``notes``: what no flag can say.
    """

    engine: str
    version: str
    commands: tuple[str, ...] = ()
    config_files: dict[str, str] = field(default_factory=dict)
    flags: tuple[Setting, ...] = ()
    notes: tuple[str, ...] = ()
    problem: str = ""

    def record(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "flags": [s._asdict() for s in self.flags]}


def launch(
    engine: str,
    model_profile: ModelProfile,
    layout: Layout,
    options: Options = Options(),
    *,
    batch: int,
    input_len: int,
    output_len: int,
    chunk_tokens: int | None = None,
    gpus_per_node: int = 8,
    role: str | None = None,
    memory_fraction: float | None = None,
    device: DeviceProfile | None = None,
    prefill: Options | None = None,
    encoders: bool = False,
    encoder_tp_mode: str | None = None,
) -> Launch:
    """Commands that start ``layout`` of a model. ``batch`` and ``chunk_tokens`` are per data-parallel rank.

    ``chunk_tokens`` and ``memory_fraction`` default to the engine's on ``device``, ``role`` None serves both phases,
    ``prefill`` are options of the same server's prefill where they differ. ``encoders`` of images are apart, before it;
    else its ranks share the vision tower by ``encoder_tp_mode``. What the engine cannot run is a ``problem``; bad
    arguments and unknown engines raise :class:`InputError`.
    """
    profile = _served(engine, role)
    table = load_launch_table(profile.name, profile.version if profile.releases else "")
    _check(batch=batch, input_len=input_len, output_len=output_len, gpus_per_node=gpus_per_node)
    if role not in ROLES:
        raise InputError(f"role {role!r}: choose prefill, decode or none")
    have = checkpoint(model_profile)
    want = override(have, options.quant)
    whole = whole_model(model_profile, role or "decode", options.quant)
    cuts, kernels = whole.cuts, None
    if device is not None:
        kernels = Kernels(profile.lacking, device.architecture, model_profile.config, whole)
        options = unasked_exchange(options, profile, device.architecture)
    case = Case(
        engine=table.name, layout=layout, facts=model_profile.stated_facts, options=options,
        gpus_per_node=gpus_per_node, prefill=prefill, cuts=cuts,
    )
    problem = engine_can_run(
        table.name, layout, case.facts, options, gpus_per_node, prefill=prefill, cuts=cuts,
        lifted=profile.lifted_rules, kernels=kernels,
    )
    if not problem and (long := model_profile.too_long(input_len + output_len)):
        problem = f"context length: {long}"
    if options.pp_partition:
        problem = problem or broken_stages(options.pp_partition, layout.pp, case.facts.layers)
    if options.pcp > 1 and "prefill_context_parallel" not in table.flags:
        problem = problem or f"prefill context parallelism: {table.name} {table.version} has no flag here for --pcp"
    elif options.pcp > 1 and table.name == "sglang" and role != "prefill":  # decoding, its ranks do all the same
        problem = problem or "prefill context parallelism: here a server of prompts alone has it, --role prefill"
    if encoder_tp_mode is not None:
        problem = problem or encoder.check_tp_mode(table, model_profile, encoder_tp_mode)
    if encoders:
        problem = problem or encoder.broken_encoders(table, model_profile)
    problem = problem or broken_prompts(options.pcp, layout) or broken_context(
        options.dcp, layout, case.facts, latent=is_latent(model_profile.config)
    ) or _not_quantizable(table, have, want, device)
    if problem:
        return Launch(table.name, table.version, problem=problem)
    chunk = chunk_tokens or _chunk(case, profile, device)
    architecture = "" if device is None else device.architecture
    unasked = unasked_cache(profile.cache_dtypes, model_profile.config, architecture, have.kv)
    kv = _kv(table, options.kv_dtype or (want.kv if want.kv != have.kv else unasked), unasked)
    plan = Plan(
        table=table, case=case, model=model_profile, batch=batch, input_len=input_len, output_len=output_len,
        chunk_tokens=chunk,
        kv_dtype=kv,
        quant=want.linear.name if want.linear != have.linear else "",
        memory_fraction=memory_fraction or options.memory_fraction
        or _share(case, switched(without_tower(profile) if encoders else profile, options), device, model_profile,
                  batch=batch, chunk=chunk, role=role, context=input_len + output_len + options.mtp_depth),
        role=role or "", encoders=encoders, encoder_tp_mode=encoder_tp_mode or "weights",
    )  # fmt: skip
    if table.name == "sglang" and (problem := sglang.broken_plan(plan)):
        return Launch(table.name, table.version, problem=problem)
    return _written(plan)


def launch_encoder(
    engine: str, model: ModelProfile, *, batch: int, input_len: int, output_len: int, chunk_tokens: int | None = None,
    device: DeviceProfile | None = None,
) -> Launch:
    """The command that starts one encoder of images, one GPU with the whole tower; ``batch`` requests at most.

    Raises :class:`InputError` for a model that takes no images; what the engine cannot run is a ``problem``.
    """
    profile = load_engine(engine)
    table = load_launch_table(profile.name, profile.version if profile.releases else "")
    _check(batch=batch, input_len=input_len, output_len=output_len)
    if problem := encoder.broken_encoders(table, model):
        return Launch(table.name, table.version, problem=problem)
    case = Case(engine=table.name, layout=Layout(1), facts=model.stated_facts, options=Options(), gpus_per_node=1)
    plan = Plan(
        table=table, case=case, model=model, batch=batch, input_len=input_len, output_len=output_len,
        chunk_tokens=chunk_tokens or _chunk(case, profile, device), kv_dtype="", quant="", memory_fraction=0.0,
        role="encode",
    )  # fmt: skip
    found = encoder.encoder_settings(plan, WRITERS[table.name].SERVER_PORT)
    return Launch(
        engine=table.name, version=table.version,
        commands=(found.command(*(() if table.name == "sglang" else (plan.path,))),),
        flags=tuple(dict.fromkeys(setting for _, setting, _ in found.items)),
        notes=tuple(_placeholders(plan, [found]) + encoder.notes(plan, encoder=True)),
    )  # fmt: skip


def sequences_that_fit(
    found: Launch, model: ModelProfile, device: DeviceProfile, layout: Layout, options: Options, *, role: str | None,
    length: int, chunk: int | None = None,
) -> int:
    """Sequences of ``length`` tokens that memory holds per data-parallel rank of ``found``. ``chunk``: prompt tokens of
    a step, where they are said.

    Raises :class:`InputError` where not even one fits. Traces the model, unless its trace is cached.
    """  # fmt: skip
    phase = "prefill" if role == "prefill" else "decode"
    served = _served(f"{found.engine}=={found.version}", role)
    options = replace(options, placement="linear")  # where experts lie changes no memory
    one = deploy(model, device, served, layout, phase, options=options)
    left, buffers = decode_budget(one, length - 1, chunk)
    fits = int(room(one, left, one.held(1.0, length)[1] + buffers))
    if fits < 1:
        memory = one.memory(1, 1, length - 1)
        raise InputError(
            f"{layout} does not fit on {device.name}: {memory.weights / 1e9:.1f} GB of weights per GPU leave "
            f"{found.engine} no room for one sequence of {length} tokens"
        )
    return fits


def unasked_batch(engine: str, role: str | None, device: DeviceProfile, fits: int) -> int:
    """Sequences per data-parallel rank of who asks for no number: the engine's own most, or what fits."""
    scheduler = _served(engine, role).scheduler
    return fits if scheduler is None else min(fits, scheduler.sequences(float(device.memory_bytes)))


def _served(engine: str, role: str | None) -> EngineProfile:
    return load_engine(engine) if role is None else load_engine(engine).in_pools()


def script(*parts: Launch, roles: Sequence[str] = ("",), said: Sequence[str] = ()) -> str:
    """A shell script of one server, or of a pool's and the other's, named by ``roles``.

    Several commands, of nodes or of pools, are cases of its first argument: one runs where it is called, none keeps the
    others waiting. ``said``: comments on top.
    """
    cases: dict[str, list[str]] = {}
    comments = dict.fromkeys((*(f"{part.engine} {part.version}" for part in parts), *said))
    for role, part in zip(roles, parts, strict=True):
        comments |= dict.fromkeys(part.notes)
        files = [line for name, text in part.config_files.items() for line in (
            f"cat > {name} <<'END'", text.rstrip("\n"), "END", "")]  # fmt: skip
        for node, command in enumerate(part.commands):
            words = [role] * bool(role) + [f"node{node}"] * (len(part.commands) > 1)
            cases["-".join(words)] = [*files, command]
    lines = [f"# {comment}" for comment in comments]
    if len(cases) == 1:
        return "\n".join([*lines, "", *next(iter(cases.values()))])
    lines = ["#!/usr/bin/env bash", *lines, f"# on each node: bash THIS_FILE {'|'.join(cases)}", "", 'case "${1-}" in']
    for name, inside in cases.items():
        lines += [f"{name})", *inside, ";;"]
    names = "|".join(cases)
    return "\n".join([*lines, "*)", f'echo "usage: bash $0 {names}" >&2', "exit 2", ";;", "esac"])


def _written(plan: Plan) -> Launch:
    writer = WRITERS[plan.table.name]
    slurm = plan.table.name == "trtllm"
    settings: list[Settings] = [writer.settings(plan, node) for node in range(1 if slurm else plan.case.nodes)]
    files = {}
    if slurm:
        import yaml

        text = yaml.safe_dump(settings[0].config(), sort_keys=False)
        files[trtllm.config_name(plan)] = f"# {plan.table.name} {plan.table.version}, {plan.case.layout}\n{text}"
    words = () if plan.table.name == "sglang" else (plan.path,)
    launcher = trtllm.LAUNCHER if slurm and plan.case.nodes > 1 else ()
    flags = dict.fromkeys(setting for found in settings for _, setting, _ in found.items)
    return Launch(
        engine=plan.table.name, version=plan.table.version,
        commands=tuple(found.command(*words, launcher=launcher) for found in settings), config_files=files,
        flags=tuple(flags), notes=tuple(
            _placeholders(plan, settings) + writer.notes(plan) + encoder.notes(plan, encoder=False) + _notes(plan)
        ),
    )  # fmt: skip


def _placeholders(plan: Plan, settings: list[Settings]) -> list[str]:
    text = " ".join(str(value) for found in settings for _, _, value in found.items) + plan.path
    meanings = {
        "HEAD_NODE_IP": "the first node's address",
        "THIS_NODE_IP": "the address of the node that runs the command",
        DRAFT: "the network that drafts, its Hugging Face id or directory (see --draft-model)",
        "/path/to/": f"the directory that holds {plan.model.name}",
    }
    said = [f"{word}: {meaning}" for word, meaning in meanings.items() if word in text]
    return [f"to be filled in: {'; '.join(said)}"] if said else []


def _notes(plan: Plan) -> list[str]:
    options, said = plan.case.options, list[str]()
    if plan.model.model:
        kind = plan.model.model.rpartition(":")[2]
        said.append(f"{plan.model.name} is the class {kind}: {plan.table.name} serves it once it is registered there")
    if options.chunk_tokens and plan.table.name != "trtllm":
        said.append(f"{options.chunk_tokens} tokens through the experts at a time: no flag, the engine decides")
    if options.experts_backend != "auto":
        said.append(f"experts_backend {options.experts_backend}: the engine chooses its kernels by itself")
    if not options.shared_expert_tp and plan.case.layout.tp > 1:
        said.append("shared experts held whole by every rank: no flag, the engine decides")
    if halves := halving_note(plan.table.name, plan.case.layout, plan.case.cuts):
        said.append(halves)
    return said


def _check(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name} = {size} must be at least 1")


def _chunk(case: Case, profile: EngineProfile, device: DeviceProfile | None) -> int:
    """Prompt tokens per step and rank that the engine takes unasked."""
    dp = attention_dp(case.layout, case.facts.num_experts)
    return profile.tokens_per_step(device, dp, case.exchange)


def _share(
    case: Case, profile: EngineProfile, device: DeviceProfile | None, model: ModelProfile, *, batch: int, chunk: int,
    role: str | None, context: int,
) -> float:
    """Share of memory that the engine may take, less what it leaves for steps of ``chunk`` prompt tokens per rank and
    for decode steps of ``batch`` sequences of up to ``context`` tokens.

    SGLang counts the tokens of all data-parallel ranks for each GPU, before it deals them out (0.5.23,
    arg_groups/memory_hook.py, parallel_hook.py): of chunks beyond its own that would leave nothing, where it is told
    no share. Here a GPU's own count."""
    reserve, experts = profile.reserve, case.facts.num_experts
    if device is None or reserve is None:
        return float(profile.memory_fraction)
    dp, reads = attention_dp(case.layout, experts), reserve.pooled and role == "prefill"
    tokens = min(chunk * dp, max(chunk, profile.tokens_per_step(device)))
    return round(float(memory_share(
        profile, device, case.layout, experts > 0, model.config, phase=role or "",
        served=served_with(case.options, case.exchange, context=context), tokens=tokens,
        grown=0.0 if reads else reserve.graph_bytes(batch, dp, 1 + case.options.mtp_depth),
    )), 3)  # fmt: skip


def _kv(table: LaunchTable, kv_dtype: str, unasked: str) -> str:
    """``unasked``: what the engine takes for the model by itself."""
    if kv_dtype not in KV_DTYPES:
        raise unknown_name("--kv-dtype", kv_dtype, KV_DTYPES)
    return "bf16_not_fp8" if table.name == "vllm" and (kv_dtype, unasked) == ("bf16", "fp8") else kv_dtype


def _not_quantizable(table: LaunchTable, have: Quantization, want: Quantization, device: DeviceProfile | None) -> str:
    """Why the engine cannot turn a checkpoint that is ``have`` into ``want`` as it loads; empty if it can."""
    if (have.linear, have.experts) == (want.linear, want.experts):
        return ""
    entry = table.flags.get("quantization")
    can = entry.values if entry else {}
    plain = {have.linear.name, have.experts.name} == {"bf16"}
    if plain and want.linear == want.experts and want.linear.name in can:
        devices = entry.value_devices.get(want.linear.name, ()) if entry else ()
        if device is None or not devices or device.architecture.lower() in devices:
            return ""
        return f"quantisation: at load {table.name} makes {want.linear.name} on {' and '.join(devices)} alone"
    kinds = f"from bf16 to {' or '.join(can)}" if can else "nothing"
    return (
        f"quantisation: the checkpoint is linear={have.linear.name}, experts={have.experts.name}; at load {table.name} "
        f"quantises {kinds}: use a checkpoint with linear={want.linear.name}, experts={want.experts.name}"
    )
