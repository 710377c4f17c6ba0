#!/usr/bin/env bash
# Memory that a server leaves for a step's activations where several ranks read prompts, each its part.
#
# Package: sglang 0.5.23 (Apache-2.0): srt/arg_groups/memory_hook.py, parallel_hook.py, and resolution_hooks.py, which
# says in which order they run; srt/model_executor/pool_configurator.py.
# Guess: GPUs that read 2,048 prompt tokens a step each leave as much memory for it, whether there are one or sixteen.
# Seen: --chunked-prefill-size is of all ranks of attention DP, and 1.5 MiB are left on every GPU for each of its tokens
# before it is dealt out to them. For 2,048 tokens a rank, 16 ranks of H200 leave 51 GiB of 140 where one leaves 10; for
# 8,192, 195 GiB: a share below 0, with which the server ends by "Not enough memory. Please try to increase
# --mem-fraction-static". Public commands for many ranks give a share of their own, and so run.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip download -q --no-deps --only-binary :all: sglang==0.5.23 --python-version 3.12 -d "$folder" 2>/dev/null
python3 - "$folder" <<'PY'
import ast
import copy
import logging
import re
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

MIB_OF_H200, NOTHING = 143_771, types.SimpleNamespace
files = zipfile.ZipFile(next(Path(sys.argv[1]).glob("sglang-*.whl")))
ROOT = "sglang/srt"


def declare(arguments: Any, name: str, **values: Any) -> None:
    vars(arguments).update(values)


def released(file: str, *names: str) -> dict[str, Any]:
    """Functions of the release, over plain arguments: no graphs are captured, no model is looked at."""
    body = ast.parse(files.read(f"{ROOT}/arg_groups/{file}")).body
    wanted = [node for node in body if getattr(node, "name", "") in names]
    off = NOTHING(DISABLED="disabled", BREAKABLE="breakable")
    scope = dict(
        Any=Any, copy=copy, logger=logging.getLogger("sglang"), declare_resolution=declare, Backend=off,
        resolving_view=lambda one: one, resolved_view=lambda one: one, Phase=NOTHING(PREFILL="prefill"),
        get_device_memory_capacity=lambda device: MIB_OF_H200, use_mla_backend=lambda one: True,
        model_config_of=lambda one: NOTHING(is_multimodal=False), post_capture_kv_sizing_planned=lambda one: False,
        attn_dp_enabled_of=lambda one: one.attn_dp_size > 1, get_platform=lambda: NOTHING(is_xpu=False),
        envs=NOTHING(SGLANG_RUST_SERVER=NOTHING(get=lambda: False)), run_post_process_pass=lambda one, step: None,
        _graph_may_capture_collectives=lambda one: False, _data_parallelism_defaults=None,
        _tp_lm_head_all_to_all_default=None, _dp_lm_head_validation=None,
    )
    exec(compile(ast.Module(wanted, []), file, "exec"), scope)
    return scope


for name in ("", ".srt", ".srt.arg_groups", ".srt.arg_groups.model_overrides"):
    sys.modules[f"sglang{name}"] = types.ModuleType("sglang" + name)
graphs = sys.modules["sglang.srt.arg_groups.cuda_graph_hook"] = types.ModuleType("cuda_graph_hook")
for what in ("cpu_graph", "decode_cuda_graph", "prefill_cuda_graph"):
    setattr(graphs, f"generate_{what}_batch_sizes", None)
vision = sys.modules["sglang.srt.arg_groups.model_overrides.qwen3_vl"] = types.ModuleType("qwen3_vl")
vision.expand_multimodal_decode_graph_to_running_limit = lambda *arguments: None

memory = released("memory_hook.py", "handle_gpu_memory_settings", "reserve_for_graph_mb", "reserve_for_deepep_a2a_mb")
parallel = released("parallel_hook.py", "handle_data_parallelism")
order = re.findall(r'"(handle_gpu_memory_settings|handle_data_parallelism)"',
                   files.read(f"{ROOT}/arg_groups/resolution_hooks.py").decode())
steps = {"handle_gpu_memory_settings": memory, "handle_data_parallelism": parallel}
says = "Not enough memory. Please try to increase --mem-fraction-static."
assert says in files.read(f"{ROOT}/model_executor/pool_configurator.py").decode()


def server(ranks: int, tokens_each: int) -> types.SimpleNamespace:
    step = dict(backend="disabled", max_bs=1, bs=[1])
    arguments = NOTHING(
        device="cuda", tp_size=16, pp_size=1, dp_size=1, attn_dp_size=ranks, chunked_prefill_size=ranks * tokens_each,
        cuda_graph_config=NOTHING(decode=NOTHING(**step), prefill=NOTHING(**step)), max_running_requests=None,
        mem_fraction_static=None, language_only=False, language_model_only=False, disaggregation_mode="null",
        max_prefill_tokens=16384, moe_a2a_backend="none", enable_symm_mem=False, mm_enable_dp_encoder=False,
        schedule_conservativeness=1.0,
    )
    for name in order:
        steps[name][name](arguments)
    return arguments


logging.disable(logging.WARNING)
left = {}
for ranks, tokens in ((1, 2048), (16, 2048), (1, 8192), (16, 8192)):
    found = server(ranks, tokens)
    assert found.chunked_prefill_size == tokens, "a rank reads another number of tokens"
    left[ranks, tokens] = (1 - found.mem_fraction_static) * MIB_OF_H200 / 1024
    print(f"{ranks:2} ranks of {tokens:,} tokens each on 16 H200: mem_fraction_static {found.mem_fraction_static:.3f}, "
          f"{left[ranks, tokens]:.0f} GiB of {MIB_OF_H200 / 1024:.0f} left free")
assert left[1, 2048] < 11 and left[16, 2048] > 50 and server(16, 8192).mem_fraction_static < 0 < left[1, 8192] < 20
PY
