#!/usr/bin/env bash
# torch.compile keeps the default of a threading.local's class after the instance has a value of its own.
#
# Package: torch 2.13.0 (CPU).
# Guess: an attribute that a forward pass reads (prefill or decode) is guarded on, wherever it comes from; with
# fullgraph=True what cannot be guarded on is an error.
# Seen: a plain object, and a threading.local whose __init__ sets the attribute, are guarded on. Where the default is an
# attribute of the threading.local's class, as Python's own documentation writes it, setting it on the instance later is
# not noticed: the compiled layer keeps the first phase, without a word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import threading

import torch


class Plain:
    phase = "prefill"


class LocalOfInstance(threading.local):
    def __init__(self):
        self.phase = "prefill"


class LocalOfClass(threading.local):
    phase = "prefill"


seen = {}
for kind in (Plain, LocalOfInstance, LocalOfClass):
    torch._dynamo.reset()
    state = kind()
    layer = torch.compile(lambda x: x + 1 if state.phase == "decode" else x, fullgraph=True, backend="eager")
    first = float(layer(torch.zeros(())))
    state.phase = "decode"
    seen[kind.__name__] = (first, float(layer(torch.zeros(()))))
    print(f"{kind.__name__}: prefill adds {first:.0f}, decode adds {seen[kind.__name__][1]:.0f}")
assert torch.__version__.startswith("2.13.0")
assert seen == {"Plain": (0, 1), "LocalOfInstance": (0, 1), "LocalOfClass": (0, 0)}, "behaviour has changed"
PY
