"""Constants of vLLM that its profile copies, read from a release, in the profile's own shape."""

from __future__ import annotations

import ast
import re
from typing import Any

from tensorcast.errors import InputError
from tensorcast.validate.engines.source import Source, found, literal
from tensorcast.validate.engines.tuned_tiles import tuned_tiles

GIB, MIB_OF_GIB, MIB = "GiB_bytes", 1024, 1 << 20


def read_facts(source: Source) -> dict[str, Any]:
    """By the dotted name of the profile's field."""
    config, parallel = source.tree("vllm/config/vllm.py"), source.tree("vllm/config/parallel.py")
    defaults = found(source.tree("vllm/engine/arg_utils.py"), "get_batch_defaults")
    reduce = source.tree("vllm/compilation/passes/fusion/allreduce_rms_fusion.py")
    sizes = found(reduce, "FI_ALLREDUCE_FUSION_MAX_SIZE_MB")
    fused = {capability: {ranks: int(mib * MIB) for ranks, mib in of.items()} for capability, of in _mapping(sizes)}
    graphs = found(config, "_set_cudagraph_sizes")
    deepep = source.tree("vllm/model_executor/layers/fused_moe/prepare_finalize/deepep_ht.py")
    attention = source.text("vllm/v1/attention/backend.py")
    facts: dict[str, Any] = {
        "memory_fraction": literal(found(source.tree("vllm/config/cache.py"), "gpu_memory_utilization")),
        "step_tokens.from_mib": _tiers(defaults, "default_max_num_batched_tokens"),
        "scheduler.most_sequences": _tiers(defaults, "default_max_num_seqs"),
        "scheduler.block_tokens": literal(found(source.tree("vllm/config/cache.py"), "DEFAULT_BLOCK_SIZE")),
        "scheduler.queue": _queue(source.text("vllm/v1/engine/core_client.py")),
        "scheduler.blocks_found": "scheduled" if "cache_blocks(request, " in ast.unparse(
            found(source.tree("vllm/v1/core/kv_cache_manager.py"), "allocate_slots")
        ) else "read",
        "prefill_graphs.max_tokens": min(_capture(graphs)),
        "prefill_graphs.device_max_tokens": {"blackwell": max(_capture(graphs))} if len(_capture(graphs)) > 1 else {},
        "prefill_graphs.class_max_tokens": _capture_of_classes(source),
        "allreduce_norm.hopper": fused.get(90, {}),
        "allreduce_norm.blackwell": fused.get(100, {}),
        "allreduce_norm.b300": fused.get(103, {}),
        "halved_steps.decode_tokens": literal(found(parallel, "dbo_decode_token_threshold")),
        "halved_steps.prefill_tokens": literal(found(parallel, "dbo_prefill_token_threshold")),
        "halved_steps.exchanges": _supported(config),
        "shared_expert_stream_tokens": _annotated(source, "VLLM_SHARED_EXPERTS_STREAM_TOKEN_THRESHOLD"),
        "lifted_rules": [
            *["DSpark drafts"] * ("DSparkModelTypes" in source.text("vllm/config/speculative.py")),
            *["prefill context parallelism"] * ("supports_pcp: bool = True" in attention),
            *["MoonEP"] * ("'moonep'" in ast.unparse(parallel)),
        ],
        "uncompiled.architectures": _uncompiled(config),
        "deepep_ranks": literal(found(deepep, "available_rank_configs")),
        "vocabulary_unit": literal(found(
            source.tree("vllm/model_executor/layers/vocab_parallel_embedding.py"), "DEFAULT_VOCAB_PADDING_SIZE"
        )),
        "sliced_blocks.exchanges": _returned(parallel, "use_sequence_parallel_moe"),
        "kernels.humming_before_marlin": _humming(source),
        "lacking.sparse_latents": _sparse(source),
        "lacking.fp8_cache": _fp8_cache(source),
        "experts.triton.tuned": tuned_tiles(source, "vllm/model_executor/layers/fused_moe/configs"),
    }  # fmt: skip
    return facts


def _queue(text: str) -> list[float]:
    """As many requests more one that waits counts in the choice of a data-parallel rank, and the share of its cache
    from which on it does."""
    if said := re.search(r"waiting \* ([\d.]+) \+ running", text):
        return [float(said[1]) - 1, 0.0]
    said = re.search(r"score \+= waiting \* ([\d.]+) \* max\(0\.0, kv_cache_usage - ([\d.]+)\)", text)
    if said is None:
        raise InputError("vllm: core_client.py: how a data-parallel rank is chosen: not understood")
    return [float(said[1]), float(said[2])]


def _sparse(source: Source) -> list[int]:
    """Major compute capabilities that any of the backends for chosen latents runs on."""
    found: set[int] = set()
    for file in source.files("vllm/v1/attention/backends/mla"):
        if "_sparse" in file:
            said = re.findall(r"return capability\.major (?:==|in) \[?([\d, ]+)", source.text(file))
            found |= {int(number) for numbers in said for number in numbers.split(",")}
    return sorted(found)


def _fp8_cache(source: Source) -> int:
    """Least compute capability whose cache Triton's attention reads in FP8, times ten."""
    text = source.text("vllm/v1/attention/backends/triton_attn.py")
    said = re.search(r'startswith\("fp8"\) and not \(\s*current_platform\.has_device_capability\((\d+)\)', text)
    return int(said[1]) if said else 0


