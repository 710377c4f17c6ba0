#!/usr/bin/env bash
# Data-parallel attention gathers the tokens of prompts by an all-reduce, where an all-gather moves half as much.
#
# Package: sglang 0.5.2, 0.5.8 and 0.5.14 (Apache-2.0): srt/layers/dp_attention.py, DpPaddingMode.get_dp_padding_mode.
# Guess: tokens of eight ranks come together before the experts as the class says of itself, by the "mode that minimizes the
# communication cost": where all ranks have as many, by all_gather_into_tensor.
# Seen: so in 0.5.2, and of decode steps in all three. Since 0.5.8 a step with prompts takes SUM_LEN whatever its ranks have:
# each puts its tokens into a buffer of zeros for all, and an all-reduce sums them. Over eight ranks a ring sends 1.75 times
# the buffer for that, and 0.875 times for an all-gather.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for release in 0.5.2 0.5.8 0.5.14; do
  python3 -m pip download -q --no-deps --only-binary :all: "sglang==$release" --python-version 3.11 -d "$folder" 2>/dev/null
done
python3 - "$folder" <<'PY'
import __future__
import ast
import inspect
import re
import sys
import zipfile
from enum import IntEnum, auto
from pathlib import Path
from typing import List, Optional

RANKS, TOKENS = 8, 4096
wanted = {"0.5.2": ("MAX_LEN", "MAX_LEN"), "0.5.8": ("SUM_LEN", "MAX_LEN"), "0.5.14": ("SUM_LEN", "MAX_LEN")}
wheels = {re.match(r"sglang-([^-]+)", one.name)[1]: one for one in Path(sys.argv[1]).glob("sglang-*.whl")}
assert set(wheels) == set(wanted), wheels
for release, expected in wanted.items():
    text = zipfile.ZipFile(wheels[release]).read("sglang/srt/layers/dp_attention.py").decode()
    (own,) = [one for one in ast.parse(text).body if isinstance(one, ast.ClassDef) and one.name == "DpPaddingMode"]
    names = {
        "IntEnum": IntEnum, "auto": auto, "List": List, "Optional": Optional, "get_attention_dp_size": lambda: RANKS,
        "_USE_ROCM700A_WA": False, "_DP_MAX_LEN_WITH_IDLE": False,
    }
    exec(compile(ast.Module([own], []), release, "exec", __future__.annotations.compiler_flag), names)
    chosen = names["DpPaddingMode"].get_dp_padding_mode
    by_phase = "is_extend_in_batch" in inspect.signature(chosen).parameters
    prompts, decode = (
        (chosen(extend, [TOKENS] * RANKS) if by_phase else chosen([TOKENS] * RANKS)).name for extend in (True, False)
    )
    print(f"sglang {release}: {TOKENS} tokens on each of {RANKS} ranks: prompts by {prompts}, decode steps by {decode}")
    assert (prompts, decode) == expected, "it chooses otherwise now"
    reduced = inspect.cleandoc(ast.get_source_segment(text, next(
        one for one in ast.parse(text).body if isinstance(one, ast.FunctionDef) and one.name == "_dp_gather_via_all_reduce"
    )))
    assert "global_tokens.fill_(0)" in reduced and "all_reduce(global_tokens" in reduced, "it is no sum now"
PY
