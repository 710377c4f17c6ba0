#!/usr/bin/env bash
# Data-parallel ranks of a model without experts, and whether they wait for one another.
#
# Package: vllm 0.13.0 and 0.33.0 (Apache-2.0): v1/engine/core.py, v1/worker/dp_utils.py.
# Guess: with --data-parallel-size 8 a dense model is eight engines behind one port, as they have nothing to exchange.
# Seen: so since 0.14.0. To 0.13.0 its ranks were made as those of a mixture of experts: each step began with an
# all-reduce of how many tokens every rank has, to the most of which graphs were filled up, and a rank without requests
# ran empty batches until all had none. One long prompt so held up the replies of the seven others. A command or a
# benchmark of a dense model with data parallelism says another thing in either.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for release in 0.13.0 0.33.0; do
  python3 -m pip download -q --no-deps --only-binary :all: "vllm==$release" --python-version 3.12 -d "$folder" 2>/dev/null
done
python3 - "$folder" <<'PY'
import ast
import contextlib
import logging
import sys
import types
import zipfile
from pathlib import Path

TURNS, NOTHING = 100, types.SimpleNamespace


class Waits(Exception):
    """The rank sleeps until a request comes."""


class Done(Exception):
    """So many turns of its loop were enough."""


def chosen(core: ast.Module, moe: bool) -> str:
    """The class of engine that the release makes for one of two data-parallel ranks."""
    named = {"DPEngineCoreProc", "EngineCoreProc"}
    for choice in (node for node in ast.walk(core) if isinstance(node, ast.If)):
        made = [
            next((call.func.id for node in branch for call in ast.walk(node) if isinstance(call, ast.Call)
                  and getattr(call.func, "id", "") in named), "") for branch in (choice.body, choice.orelse)
        ]
        if set(made) == named:
            scope = dict(
                parallel_config=NOTHING(data_parallel_size=2), dp_rank=0, data_parallel=True,
                vllm_config=NOTHING(model_config=NOTHING(is_moe=moe)),
            )
            return made[0] if eval(compile(ast.Expression(choice.test), "choice", "eval"), scope) else made[1]
    raise AssertionError("no choice between two classes")


def idle(core: ast.Module, name: str) -> int:
    """Empty batches that a rank without requests runs in so many turns of its released loop, while another has some."""
    found = next(node for node in core.body if isinstance(node, ast.ClassDef) and node.name == name)
    loop = next(node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == "run_busy_loop")
    loop.decorator_list, scope = [], {"logger": logging.getLogger("vllm")}
    exec(compile(ast.Module([loop], []), name, "exec"), scope)
    seen = NOTHING(turns=0, empty=0)

    class Rank:
        engines_running = name == "DPEngineCoreProc"  # a wave is under way: only there ranks tell each other
        model_executor, capture_iteration_details = NOTHING(is_sleeping=False), staticmethod(contextlib.nullcontext)
        eep_scaling_state, scheduler = None, NOTHING(has_unfinished_requests=lambda: False, has_requests=lambda: False)

        def __getattr__(self, what: str):
            return lambda *arguments, **named: False

        def _handle_shutdown(self) -> bool:
            return True

        def _process_input_queue(self) -> None:
            if not self.engines_running:
                raise Waits
            seen.turns += 1
            if seen.turns > TURNS:
                raise Done

        def execute_dummy_batch(self) -> None:
            seen.empty += 1

        def _has_global_unfinished_reqs(self, own: bool) -> bool:
            return True

    try:
        scope["run_busy_loop"](Rank())
    except (Waits, Done):
        return seen.empty
    raise AssertionError("the loop has ended")


made, empty = {}, {}
for wheel in sorted(Path(sys.argv[1]).glob("vllm-*.whl")):
    release, files = wheel.name.split("-")[1], zipfile.ZipFile(wheel)
    core = ast.parse(files.read("vllm/v1/engine/core.py"))
    for kind in ("dense", "experts"):
        made[release, kind] = chosen(core, kind == "experts")
        empty[release, kind] = idle(core, made[release, kind])
        print(f"vllm {release}, {kind}: {made[release, kind]}; a rank without requests runs {empty[release, kind]} empty "
              f"batches in {TURNS} steps of another")
    if release == "0.13.0":
        text = files.read("vllm/v1/worker/dp_utils.py").decode()
        assert "dist.all_reduce(tensor, group=group)" in text and "is_moe" not in text, "its steps are told otherwise"
assert [made[r, "dense"] for r in ("0.13.0", "0.33.0")] == ["DPEngineCoreProc", "EngineCoreProc"]
assert empty["0.13.0", "dense"] == empty["0.13.0", "experts"] == empty["0.33.0", "experts"] == TURNS
assert empty["0.33.0", "dense"] == 0
PY
