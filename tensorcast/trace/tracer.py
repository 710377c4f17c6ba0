"""From a model profile to op tables: build on meta, record at three prime sizes, solve, mark."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from tensorcast.errors import InputError
from tensorcast.modeling.attention import cache_argument
from tensorcast.modeling.build import build
from tensorcast.modeling.checkpoint_names import stored_names
from tensorcast.modeling.config import field, hf_config, narrow
from tensorcast.modeling.custom import CustomConfig
from tensorcast.modeling.cut import divided, mend, widen
from tensorcast.modeling.described.streams import TableRows
from tensorcast.profiles.facts import ModelFacts
from tensorcast.profiles.model import ModelProfile
from tensorcast.trace.attention import mark_latent, mark_selection
from tensorcast.trace.closed_form import BLOCK, BLOCKWISE, DECODE, PREFILL, NoClosedForm, Probe, ProgramVaries, solve
from tensorcast.trace.dims import product
from tensorcast.trace.forward import record_step
from tensorcast.trace.layers import Kinds, compress_ratios, selections
from tensorcast.trace.moe import blocks_of, is_shared_param, mark_experts
from tensorcast.trace.record import Call, Seen
from tensorcast.trace.sharding import mark_sharding, mixers_whole
from tensorcast.trace.table import STATEFUL, Op, OpTable, Param, Tensor, layer_ranges

Phase = Literal["prefill", "decode"]
KEEPS = frozenset({"kv_cache_write", "linear_attention", "ssm_scan", "causal_conv1d", "convolution"})
"""Ops that write what a sequence keeps between steps: keys and values, or a state."""
COPIES = frozenset({"copy_", "zeros_like"})


def trace(profile: ModelProfile, phase: Phase, tp: int = 1, whole: OpTable | None = None) -> OpTable:
    """Op table of one step of ``profile`` on one of ``tp`` ranks. Seconds, not minutes; nothing is allocated.

    ``whole``: the table at tp = 1, where the caller has it; a rank's is compared with it.
    """
    transformers_logging.set_verbosity_error()
    config = hf_config(profile)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = whole or _trace_whole(profile, config, phase)
        if tp == 1:
            return whole
        shard = _trace_shard(profile, config, phase, tp, whole)
    params = tuple(
        Param(
            **{
                **_fields(narrow_),
                "full_numel": full.numel,
                **({"numel": full.numel} if full.role == "experts" else {}),
            }
        )
        for full, narrow_ in zip(whole.params, shard.params, strict=True)
    )
    table = mark_sharding(whole, shard)
    return OpTable(table.model, phase, tp, table.ops, table.layer_kinds, table.kind_names, params, whole.facts)


def _trace_whole(profile: ModelProfile, config: PreTrainedConfig, phase: Phase) -> OpTable:
    try:
        return _trace_one(profile, build(config, fields=profile.moe, name=profile.name), config, config, phase, tp=1)
    except InputError:
        raise
    except Exception as reason:  # sizes that do not go together; code of a class that asks what only data tells
        problem = f"transformers' class fails with this config in {phase}: {_first_line(reason)}"
        raise InputError(f"model {profile.name}: {problem}") from reason


def _trace_shard(profile: ModelProfile, config: PreTrainedConfig, phase: Phase, tp: int, whole: OpTable) -> OpTable:
    narrowed = narrow(config, tp)
    try:
        model = build(narrowed, fields=profile.moe, name=profile.name)
        if not isinstance(config, CustomConfig):
            mend(model, config, tp, {param.name: param.shape for param in whole.params})
        table = _trace_one(profile, model, narrowed, config, phase, tp=tp)
        if isinstance(config, CustomConfig) or not mixers_whole(whole, table):
            return table
    except (RuntimeError, InputError):  # a class that derives one width from another (Qwen2-VL: heads' from the stream)
        if isinstance(config, CustomConfig):
            raise
    narrowed = divided(config, tp)
    try:
        model, full = (build(one, fields=profile.moe, name=profile.name) for one in (narrowed, config))
        widen(model, full, lambda one: record_step(one, narrowed, batch=3, new=7, past=0, recurrent_state=False))
        return _trace_one(profile, model, narrowed, config, phase, tp=tp)
    except RuntimeError as reason:
        raise InputError(
            f"model {profile.name}: transformers' class does not run with the widths of one of tp = {tp} ranks; "
            f"use tp = 1 ({_first_line(reason)})"
        ) from None


def _first_line(reason: Exception) -> str:
    return next(iter(str(reason).strip().splitlines()), type(reason).__name__)[:160]


def _fields(param: Param) -> dict[str, Any]:
    return {name: getattr(param, name) for name in Param.__dataclass_fields__}


def _trace_one(
    profile: ModelProfile, model: nn.Module, config: PreTrainedConfig, whole: PreTrainedConfig, phase: Phase, *, tp: int
) -> OpTable:
    if not isinstance(whole, CustomConfig):
        _check_takes_cache(profile.name, model)
    tries = (DECODE,) if phase == "decode" else (PREFILL, BLOCKWISE)
    for probes in tries:
        try:
            kinds, linears = _closed(model, config, phase, probes)
            break
        except NoClosedForm as reason:
            if probes is tries[-1] or isinstance(reason, ProgramVaries):
                raise InputError(f"model {profile.name}: {phase} has a size with no closed form: {reason}") from None
        except NotImplementedError as reason:  # meta tensors refuse ops whose result is a matter of data
            line = str(reason).strip().splitlines()[0]
            raise InputError(f"model {profile.name}: {phase} cannot be traced without data: {line}") from None
    ops = [as_mm(op) for op in _without_idle(_without_copied_states(linears))]
    ops = mark_latent(mark_experts(ops), phase)
    ops = mark_selection(ops, selections(whole, kinds.of_layer))
    if (unsaid := getattr(whole, "unsaid_experts", "")) and blocks_of(ops):
        raise InputError(f"model {profile.name}: config.json does not say {unsaid}, and the model has experts")
    if not isinstance(whole, CustomConfig):
        _check_cache(profile.name, phase, ops)
        _check_states(profile.name, model, {probe.B for probe in probes})
    params = _params(model, config, kinds, ops, stored_names(model, str(profile.config.get("model_type", ""))))
    facts = replace(
        _facts(whole, ops),
        shared_experts=any(is_shared_param(param, blocks_of(ops)) for param in params),
        mtp_modules=profile.mtp_modules,
        block=BLOCK if probes is BLOCKWISE else 1,
    )
    if unbuilt := _unbuilt(whole, kinds, ops, facts):
        raise InputError(f"model {profile.name}: {unbuilt}")
    return OpTable(
        profile.name, phase, tp, tuple(ops), tuple(kinds.of_layer), tuple(_kind_name(model, kinds)), params, facts
    )


def _unbuilt(config: PreTrainedConfig, kinds: Kinds, ops: list[Op], facts: ModelFacts) -> str:
    """What a file says of its experts that the class has no field for, and builds otherwise; empty if nothing."""
    blocks = blocks_of(ops)
    if not blocks:
        return ""
    if (shared := getattr(config, "shared_of_no_class", "")) and not facts.shared_experts:
        return f"{shared} in config.json, and transformers' class has no such experts"
    words, stated = getattr(config, "stated_sparse", ("", ()))
    built = tuple(i for i, kind in enumerate(kinds.of_layer) if kind in blocks)
    if words and built != stated:
        return f"{words} in config.json: experts in {len(stated)} layers, where transformers' class has {len(built)}"
    return ""


def _check_takes_cache(name: str, model: nn.Module) -> None:
    """Raise :class:`InputError` for a class that keeps what it has seen in another way than transformers' caches."""
    takes = inspect.signature(type(model).forward).parameters
    if isinstance(model, PreTrainedModel) and not cache_argument(type(model).forward) and "cache_params" not in takes:
        own = "".join(f": it takes {word}" for word in takes if word in ("state", "mems", "cache"))
        raise InputError(f"model {name}: transformers' class keeps no cache that can be counted{own}")


