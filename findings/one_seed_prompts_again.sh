#!/usr/bin/env bash
# Random prompts that a sweep sends again, to a server that has read them.
#
# Packages: vllm 0.33.0 (Apache-2.0), benchmarks/datasets/utils.py; sglang 0.5.23 (Apache-2.0), benchmark/datasets/common.py.
# Guess: runs of a client with random prompts at several loads, or of several lengths, have nothing in common.
# Seen: each run begins with the same seed. vLLM's prompts begin at the same places of the vocabulary whatever their length
# and that of replies, as a range of one length draws nothing; SGLang's first 80 lengths are the same of 80 requests and of
# 320, and its k-th prompt is the k-th text of a shuffled file, cut. Neither empties the cache between runs: of 64 users'
# first prompts none is read after a run of 80, and a public page's first tokens take 0.6 s (Llama-3.1-70B on 8 A100, 8,000
# tokens), where reading them takes 14 s at the peak of the machine.
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
tokens = types.SimpleNamespace(num_special_tokens_to_add=lambda: 0, vocab_size=200_000)


def begins(isl: int, osl: int, count: int) -> list[int]:
    """Where vLLM's prompts begin, as its client draws them unasked."""
    return list(vllm["get_sampling_params"](np.random.default_rng(0), count, 0.0, isl, osl, tokens)[2])


def lengths(count: int) -> list[int]:
    """SGLang's prompts, up to 8,000 tokens."""
    np.random.seed(1)
    return list(map(int, sglang["compute_random_lens"](8000, 0.0, count)))


same = begins(2048, 2048, 500) == begins(128, 2048, 500) == begins(2048, 128, 500)
print(f"vLLM's 500 prompts of 2,048 tokens begin as those of 128 do: {same}")
few, many = lengths(80), lengths(320)
print(f"SGLang's first lengths of 80 requests are the first of 320: {few == many[:80]}; tokens {sum(few)}, {sum(many)}")
assert same and few == many[:80], "what the clients draw has changed"
assert (sum(few), sum(many)) == (300_020, 1_273_893), "no longer what the public page reports"
PY
