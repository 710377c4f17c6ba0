#!/usr/bin/env bash
# A router's thresholds that its own class describes with other values than it is started with.
#
# Package: sglang-router 0.3.2 (Apache-2.0): router.py (class Router), router_args.py (class RouterArgs).
# Guess: --policy cache_aware sends a request by its prefix while servers differ by up to 32 requests or hardly at all
# (1.0001 times), and only if half of its prompt is known, as the class's description says.
# Seen: it is started with 64 requests, 1.5 times and three tenths of the prompt: three servers with 30, 60 and 90
# requests are even to it, and a prompt of 3,000 tokens follows the system prompt of 1,000 with which it begins.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip download -q --no-deps --only-binary :all: "sglang-router==0.3.2" --python-version 3.11 -d "$folder" 2>/dev/null
python3 - "$folder" <<'PY'
import ast
import re
import sys
import zipfile
from pathlib import Path

NAMES = ("cache_threshold", "balance_abs_threshold", "balance_rel_threshold")
files = zipfile.ZipFile(next(Path(sys.argv[1]).glob("sglang_router-*.whl")))


def described(name: str) -> float:
    """What the description of Router's argument gives as its default."""
    tree = ast.parse(files.read("sglang_router/router.py"))
    text = next(ast.get_docstring(node) for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Router")
    said = re.search(rf"^\s*{name}:.*?Default: ([\d.]+\d)", text, re.DOTALL | re.MULTILINE)
    return float(said[1])


def started(name: str) -> float:
    """What RouterArgs, from which the command line takes its defaults, has."""
    tree = ast.parse(files.read("sglang_router/router_args.py"))
    own = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "RouterArgs")
    return float(next(ast.literal_eval(node.value) for node in own.body
                      if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name))


found = {name: (described(name), started(name)) for name in NAMES}
for name, (said, own) in found.items():
    print(f"{name}: described with {said:g}, started with {own:g}")
assert found == {"cache_threshold": (0.5, 0.3), "balance_abs_threshold": (32, 64), "balance_rel_threshold": (1.0001, 1.5)}
PY