def _check_cache(name: str, phase: Phase, ops: list[Op]) -> None:
    """Raise :class:`InputError` for a class that keeps nothing between steps, or reads in no way that was followed."""
    if not any(op.name in KEEPS for op in ops):
        raise InputError(f"model {name}: transformers' class keeps no cache that can be counted in {phase}")
    written = {op.kind for op in ops if op.name == "kv_cache_write" and op.attrs["kind"] == "kv"}
    if written - {op.kind for op in ops if op.name == "attention"}:
        raise InputError(f"model {name}: transformers' class has attention of its own that is not followed in {phase}")


def _check_states(name: str, model: nn.Module, batches: set[int]) -> None:
    """Raise :class:`InputError` for a class that keeps states of its sequences in its modules (RecurrentGemma)."""
    for path, module in model.named_modules():
        for field_, value in (*vars(module).items(), *module._buffers.items()):
            if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] in batches:
                where = f"{path}.{field_}: states that its modules keep"
                raise InputError(f"model {name}: transformers' class keeps no cache that can be counted: {where}")


def _closed(
    model: nn.Module, config: PreTrainedConfig, phase: str, probes: tuple[Probe, ...]
) -> tuple[Kinds, list[Op]]:
    kinds = Kinds()

    def recorded() -> list[list[Call]]:
        return [
            record_step(model, config, batch=p.B, new=p.S, past=p.P, recurrent_state=phase == "decode", kinds=kinds)
            for p in probes
        ]

    try:
        return kinds, closed_ops(model, kinds, recorded(), probes)
    except ProgramVaries:  # perhaps the first call got something ready (CTRL's positions)
        return kinds, closed_ops(model, kinds, recorded(), probes)


