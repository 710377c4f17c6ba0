"""Constants of SGLang that its profile copies, read from a release, in the profile's own shape."""

from __future__ import annotations

import ast
import re
from typing import Any

from tensorcast.errors import InputError
from tensorcast.validate.engines.source import Source, found, literal
from tensorcast.validate.engines.tuned_tiles import tuned_tiles

SERVER = "sglang/srt/server_args.py"
HOOKS = "sglang/srt/arg_groups"
MODELS = "sglang/srt/configs/model_config.py"

TERMS = {
    "constant_mib": r"reserved_mem = (\d+)\s+(?:reserved_mem \+= activation|if self\.chunked)",
    "token_mib": r"reserved_mem \+= (?:activation_tokens|max\(.*chunked_prefill_size, \d+\)) \* ([\d.]+)",
    "least_tokens": r"max\((?:cfg|self)\.chunked_prefill_size, (\d+)\)",
    "rank_mib": r"tp_size \* (?:cfg|self)\.pp_size / (\d+) \* 1024",
    "sequence_mib": r"decode_cuda_graph_config\.max_bs \* ([\d.]+)$",
    "dp_sequence_mib": r"max_bs \* (?:cfg|self)\.\w*dp_size \* ([\d.]+)$",
    "many_sequences": r"decode_cuda_graph_config\.max_bs > (\d+)",
    "dp_many_mib": r"max_bs \* (?:cfg|self)\.\w*dp_size \* ([\d.]+)$",
    "prefill_graph_mib": r"len\(prefill_cuda_graph_config\.bs\) \* (\d+)",
    "latent_prefill_graphs_mib": r"\* 8\s+else:\s+reserved_mem \+= ([\d.]+) \* 1024",
    "floor_mib": r"max\(reserved_mem, (\d+) \* 1024\)",
    "floor_above_mib": r"gpu_mem > (\d+) \* 1024",
}
"""Numbers of the memory that is left free, each in the first line (of ``dp_many_mib`` the second) that matches."""

THOUSANDS = ("latent_prefill_graphs_mib", "floor_mib", "floor_above_mib")


