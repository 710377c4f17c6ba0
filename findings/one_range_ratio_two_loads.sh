#!/usr/bin/env bash
# One flag of two load generators, the same default, and another load.
#
# Packages: vllm 0.33.0 (Apache-2.0), benchmarks/datasets/utils.py; sglang 0.5.23 (Apache-2.0), benchmark/datasets/common.py.
# Guess: --random-range-ratio, whose default is 0 in both clients, makes random lengths the same way: at 0 all alike.
# Seen: vLLM draws from (1-r)L to (1+r)L, so 0 keeps every length at L and the mean is L whatever r is; SGLang draws from
# rL to L, so 0 is anything from one token to L, half as long in the mean, and only 1 is fixed, which vLLM refuses. The same
# command line so measures twice the tokens on one engine, and a published "1024 in, 1024 out" needs the client's name.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.1
for wheel in vllm==0.33.0 sglang==0.5.23; do
  python3 -m pip download -q --no-deps --only-binary :all: "$wheel" --python-version 3.11 -d "$folder" 2>/dev/null
done
"$folder/venv/bin/python" - "$folder" <<'PY'
import ast
import logging
import math
import sys
import types
import zipfile
from pathlib import Path

import numpy as np


def released(package: str, file: str, *names: str) -> dict:
    """Functions of a released file, alone: the rest of it needs torch."""
    wheel = next(Path(sys.argv[1]).glob(f"{package}-*.whl"))
    tree = ast.parse(zipfile.ZipFile(wheel).read(file))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    for function in tree.body:
        function.returns = None
        for argument in function.args.args:
            argument.annotation = None
    scope = {"np": np, "math": math, "logger": logging.getLogger()}
    exec(compile(tree, file, "exec"), scope)
    return scope


vllm = released("vllm", "vllm/benchmarks/datasets/utils.py", "get_sampling_params", "_resolve_range_ratios")
sglang = released("sglang", "sglang/benchmark/datasets/common.py", "compute_random_lens")
tokens = types.SimpleNamespace(num_special_tokens_to_add=lambda: 0, vocab_size=1000)
np.random.seed(0)
seen = {}
for ratio in (0.0, 0.8, 1.0):
    try:
        drawn = vllm["get_sampling_params"](np.random.default_rng(0), 20_000, ratio, 1024, 1024, tokens)[1]
        seen["vllm", ratio] = (drawn.min(), drawn.max(), round(drawn.mean(), -1))
    except ValueError as refused:
        seen["vllm", ratio] = str(refused)
    drawn = np.array(sglang["compute_random_lens"](1024, ratio, 20_000))
    seen["sglang", ratio] = (drawn.min(), drawn.max(), round(drawn.mean(), -1))
for (engine, ratio), said in seen.items():
    print(f"{engine} at {ratio}, 1024 asked: {said if isinstance(said, str) else 'from %d to %d, mean about %d' % said}")
assert seen["vllm", 0.0] == (1024, 1024, 1020) and seen["sglang", 0.0] == (1, 1024, 510), "the defaults have changed"
assert seen["vllm", 0.8][:2] == (204, 1844) and seen["sglang", 0.8][:2] == (819, 1024), "the widths have changed"
assert isinstance(seen["vllm", 1.0], str) and seen["sglang", 1.0][:2] == (1024, 1024), "the bound has changed"
PY
