#!/usr/bin/env bash
# A cache's dtype that the help gives one model, and the code another.
#
# Package: vllm 0.11.0, 0.24.0 and 0.33.0 (Apache-2.0), config/cache.py and model_executor/models/config.py.
# Guess: DeepSeek-V3.2 keeps its cache in fp8 unless told otherwise, as the description of --kv-cache-dtype says.
# Seen: it did in 0.11.0. In 0.24.0 and 0.33.0 the sentence stands and the class leaves "auto" as it is, in bf16: half the
# tokens fit that the help promises. In 0.33.0 the same architecture as GLM-5 does turn to fp8, on SM100 alone, where no
# word of the description says so: the two models' commands without the option keep caches of other sizes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for release in 0.11.0 0.24.0 0.33.0; do
  python3 -m pip download -q --no-deps --only-binary :all: "vllm==$release" --python-version 3.11 -d "$folder" 2>/dev/null
done
python3 - "$folder" <<'PY'
import ast
import logging
import sys
import types
import zipfile
from pathlib import Path

logging.Logger.info_once = logging.Logger.info
parallel = types.SimpleNamespace(set_dcp_defaults=lambda **_: None)
seen = {}
for wheel in sorted(Path(sys.argv[1]).glob("vllm-*.whl")):
    release, files = wheel.name.split("-")[1].split("+")[0], zipfile.ZipFile(wheel)
    told = "DeepSeekV3.2) default to fp8" in files.read("vllm/config/cache.py").decode()
    tree = ast.parse(files.read("vllm/model_executor/models/config.py"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for name in ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"):
        if name not in classes:
            continue
        for family in (90, 100):
            # What the class asks of the platform, answered for one generation of GPUs.
            platform = types.ModuleType("vllm.platforms")
            platform.current_platform = types.SimpleNamespace(
                is_cuda=lambda: True, is_device_capability_family=lambda asked, family=family: asked == family)
            sys.modules |= {"vllm": types.ModuleType("vllm"), "vllm.platforms": platform}
            scope = {"VerifyAndUpdateConfig": object, "VllmConfig": object, "logger": logging.getLogger()}
            exec(compile(ast.Module([classes[name]], []), "config.py", "exec"), scope)
            cache = types.SimpleNamespace(cache_dtype="auto")
            scope[name].verify_and_update_config(types.SimpleNamespace(
                cache_config=cache, speculative_config=None, parallel_config=parallel,
                model_config=types.SimpleNamespace(hf_config=types.SimpleNamespace(index_topk=2048))))
            seen[release, name, family] = cache.cache_dtype
            print(f"vllm {release}, SM{family}, {name}: auto becomes {cache.cache_dtype}; help says fp8 for V3.2: {told}")
            assert told, "the description has changed"
for release, expected in (("0.11.0", "fp8_ds_mla"), ("0.24.0", "auto"), ("0.33.0", "auto")):
    for family in (90, 100):
        assert seen[release, "DeepseekV32ForCausalLM", family] == expected, "DeepSeek-V3.2's default has changed"
assert seen["0.33.0", "GlmMoeDsaForCausalLM", 90] == "auto" and seen["0.33.0", "GlmMoeDsaForCausalLM", 100][:3] == "fp8"
PY