def _kind_name(model: nn.Module, kinds: Kinds) -> list[str]:
    return [layer_ranges(kinds.layers(kind)) for kind in range(len(kinds.representatives))]


def closed_ops(model: nn.Module, kinds: Kinds, recorded: list[list[Call]], probes: Any) -> list[Op]:
    """Recordings of one step at several sizes as rows whose every dim is a closed form, nothing marked yet."""
    lengths = {len(calls) for calls in recorded}
    if len(lengths) != 1:
        raise ProgramVaries(f"the number of ops depends on the sizes: {sorted(lengths)}")
    weights = {p.untyped_storage()._cdata: name for name, p in [*model.named_parameters(), *model.named_buffers()]}
    storages: dict[int, int] = {}
    ops = []
    for triple in zip(*recorded, strict=True):
        first = triple[0]
        attrs: dict[str, Any] = dict(first.attrs)
        for name, value in first.attrs.items():
            seen = [call.attrs[name] for call in triple]
            if isinstance(value, int) and not isinstance(value, bool) and len(set(seen)) > 1:
                attrs[name] = solve(seen, probes)
        ops.append(
            Op(
                first.name,
                _label(first.module, first.kind, kinds),
                first.kind,
                tuple(_tensor(t, probes, weights, storages) for t in zip(*(c.inputs for c in triple), strict=True)),
                tuple(_tensor(t, probes, weights, storages) for t in zip(*(c.outputs for c in triple), strict=True)),
                attrs,
            )
        )
    return ops


def _without_copied_states(ops: list[Op]) -> list[Op]:
    """Ops but for copies of states: kernels of engines write a sequence's state where it lies."""
    states = {t.storage for op in ops if op.name in STATEFUL for t in (*op.inputs[3:], *op.outputs[1:])}
    return [op for op in ops if op.name not in COPIES or not any(t.storage in states for t in op.inputs)]


def _without_idle(ops: list[Op]) -> list[Op]:
    """Ops but for those on weights without elements (of 0 shared experts), and what lies between these."""

    def empty(tensor: Tensor) -> bool:
        return any(dim.is_constant and dim.coef == 0 for dim in tensor.dims)

    idle = {id(op): op.module.rpartition(".")[0] for op in ops if any(t.weight and empty(t) for t in op.inputs)}
    if not idle:
        return ops
    inside = tuple(set(idle.values()))
    nothing = (id(op) for op in ops if op.module.startswith(inside) and all(map(empty, op.outputs)))
    gone = {*idle, *nothing}
    return [op for op in ops if id(op) not in gone]


def as_mm(op: Op) -> Op:
    """A batched matmul whose weight is only expanded over the batch (a linear on a strided input) is one matmul."""
    if op.name != "bmm" or not op.inputs[1].weight or 0 not in op.inputs[1].expanded:
        return op
    x, weight, out = op.inputs[0], op.inputs[1], op.outputs[0]

    def flat(t: Tensor) -> Tensor:
        batch, rows, width = t.dims
        joined, *_ = product((batch, rows))
        return replace(t, dims=(joined, width), expanded=())

    return op.but(name="mm", inputs=(flat(x), replace(weight, dims=weight.dims[1:], expanded=())), outputs=(flat(out),))


def _tensor(seen: tuple[Seen, ...], probes: Any, weights: dict[int, str], storages: dict[int, int]) -> Tensor:
    first = seen[0]
    dims = tuple(solve(sizes, probes) for sizes in zip(*(s.shape for s in seen), strict=True))
    storage = storages.setdefault(first.storage, len(storages))
    return Tensor(dims, first.dtype, storage, weights.get(first.storage, ""), first.expanded, first.offset)


def _label(module: str, kind: int, kinds: Kinds) -> str:
    """``model.layers.3.mlp`` of a representative becomes ``layers[3-60].mlp``: the layers that it stands for."""
    if kind < 0:
        return module.removeprefix("model.")
    prefix = kinds.representatives[kind]
    return (
        f"{prefix.rpartition('.')[0].removeprefix('model.')}[{layer_ranges(kinds.layers(kind))}]{module[len(prefix) :]}"
    )


