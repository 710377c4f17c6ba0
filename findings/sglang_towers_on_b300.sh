#!/usr/bin/env bash
# A newer device on which a vision tower's attention takes many times as long: another kernel runs there.
#
# Package: aiconfigurator-core 0.12.0 (Apache-2.0), tables encoder_attention of SGLang 0.5.14 and vLLM 0.24.0.
# Guess: attention over an image's patches takes about as long on a B300 as on a B200, in every engine.
# Seen: SGLang's rows of B200 are of FlashAttention-4, those of B300 and GB300 of Triton's kernel. From 1,024 patches on
# the same call takes 4.7 times as long in the median on B300; in vLLM's table, FlashAttention-4 on both, 0.78 times.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pandas==2.3.3 pyarrow==21.0.0
"$folder/venv/bin/pip" download -q --no-deps --only-binary :all: aiconfigurator-core==0.12.0 -d "$folder" 2>/dev/null
"$folder/venv/bin/python" - "$folder" <<'PY'
import io
import sys
import zipfile
from pathlib import Path

import pandas as pd

files = zipfile.ZipFile(next(Path(sys.argv[1]).glob("aiconfigurator_core-*.whl")))


def table(system: str, engine: str) -> pd.DataFrame:
    name = f"aiconfigurator_core/systems/data/{system}/encoder_attention/{engine}/encoder_attention_perf.parquet"
    return pd.read_parquet(io.BytesIO(files.read(name)))


sizes = ["batch_size", "isl", "num_heads", "head_dim", "attn_dtype"]
found = {}
for engine in ("sglang/0.5.14", "vllm/0.24.0"):
    tables = {system: table(system, engine) for system in ("b200_sxm", "b300_sxm", "gb300")}
    kernels = {system: "/".join(sorted(rows["kernel_source"].unique())) for system, rows in tables.items()}
    both = tables["b200_sxm"].merge(tables["b300_sxm"], on=sizes, suffixes=("", "_newer"))
    both = both[both["isl"] >= 1024]
    found[engine] = (both["latency_newer"] / both["latency"]).median()
    print(f"{engine}: kernels {kernels}; {len(both)} calls of 1,024 patches and more take {found[engine]:.2f} times as "
          "long on B300 as on B200, median")
    if engine.startswith("sglang"):
        assert kernels["b200_sxm"] == "flash_attention_v4" and kernels["b300_sxm"] == kernels["gb300"] == "triton"
assert found["sglang/0.5.14"] > 4, "SGLang's towers are no slower on B300 any more"
assert 0.6 < found["vllm/0.24.0"] < 1.1, "vLLM's towers take other times on B300"
PY