def _mapping(node: ast.AST) -> list[tuple[int, dict[int, float]]]:
    said = literal(node)
    return list(said.items()) if isinstance(said, dict) else []


def _tiers(node: ast.AST, name: str) -> dict[int, int]:
    """Device memory in MiB -> what the API server takes from there on, of a chain of ``if device_memory >= ...``."""
    chain = next(
        one for one in ast.walk(node)
        if isinstance(one, ast.If) and "device_memory >=" in ast.unparse(one.test) and name in ast.unparse(one)
    )  # fmt: skip
    tiers: dict[int, int] = {}
    while True:
        size = re.search(rf"device_memory >= (\d+) \* {GIB}", ast.unparse(chain.test))
        if size is None:
            raise InputError(f"vllm: get_batch_defaults: {ast.unparse(chain.test)}: not understood")
        tiers[int(size[1]) * MIB_OF_GIB] = _server(chain.body, name)
        if len(chain.orelse) == 1 and isinstance(chain.orelse[0], ast.If):
            chain = chain.orelse[0]
            continue
        tiers[0] = _server(chain.orelse, name)
        sizes = sorted(tiers)
        return {size: tiers[size] for i, size in enumerate(sizes) if not i or tiers[size] != tiers[sizes[i - 1]]}


def _server(body: list[ast.stmt], name: str) -> int:
    for statement in body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            pairs = statement.value
            if isinstance(pairs, ast.Dict):
                for key, value in zip(pairs.keys, pairs.values, strict=True):
                    if key is not None and "API_SERVER" in ast.unparse(key):
                        said = literal(value)
                        return int(said) if isinstance(said, int) else 0
    raise InputError(f"vllm: get_batch_defaults: {name}: not understood")


def _capture(node: ast.AST) -> list[int]:
    """Largest sizes of graphs: of ``min(..., 512)``, or of ``1024 if ... else 512``."""
    numbers: set[int] = set()
    for one in ast.walk(node):
        if isinstance(one, ast.IfExp):
            sides = (one.body, one.orelse)
            if all(isinstance(side, ast.Constant) and isinstance(side.value, int) for side in sides):
                numbers |= {int(literal(side)) for side in sides}  # type: ignore[call-overload]
        elif isinstance(one, ast.Call) and ast.unparse(one.func) == "min" and len(one.args) == 2:
            limit = one.args[1]
            if "num_seqs" in ast.unparse(one.args[0]) and isinstance(limit, ast.Constant):
                numbers.add(int(str(limit.value)))
    return sorted(numbers)


def _capture_of_classes(source: Source) -> dict[str, int]:
    """Model class -> what its config class sets as the largest size of graphs."""
    tree = source.tree("vllm/model_executor/models/config.py")
    own: dict[str, int] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            for one in ast.walk(node):
                if isinstance(one, ast.Assign) and ast.unparse(one.targets[0]).endswith("max_cudagraph_capture_size"):
                    own[node.name] = int(literal(one.value))  # type: ignore[call-overload]
    names = found(tree, "MODELS_CONFIG_MAP")
    pairs = zip(names.keys, names.values, strict=True) if isinstance(names, ast.Dict) else ()
    return {str(literal(k)): own[v.id] for k, v in pairs if k is not None and isinstance(v, ast.Name) and v.id in own}


def _supported(tree: ast.Module) -> list[str]:
    """Exchanges that dual-batch overlap runs with on CUDA."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("use_ubatching"):
            lists = [one for one in ast.walk(node) if isinstance(one, ast.List) and len(one.elts) > 1]
            if lists:
                named = [sorted(str(literal(item)) for item in one.elts) for one in lists]
                return min(named, key=len)
    raise InputError("vllm: use_ubatching: not found")


def _annotated(source: Source, name: str) -> object:
    return literal(found(source.tree("vllm/envs.py"), name))


def _uncompiled(tree: ast.Module) -> list[str]:
    """Classes whose graphs are broken by hand: a set of names, until 0.24.0 in the question that asks for them."""
    try:
        said = literal(found(tree, "DEFAULT_BREAKABLE_CUDAGRAPH_ARCHITECTURES"))
    except InputError:
        asked = (one.test for one in ast.walk(tree) if isinstance(one, ast.If))
        named = (test for test in asked if "'VLLM_USE_BREAKABLE_CUDAGRAPH' not in" in ast.unparse(test))
        said = [literal(one) for test in named for one in ast.walk(test) if isinstance(one, ast.Tuple)][:1]
        said = said[0] if said else ()
    return sorted(map(str, said)) if isinstance(said, set | frozenset | list | tuple) else []


def _returned(tree: ast.Module, name: str) -> list[str]:
    texts = (one.value for one in ast.walk(found(tree, name)) if isinstance(one, ast.Constant))
    return sorted(text for text in texts if isinstance(text, str) and re.fullmatch(r"[a-z0-9_]+", text))


def _humming(source: Source) -> list[int]:
    """Compute capabilities on which Humming's kernels go before Marlin's."""
    path = "vllm/model_executor/layers/quantization/utils/humming/priority.py"
    if path not in source.files("vllm/model_executor/layers/quantization/utils"):
        return []
    said = literal(found(source.tree(path), "_HUMMING_PREFERRED_CAPABILITIES"))
    return sorted(said) if isinstance(said, set) else []