def _facts(config: PreTrainedConfig, ops: list[Op]) -> ModelFacts:
    """What transformers' config and the recorded ops say of the unsharded model."""
    routing = next((op for op in ops if op.name == "init_routing_v2"), None)
    experts = next((op for op in ops if op.name == "expert_counts"), None)
    width = next((op.inputs[1] for op in ops if op.name == "grouped_matmul" and op.attrs["projection"] == "down"), None)
    heads, zero = field(config, "num_attention_heads", "n_heads", default=0), _zero_experts(config)
    latent = field(config, "kv_lora_rank", default=0)
    return ModelFacts(
        hidden_size=field(config, "hidden_size", "d_model"),
        vocab_size=field(config, "vocab_size"),
        layers=field(config, "num_hidden_layers", "n_layers"),
        heads=heads,
        kv_heads=heads if latent else field(config, "num_key_value_heads", "kv_n_heads", default=heads),
        num_experts=int(experts.attrs["num_experts"]) - zero if experts else 0,
        top_k=int(routing.inputs[1].dims[-1].coef) if routing else 0,
        zero_experts=zero,
        moe_hidden_size=int(routing.inputs[0].dims[-1].coef) if routing else 0,
        moe_intermediate_size=int(next(d.coef for d in width.dims if d.X)) if width else 0,
        expert_groups=int(field(config, "n_group", default=1) or 1),
        expert_groups_chosen=int(field(config, "topk_group", default=1) or 1),
        tied_embedding=bool(getattr(config, "tie_word_embeddings", False)),
        remarks=getattr(config, "remarks", ()),
        compress_ratios=compress_ratios(config),
        indexer_width=int(field(config, "index_head_dim", default=0) or 0),
        handed_on=float(getattr(config, "handed_on", 2.0)),
        ends_from=int(getattr(config, "ends_from", 0)),
        ends_tokens=int(getattr(config, "ends_tokens", 0)),
    )


def _zero_experts(config: PreTrainedConfig) -> int:
    """Experts that hand their input back (LongCat), with ids after the others and, in transformers, unused weights."""
    return int(field(config, "zero_expert_num", default=0) or 0)


def _params(
    model: nn.Module, config: PreTrainedConfig, kinds: Kinds, ops: list[Op], stored: dict[str, tuple[str, ...]]
) -> tuple[Param, ...]:
    """Every parameter of one layer per kind and of what lies outside the layers, by the role it plays in the trace."""
    experts = {w for op in ops if op.name == "grouped_matmul" for w in op.weights}
    names = ("mm", "addmm", "bmm", "mla_absorb", "mla_expand")
    matmul = {w for op in ops if op.name in names for w in op.weights}
    embedded = {w for op in ops if op.name == "embedding" for w in op.weights}
    zero = _zero_experts(config)
    counts = next((op.attrs["num_experts"] for op in ops if op.name == "expert_counts"), 0)
    rows = []
    standing = set(kinds.representatives)
    other_layers = tuple(path + "." for path in kinds.paths if path not in standing)
    shared = _shared(model, kinds)
    for name, param in model.named_parameters():
        if name.startswith(other_layers) and name not in shared:
            continue
        module = name.rpartition(".")[0]
        layer = kinds.kind_of(module)
        is_linear = type(model.get_submodule(module)) is nn.Linear
        role = (
            "tables"
            if isinstance(model.get_submodule(module), TableRows)
            else "experts"
            if name in experts
            else "embedding"
            if name in embedded
            else "lm_head"
            if layer < 0 and name in matmul
            else "linear"
            if is_linear and (name in matmul or name in shared)
            else "other"  # a router is a matmul, but never quantised
        )
        dtype = "mxfp8" if role == "tables" else str(param.dtype).removeprefix("torch.")
        numel = param.numel()
        if role == "experts" and zero and param.shape[0] > zero:  # no checkpoint has weights for them
            numel = numel // param.shape[0] * min(param.shape[0], int(counts) - zero)
        shape, kind = tuple(param.shape), -1 if name in shared else layer
        label = _label(module, layer, kinds)
        rows.append(Param(name, label, kind, numel, numel, dtype, role, shape, stored.get(name, ())))
    return tuple(rows)


def _shared(model: nn.Module, kinds: Kinds) -> set[str]:
    """Weights held once that several layers use, by their first name (Zamba's transformer block), or several passes
    over the same layers (HRM's)."""
    places: dict[int, tuple[str, set[str]]] = {}
    for layer in dict.fromkeys(kinds.paths):
        for name, param in model.get_submodule(layer).named_parameters(layer, remove_duplicate=False):
            places.setdefault(id(param), (name, set()))[1].add(layer)
    again = tuple(f"{path}." for path in kinds.run_again())
    passes = {name for name, _ in model.named_parameters() if name.startswith(again)}
    return passes | {name for name, found in places.values() if len(found) > 1}
