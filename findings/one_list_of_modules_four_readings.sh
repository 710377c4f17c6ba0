#!/usr/bin/env bash
# A list of modules that stay in bf16, and who reads what in it.
#
# Packages: transformers 5.24.0, vllm 0.33.0, sglang 0.5.23 (all Apache-2.0): their functions that hold a module's name
# against modules_to_not_convert of a checkpoint's quantization_config.
# Guess: a name in the list keeps that module and all beneath it, whoever loads the checkpoint.
# Seen: "model.layers.1.self_attn" keeps its projections for transformers, which writes such FP8 checkpoints, and
# SGLang; vLLM's FP8 looks for whole names and makes them FP8, its AWQ for parts of names. "self_attn" keeps them for
# SGLang alone of those that read FP8. Under AWQ both engines leave layers 10 to 19 in bf16 for "model.layers.1", and
# for "mlp.gate", a router, the first half of a dense MLP, too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for wheel in transformers==5.24.0 vllm==0.33.0 sglang==0.5.23; do
  python3 -m pip download -q --no-deps --only-binary :all: "$wheel" --python-version 3.12 -d "$folder" 2>/dev/null
done
python3 - "$folder" <<'PY'
import ast
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import List, Literal

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def released(package: str, path: str, *names: str) -> dict[str, object]:
    """Functions and tables of a wheel's file, by name."""
    files = zipfile.ZipFile(next(Path(sys.argv[1]).glob(f"{package}-*.whl")))
    body = ast.parse(files.read(path)).body
    wanted = [
        node for node in body if getattr(node, "name", None) in names
        or isinstance(node, ast.AnnAssign) and getattr(node.target, "id", None) in names
    ]
    scope = dict(re=re, Mapping=Mapping, MappingProxyType=MappingProxyType, List=List, Literal=Literal)
    exec(compile(ast.Module(wanted, []), path, "exec"), scope)
    return scope


convert = released("transformers", "transformers/quantizers/quantizers_utils.py", "should_convert_module")
vllm = released("vllm", "vllm/model_executor/layers/quantization/utils/quant_utils.py", "is_layer_skipped")
layers = "sglang/srt/layers/quantization"
sglang = released("sglang", f"{layers}/utils.py", "_module_path_match", "_FALLBACK_FUSED_SHARDS", "is_layer_skipped")
sglang_awq = released("sglang", f"{layers}/awq/awq.py", "is_layer_skipped_awq")
modes = {}
for method in ("fp8", "auto_awq"):  # how vLLM's two methods ask
    files = zipfile.ZipFile(next(Path(sys.argv[1]).glob("vllm-*.whl")))
    text = files.read(f"vllm/model_executor/layers/quantization/{method}.py").decode()
    modes[method] = set(re.findall(r'"(exact|substring|suffix)"\n\s+\)|match_mode="(\w+)"', text))
assert modes == {"fp8": {("exact", "")}, "auto_awq": {("", "substring")}}, modes

READERS = {
    "transformers": lambda name, kept: not convert["should_convert_module"](own(name), kept),
    "vLLM, FP8": lambda name, kept: vllm["is_layer_skipped"](name, kept, FUSED, match_mode="exact"),
    "SGLang, FP8": lambda name, kept: sglang["is_layer_skipped"](name, kept, FUSED),
    "vLLM, AWQ": lambda name, kept: vllm["is_layer_skipped"](name, kept, FUSED, match_mode="substring"),
    "SGLang, AWQ": lambda name, kept: sglang_awq["is_layer_skipped_awq"](name, kept),
}


def own(name: str) -> str:
    """transformers has the first of what engines join."""
    head, _, last = name.rpartition(".")
    return f"{head}.{FUSED.get(last, [last])[0]}"


ASKED = [
    ("model.layers.1.self_attn", "model.layers.1.self_attn.qkv_proj", (True, False, True, True, True)),
    ("self_attn", "model.layers.1.self_attn.qkv_proj", (False, False, True, True, True)),
    ("model.layers.1", "model.layers.12.self_attn.o_proj", (False, False, False, True, True)),
    ("mlp.gate", "model.layers.0.mlp.gate_up_proj", (False, False, False, True, True)),
]
for kept, name, expected in ASKED:
    found = tuple(bool(reads(name, [kept])) for reads in READERS.values())
    print(f"[{kept}] leaves {name} in bf16: " + ", ".join(f"{who} {'yes' if it else 'no'}" for who, it in zip(READERS, found)))
    assert found == expected, f"{kept}: {expected} before"
PY
