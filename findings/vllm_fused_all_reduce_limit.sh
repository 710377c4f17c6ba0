#!/usr/bin/env bash
# A documented default that the code does not have: up to which size vLLM joins an all-reduce with the norm after it.
#
# Package: vllm 0.33.0 and 0.24.0 (Apache-2.0), config/compilation.py and compilation/passes/fusion/
# allreduce_rms_fusion.py.
# Guess: the table in the description of fi_allreduce_fusion_max_size_mb is the default that it describes.
# Seen: it says 1 MB for 8 Hopper GPUs, and nothing of SM103; the table that runs has 0.5 MB there, and rows of its own
# for SM103. With a hidden size of 7168 in bf16 that is 36 tokens instead of 73: a decode batch of 64 is not fused.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for release in 0.33.0 0.24.0; do
  python3 -m pip download -q --no-deps --only-binary :all: "vllm==$release" -d "$folder" 2>/dev/null
done
python3 - "$folder" <<'PY'
import ast
import re
import sys
import zipfile
from pathlib import Path

for wheel in sorted(Path(sys.argv[1]).glob("vllm-*.whl")):
    files = zipfile.ZipFile(wheel)
    said = files.read("vllm/config/compilation.py").decode()
    text = said[said.index("FI_ALLREDUCE_FUSION_MAX_SIZE_MB = {"):]
    told = ast.literal_eval(text[text.index("{") : text.index("}, where key")].rstrip() + "}")
    tree = ast.parse(files.read("vllm/compilation/passes/fusion/allreduce_rms_fusion.py"))
    runs = next(ast.literal_eval(node.value) for node in ast.walk(tree)
                if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "FI_ALLREDUCE_FUSION_MAX_SIZE_MB")
    release = re.match(r"vllm-([^-]+)", wheel.name)[1]
    print(f"vllm {release}: 8 Hopper GPUs: {told[90][8]} MB as described, {runs[90][8]} MB in the code; "
          f"SM103 described: {103 in told}, in the code: {runs.get(103)}")
    assert told[90][8] == 1 and runs[90][8] == 0.5, "description and code have come together"
    assert 103 not in told and 103 in runs, "SM103 is described, or gone"
PY
