#!/usr/bin/env bash
# Checkpoints named NVFP4 whose attention is in bf16 and whose cache is in fp8.
#
# Package: aiconfigurator-core 0.12.0 (Apache-2.0), model_configs/: NVIDIA's own hf_quant_config.json of its checkpoints.
# Guess: a checkpoint that says quant_algo NVFP4 stores its matmuls in NVFP4, and says nothing of the cache.
# Seen: of 18 that name one algorithm for the whole model, 15 list attention under exclude_modules, and all 18 say FP8 of
# the cache, which engines then keep so unasked: twice the tokens fit, and attention reads four times the weights.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip download -q --no-deps --only-binary :all: aiconfigurator-core==0.12.0 --python-version 3.11 -d "$folder" 2>/dev/null
python3 - "$folder" <<'PY'
import json
import re
import sys
import zipfile
from pathlib import Path

(wheel,) = Path(sys.argv[1]).glob("aiconfigurator_core-*.whl")
files = zipfile.ZipFile(wheel)
kept, caches = {}, []
for name in sorted(files.namelist()):
    if not (found := re.search(r"model_configs/(nvidia--.*NVFP4)_hf_quant_config\.json$", name)):
        continue
    said = json.loads(files.read(name))["quantization"]
    if said["quant_algo"] != "NVFP4":
        continue  # several algorithms, each for modules that it lists
    excluded = " ".join(said.get("exclude_modules", []))
    kept[found[1]] = bool(re.search(r"self_attn|mixer\.(q|k|v)_proj", excluded))
    caches.append(said.get("kv_cache_quant_algo"))
    print(f"{found[1]}: attention {'in bf16' if kept[found[1]] else 'in NVFP4'}, cache {caches[-1]}")
print(f"{sum(kept.values())} of {len(kept)} leave attention out; caches: {sorted(set(caches))}")
assert (len(kept), sum(kept.values()), set(caches)) == (18, 15, {"FP8"}), "NVIDIA's checkpoints have changed"
PY
