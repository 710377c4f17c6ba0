#!/usr/bin/env bash
# The "random" prompts of a load generator are tokens in a row.
#
# Package: vllm 0.33.0 (Apache-2.0), benchmarks/datasets/datasets.py (RandomDataset.generate_token_sequence).
# Guess: `vllm bench serve --dataset-name random` sends tokens that are drawn one by one, as the name says.
# Seen: only the first token is drawn; each after it is the next number of the vocabulary. Such tokens resemble one another
# to a router far more than those of texts: 64 users of a public run, whose client does the same, hit 120 of 256 experts a
# layer, where independent and even choices of 8 hit 222 (SemiAnalysisAI/InferenceX#863): a benchmark reads fewer weights.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.1
python3 -m pip download -q --no-deps --only-binary :all: vllm==0.33.0 --python-version 3.11 -d "$folder" 2>/dev/null
"$folder/venv/bin/python" - "$folder" <<'PY'
import ast
import sys
import types
import zipfile
from pathlib import Path

import numpy as np

file = "vllm/benchmarks/datasets/datasets.py"
tree = ast.parse(zipfile.ZipFile(next(Path(sys.argv[1]).glob("vllm-*.whl"))).read(file))
maker = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "RandomDataset")
tree.body = [
    node for node in maker.body if isinstance(node, ast.FunctionDef) and node.name == "generate_token_sequence"
]
tree.body[0].returns = None
for argument in (*tree.body[0].args.args, *tree.body[0].args.kwonlyargs):
    argument.annotation = None


def to_text_and_back(*, token_sequence: list, **_: object) -> tuple:
    """A tokenizer whose tokens stay what they are."""
    return " ".join(map(str, token_sequence)), token_sequence, 0


scope = {"np": np, "gen_prompt_decode_to_target_len": to_text_and_back}
exec(compile(tree, file, "exec"), scope)
random = np.random.default_rng(0)
in_a_row = []
for index in range(200):
    prompt, length, _ = scope["generate_token_sequence"](
        types.SimpleNamespace(_rng=random), tokenizer=None, prefix_token_ids=[], prefix_len=0, vocab_size=50_000,
        input_len=1024, offset=int(random.integers(0, 50_000)), index=index, allowed_tokens=np.arange(50_000),
    )
    tokens = np.array(prompt.split(), dtype=int)
    in_a_row.append(float(np.mean(np.diff(tokens) % 50_000 == 1)))
print(f"200 prompts of {length} tokens: {100 * min(in_a_row):.0f} to {100 * max(in_a_row):.0f} % are their neighbour's successor")
assert min(in_a_row) == 1.0, f"now {min(in_a_row):.2f} of the tokens follow one another"
PY
