#!/usr/bin/env bash
# An interval between looks for requests that prompts cut short.
#
# Package: sglang 0.5.14 and 0.5.23 (Apache-2.0): srt/managers/scheduler_recv_skipper.py (in 0.5.23
# scheduler_components/recv_skipper.py), srt/environ.py.
# Guess: with --scheduler-recv-interval 30 the scheduler looks for requests once in 30 steps, whatever these do.
# Seen: a decode step counts 1, any other 1000. After every step with prompts it looks at once: requests that come while
# prompts are read wait for no interval, those that come while replies are written wait for half of it in the mean. Under
# load an interval of 30 is so far less than it says.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for release in 0.5.14 0.5.23; do
  python3 -m pip download -q --no-deps --only-binary :all: "sglang==$release" --python-version 3.11 -d "$folder" 2>/dev/null
done
python3 - "$folder" <<'PY'
import ast
import re
import sys
import types
import zipfile
from enum import IntEnum, auto
from pathlib import Path


class Mode(IntEnum):
    EXTEND, DECODE, TARGET_VERIFY, IDLE, PREBUILT = (auto() for _ in range(5))


def skipper(files: zipfile.ZipFile) -> object:
    """The released class, its interval 30, its weights as srt/environ.py has them unless told otherwise."""
    name = next(name for name in files.namelist() if name.endswith("recv_skipper.py"))
    weights = dict(re.findall(r"(SGLANG_SCHEDULER_RECV_SKIPPER_WEIGHT_\w+) = EnvInt\((\d+)\)",
                              files.read("sglang/srt/environ.py").decode()))
    envs = types.SimpleNamespace(**{key: types.SimpleNamespace(get=lambda value=value: int(value))
                                    for key, value in weights.items()})
    tree = ast.parse(files.read(name))
    tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    scope = {"envs": envs, "ForwardMode": Mode, "ServerArgs": object, "ScheduleBatch": object, "List": list,
             "Optional": type("Optional", (), {"__class_getitem__": lambda cls: object}),
             "get_schedule": lambda: types.SimpleNamespace(scheduler_recv_interval=30),
             "get_parallel": lambda: types.SimpleNamespace(attn_dp_enabled=False)}
    exec(compile("from __future__ import annotations\n" + ast.unparse(tree), name, "exec"), scope)
    made = scope["SchedulerRecvSkipper"]
    try:
        return made()
    except TypeError:
        return made(types.SimpleNamespace(scheduler_recv_interval=30, enable_dp_attention=False))


def looks(one: object, steps: list[Mode], batches: bool) -> list[int]:
    """After which of these steps it looks."""
    told = [types.SimpleNamespace(forward_mode=step, recv_skipper_forward_mode=step) if batches else step for step in steps]
    return [i + 1 for i, step in enumerate(told) if one.handle(step)]


for wheel in sorted(Path(sys.argv[1]).glob("sglang-*.whl")):
    files, release = zipfile.ZipFile(wheel), re.match(r"sglang-([^-]+)", wheel.name)[1]
    batches = release == "0.5.23"
    decoding = looks(skipper(files), [Mode.DECODE] * 60, batches)
    mixed = looks(skipper(files), [*[Mode.DECODE] * 5, Mode.EXTEND, *[Mode.DECODE] * 5, Mode.EXTEND], batches)
    print(f"sglang {release}, interval 30: of 60 decode steps it looks after {decoding}; "
          f"where the 6th and 12th read prompts, after {mixed}")
    assert decoding == [30, 60], "it counts decode steps otherwise"
    assert mixed == [6, 12], "it does not look after prompts any more"
PY