def read_facts(source: Source) -> dict[str, Any]:
    """By the dotted name of the profile's field."""
    split = f"{HOOKS}/memory_hook.py" in source.files(HOOKS)
    memory = source.tree(f"{HOOKS}/memory_hook.py" if split else SERVER)
    settings = found(memory, "handle_gpu_memory_settings" if split else "_handle_gpu_memory_settings")
    parts = [settings, *(found(memory, name) for name in ("reserve_for_graph_mb",) if split)]
    text = "\n".join(ast.unparse(part) for part in parts)
    environ = ast.unparse(source.tree("sglang/srt/environ.py"))
    vision = ast.unparse(found(memory, "adjust_mem_fraction_for_vlm"))
    graphs = source.tree(f"{HOOKS}/cuda_graph_hook.py" if split else SERVER)
    sizes = "generate_prefill_cuda_graph_batch_sizes" if split else "_generate_prefill_cuda_graph_batch_sizes"
    fused = _fused(source, split)
    return {
        "memory_fraction": _number(r"gpu_mem is not None else ([\d.]+)", text),
        "step_tokens.from_mib": _tiers(settings),
        **{f"reserve.{name}": value for name, value in _reserve(text).items()},
        **_by_role(memory, split),
        "reserve.vision.factor": _number(r"base_mem_fraction_reduction_ratio = ([\d.]+)", vision),
        "reserve.vision.slope": _number(r"sensitivity_scale = ([\d.]+)", vision),
        "reserve.vision.least": _number(r"max\(([\d.]+), min\(", vision),
        "reserve.vision.most": _number(r"max\([\d.]+, min\(([\d.]+)", vision),
        "reserve.vision.not_architectures": _named(source.tree(MODELS), "mm_disabled_models"),
        "prefill_graphs.latent_max_tokens": _number(
            r"max_bs = min\((\d+), cfg\.chunked" if split else r"prefill_cuda_graph_config\.max_bs = (\d+)$", text
        ),
        "prefill_graphs.ranges": _ranges(found(graphs, sizes)),
        "prefill_graphs.seeing": sorted(set(_named(source.tree(MODELS), (
            "multimodal_breakable_cuda_graph_supported_model_archs" if split
            else "multimodal_piecewise_cuda_graph_supported_model_archs"
        )))),
        "allreduce_norm.models": sorted(fused),
        "step_tokens.buffered": _number(r"SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK = EnvInt\((\d+)\)", environ),
        "step_tokens.exchanges": _number(
            r"num_max_dispatch_tokens_per_rank <= (\d+)",
            ast.unparse(source.tree("sglang/srt/layers/moe/token_dispatcher/deepep.py")),
        ),
        "scheduler.expected_reply": [
            _number(rf"SGLANG_{name} = Env(?:Int|Float)\(([\d.]+)\)", environ)
            for name in ("INIT_NEW_TOKEN_RATIO", "MIN_NEW_TOKEN_RATIO_FACTOR", "NEW_TOKEN_RATIO_DECAY_STEPS",
                         "CLIP_MAX_NEW_TOKENS_ESTIMATION", "RETRACT_DECODE_STEPS")
        ],
        "scheduler.expected_reply.rank_factor": _number(
            r"schedule_conservativeness ?= ?\w+\.schedule_conservativeness \* ([\d.]+)",
            ast.unparse(source.tree(f"{HOOKS}/parallel_hook.py" if split else SERVER)),
        ),
        "scheduler.expected_reply.fixed_whole": "ignore_eos" in ast.unparse(
            found(source.tree("sglang/srt/managers/schedule_policy.py"), "_get_running_request_total_token_offset")
        ),
        "scheduler.expected_reply.windows_ask_again": re.search(
            r"is_hybrid_swa:\n\s+(?:self\.)?running_batch\.batch_is_full = False",
            ast.unparse(source.tree("sglang/srt/managers/scheduler.py")),
        ) is not None,
        "scheduler.prompt_tokens": _prompt_tokens(source, split),
        "lifted_rules": _lifted(source, split),
        "experts.triton.tuned": tuned_tiles(source, "sglang/srt/layers/moe/moe_runner/triton_utils/configs"),
    }  # fmt: skip


def _lifted(source: Source, split: bool) -> list[str]:
    """Limits of older releases that this one has no more."""
    drafts = split and "only supports EAGLE" in source.text(f"{HOOKS}/validation_hook.py")
    methods = source.text("sglang/srt/speculative/spec_info.py")
    sizes = source.text(f"{HOOKS}/fields/parallel.py") if split else ""
    return (
        ["drafts in a pipeline"] * drafts + ["DSpark drafts"] * ("DSPARK = auto()" in methods)
        + ["decode context parallelism"] * ("dcp_size:" in sizes)
        + ["prefill context parallelism"] * ("enable_prefill_cp:" in sizes)
        + ["DeepEP v2"] * (split and '"deepep_v2"' in source.text(f"{HOOKS}/fields/exec_.py"))
    )


def _number(pattern: str, text: str, place: int = 0) -> int | float:
    """The number in the ``place``-th match; whole where it is one."""
    matches = re.findall(pattern, text, re.MULTILINE)
    if len(matches) <= place:
        raise InputError(f"sglang: {pattern}: not found: the release words it otherwise")
    value = float(matches[place])
    return int(value) if value.is_integer() else value


def _reserve(text: str) -> dict[str, int | float]:
    terms = {name: _number(pattern, text, name == "dp_many_mib") for name, pattern in TERMS.items()}
    terms |= {name: terms[name] * 1024 for name in THOUSANDS}
    terms["rank_mib"] = 1024 / terms["rank_mib"]
    return {name: int(value) if float(value).is_integer() else value for name, value in terms.items()}


