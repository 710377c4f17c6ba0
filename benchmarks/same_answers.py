"""Do two checkouts answer alike? Runs the same commands in both and compares what they print, byte for byte.

``python benchmarks/same_answers.py OTHER_CHECKOUT`` compares this checkout with another one; ``--tolerance 1e-9`` lets
numbers differ by so much, relatively. Exits with 1 where an answer differs and prints the first differing lines.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent

V3 = "deepseek-v3 --device h200 --world-size 32"
LOAD = "--input-len 4096 --output-len 1024"
RUNS = """model,device,engine,tp,dp,ep,pp,isl,osl,concurrency
deepseek-v3,h200,sglang,1,32,32,1,4096,1024,2048
qwen3-235b-a22b,h100,vllm,8,1,8,1,1024,1024,64
gpt-oss-120b,b200,trtllm,2,1,1,1,1024,8192,32
mixtral-8x7b,a100,vllm,4,1,1,1,2048,256,16
"""
COMMANDS = (
    f"simulate {V3} --tp 1 --dp 32 --ep 32 --phase decode --batch 128 --context 4096 --json",
    "simulate qwen3-235b-a22b --device h100 --world-size 8 --tp 8 --ep 8 --phase prefill --batch 4 --input-len 4096 --json",  # noqa: E501
    "simulate gpt-oss-120b --device b200 --world-size 4 --tp 2 --pp 2 --batch 32 --engine trtllm --json",
    "simulate qwen3-next-80b-a3b --device mi300x --world-size 4 --tp 4 --batch 16 --json",
    "simulate kimi-k2 --device gb200 --world-size 32 --dp 32 --tp 1 --ep 32 --batch 64 --mtp-depth 0 --engine sglang --json",  # noqa: E501
    f"compare {V3} {LOAD} --ttft 2s --tpot 50ms --json",
    f"compare {V3} {LOAD} --ttft 2s --tpot 50ms --engine sglang --full --json",
    f"compare gpt-oss-120b --device h100,h200,b200 --world-size 8 {LOAD} --tpot 20ms --json",
    f"compare qwen3-235b-a22b-fp8 --device h100 --world-size 8 {LOAD} --engine trtllm --objective latency --json",
    f"compare qwen3-30b-a3b --device h200 --world-size 8 {LOAD} --objective gpus --request-rate 4 --json",
    f"explain {V3} --layout tp1-dp32-ep32 --versus tp8-dp4-ep32 --json",
    "explain qwen3-235b-a22b --device h100 --world-size 8 --layout tp8-ep8 --versus tp4-dp2-ep8 --phase prefill --batch 2 --json",  # noqa: E501
    "predict RUNS --json",
    f"launch {V3} --layout tp1-dp32-ep32 --engine sglang --batch 128",
    "launch qwen3-235b-a22b --device h100 --world-size 8 --layout tp8-ep8 --engine vllm --batch 32",
    "launch gpt-oss-120b --device b200 --world-size 2 --layout tp2 --engine trtllm --batch 64",
)


def answer(checkout: Path, command: str, runs: Path) -> str:
    """What the command prints on both streams, and how it ends."""
    words = [str(runs) if word == "RUNS" else word for word in command.split()]
    done = subprocess.run(
        [sys.executable, "-m", "tensorcast", *words], cwd=checkout, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(checkout), "COLUMNS": "120"},
    )  # fmt: skip
    return f"{done.stdout}\n--- stderr\n{done.stderr}\n--- exit {done.returncode}\n"


RENAMED = {"form": "mode", "forms": "modes"}
"""Keys of JSON answers that have other names now."""


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of everything in a JSON answer, keys under today's names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{RENAMED.get(key, key)}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from leaves(inner, f"{path}[{i}]")
    else:
        yield path, value


def differences(mine: str, other: str, tolerance: float) -> list[tuple[str, str]]:
    """Pairs of what differs; with a ``tolerance``, JSON answers are compared number by number."""
    if mine == other:
        return []
    try:
        parts = [json.loads(one.split("\n--- stderr")[0]) for one in (mine, other)]
    except json.JSONDecodeError:
        parts = []
    if not tolerance or not parts:
        return [(a, b) for a, b in zip_longest(mine.splitlines(), other.splitlines(), fillvalue="") if a != b]
    here, there = (dict(leaves(part)) for part in parts)

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, int | float) and isinstance(b, int | float):
            return math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-12)
        return bool(a == b)

    missing = "(not there)"
    paths = dict.fromkeys([*here, *there])
    pairs = [(path, here.get(path, missing), there.get(path, missing)) for path in paths]
    return [(f"{path}: {a}", f"{path}: {b}") for path, a, b in pairs if not same(a, b)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("other", type=Path, help="another checkout of this project, or what --save wrote there")
    parser.add_argument("--tolerance", type=float, default=0.0, help="relative difference of numbers to let pass")
    parser.add_argument("--only", default="", help="commands that begin with this")
    parser.add_argument("--save", type=Path, help="write the answers of the other checkout to a file")
    parser.add_argument("--show", type=int, default=6, help="differences to print of each answer")
    asked = parser.parse_args()
    kept = json.loads(asked.other.read_text(encoding="utf-8")) if asked.other.is_file() else {}
    differing, found = 0, {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        runs = Path(folder) / "runs.csv"
        runs.write_text(RUNS, encoding="utf-8")
        for command in (one for one in COMMANDS if one.startswith(asked.only)):
            mine = pool.submit(answer, HERE, command, runs)
            other = kept.get(command) or pool.submit(answer, asked.other.resolve(), command, runs).result()
            found[command] = other
            unlike = differences(mine.result(), other, asked.tolerance)
            differing += bool(unlike)
            print(f"{'DIFFER' if unlike else 'same  '} {command}", flush=True)
            print("".join(f"    here  {a[:150]}\n    other {b[:150]}\n" for a, b in unlike[: asked.show]), end="")
    if asked.save:
        asked.save.write_text(json.dumps(found), encoding="utf-8")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
