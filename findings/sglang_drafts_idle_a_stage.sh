#!/usr/bin/env bash
# Drafts in a pipeline that leave a stage without work.
#
# Package: sglang 0.5.23 (Apache-2.0): srt/managers/scheduler_pp_mixin.py.
# Guess: with as many micro-batches as stages each stage always has one to run, whether drafts are checked or not.
# Seen: a step that checks drafts is launched after the oldest micro-batch's tokens are read, others before. As many
# micro-batches as stages are made all the same, so with drafts one of them always waits: of two stages each runs half
# of the time, of four three quarters. The code says so of the order ("caps every stage at (pp_size - 1) / pp_size").
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip download -q --no-deps --only-binary :all: sglang==0.5.23 --python-version 3.11 -d "$folder" 2>/dev/null
python3 - "$folder" <<'PY'
import ast
import sys
import types
import zipfile
from pathlib import Path

wheel = zipfile.ZipFile(next(Path(sys.argv[1]).glob("sglang-*.whl")))
source = wheel.read("sglang/srt/managers/scheduler_pp_mixin.py").decode()
tree = ast.parse(source)
tree.body = [node for node in tree.body if getattr(node, "name", "") == "_pp_exchange_outputs_before_forward"]
scope: dict = {}
exec(compile("from __future__ import annotations\n" + ast.unparse(tree), "released", "exec"), scope)
first = scope["_pp_exchange_outputs_before_forward"]


def batch(extends: bool) -> object:
    mode = types.SimpleNamespace(is_extend=lambda: extends)
    return types.SimpleNamespace(forward_mode=mode, is_extend_in_batch=extends)


def busy(pp: int, waits: bool, rounds: int = 300) -> float:
    """Share of the time in which the first of ``pp`` stages runs, of steps of one second a stage, in the loop's order:
    read the oldest micro-batch's tokens, then launch the next, or the other way round."""
    free, done, host = [0.0] * pp, {}, 0.0
    for launch in range(rounds * pp):
        at = host
        for stage in range(pp):
            at = free[stage] = max(at, free[stage]) + 1.0
        done[launch] = at
        oldest = launch - pp + 1 + waits
        host = max(host, done[oldest]) if oldest >= 0 else host
    return rounds * pp / free[0]


asked = {"plain decode": (False, False), "prompts, with drafts": (True, True), "checked drafts": (False, True)}
order = {name: first(batch(extends), drafts, False, 0) for name, (extends, drafts) in asked.items()}
loop = next(node for node in ast.walk(ast.parse(source)) if getattr(node, "name", "") == "init_pp_loop_state")
made = "get_parallel().pp_size + get_parallel().pp_async_batch_depth" in ast.unparse(loop)
shares = {pp: (busy(pp, order["plain decode"]), busy(pp, order["checked drafts"])) for pp in (2, 4)}
for name, waits in order.items():
    when = "before" if waits else "after"
    print(f"sglang 0.5.23: {name}: tokens of the oldest micro-batch are read {when} the launch")
for pp, (plain, drafted) in shares.items():
    print(f"  {pp} stages and micro-batches: the first stage runs {plain:.0%} of the time, with drafts {drafted:.0%}")
assert made, "there are other numbers of micro-batches now"
assert [*order.values()] == [False, False, True], "the order is another now"
assert all(abs(plain - 1) < 0.01 and abs(drafted - (pp - 1) / pp) < 0.01 for pp, (plain, drafted) in shares.items())
PY