def _by_role(memory: ast.Module, split: bool) -> dict[str, Any]:
    """Terms that a release has since it tells phases and exchanges apart."""
    if not split:
        return {"reserve.by_role": False, "reserve.exchange_mib": 0, "reserve.exchange_prefill_graphs_mib": 0}
    decode, graphs = (
        ast.unparse(found(memory, name)) for name in ("reserve_for_deepep_a2a_mb", "reserve_for_graph_mb")
    )
    return {
        "reserve.by_role": "disaggregation_mode == 'decode'" in ast.unparse(memory),
        "reserve.exchange_mib": 1024 * _number(r"return (\d+) \* 1024", decode),
        "reserve.exchange_prefill_graphs_mib": 1024 * _number(r"'deepep':\s+reserved_mem \+= (\d+) \* 1024", graphs),
    }


def _tiers(node: ast.AST) -> dict[int, int]:
    """Device memory in MiB -> tokens of a step from there on, of a chain of ``if gpu_mem < ...``."""
    chain = next(one for one in ast.walk(node) if isinstance(one, ast.If) and "gpu_mem <" in ast.unparse(one.test))
    tiers, start = {}, 0
    while True:
        size = re.fullmatch(r"gpu_mem < (\d+) \* 1024", ast.unparse(chain.test))
        if size is not None:
            tiers[start] = _chunk(chain.body)
            start = int(size[1]) * 1024
        if len(chain.orelse) != 1 or not isinstance(chain.orelse[0], ast.If):
            break
        chain = chain.orelse[0]
        if not ast.unparse(chain.test).startswith("gpu_mem"):
            break
    tiers[start] = _chunk(chain.orelse if size is not None else [chain])
    kept = {size: tokens for size, tokens in tiers.items() if size == 0 or tokens != _before(tiers, size)}
    return dict(sorted(kept.items()))


def _before(tiers: dict[int, int], size: int) -> int:
    return tiers[max(other for other in tiers if other < size)]


def _chunk(body: list[ast.stmt]) -> int:
    text = "\n".join(ast.unparse(statement) for statement in body)
    return int(_number(r"chunked_prefill_size ?= ?(\d+)", text))


def _ranges(node: ast.AST) -> list[list[int | None]]:
    """First, last (none: the most) and step of every ``range``."""
    found_ranges: list[list[int | None]] = []
    for one in ast.walk(node):
        if isinstance(one, ast.Call) and ast.unparse(one.func) == "range":
            first, end, step = one.args
            last = None if "max_bs" in ast.unparse(end) else eval_sum(end) - 1
            found_ranges.append([eval_sum(first), last, eval_sum(step)])
    return sorted(found_ranges, key=lambda one: one[0] or 0)


def eval_sum(node: ast.expr) -> int:
    """An integer, or a sum of two."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return eval_sum(node.left) + eval_sum(node.right)
    said = literal(node)
    return said if isinstance(said, int) else 0


def _named(tree: ast.Module, name: str) -> list[str]:
    said = literal(found(tree, name))
    return list(map(str, said)) if isinstance(said, list) else []


def _fused(source: Source, split: bool) -> set[str]:
    """Model classes whose norms join all-reduces unasked."""
    if split:
        said = literal(found(source.tree(f"{HOOKS}/overrides.py"), "_FLASHINFER_ALLREDUCE_FUSION_ARCHS"))
        return set(said) if isinstance(said, set | frozenset) else set()
    for node in ast.walk(source.tree(SERVER)):
        if isinstance(node, ast.If) and "flashinfer_allreduce_fusion" in ast.unparse(node.test):
            lists = [one for one in ast.walk(node.test) if isinstance(one, ast.List)]
            if lists:
                return {str(literal(one)) for one in lists[0].elts}
    raise InputError("sglang: models of all-reduce fusion: not found")


def _prompt_tokens(source: Source, split: bool) -> int:
    tree = source.tree(f"{HOOKS}/fields/schedule.py" if split else SERVER)
    said = literal(found(tree, "max_prefill_tokens"))
    return said if isinstance(said, int) else 0
