"""CPU seconds and peak memory of questions as users ask them, beside another version of this project.

``OMP_NUM_THREADS=1 python benchmarks/questions.py [--beside GIT_REF_OR_FOLDER] [--also NAME=COMMAND] [--only WORD]``.
Every question is a fresh process (user and system seconds, children's too); versions take turns, so that other work on
the machine slows both. ``--also`` times another tool's command, such as ``aiconfigurator``'s, once.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from predict_rows import different, written
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent.parent
LOAD = ("-i", "4096", "-o", "1024", "--ttft", "2s", "--tpot", "50ms")
COMPARE = ("-m", "tensorcast", "compare", "deepseek-v3", "-d", "h200", *LOAD)
SIMULATE = (
    "-m", "tensorcast", "simulate", "deepseek-v3", "-d", "h200", "-n", "32", "--tp", "1", "--dp", "32", "--ep", "32",
    "--phase", "decode", "--batch", "128", "--context", "4096",
)  # fmt: skip

IN_ONE_PROCESS = """
import resource
import tensorcast as tc

def ask(**changes):
    asked = {"device": "h200", "world_size": 32, "input_len": 4096, "output_len": 1024, "ttft_s": 2.0, "tpot_s": 0.05}
    before = resource.getrusage(resource.RUSAGE_SELF)
    tc.compare("deepseek-v3", **{**asked, **changes})
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
"""
AGAIN = f"{IN_ONE_PROCESS}ask()\nprint(ask())"
LIMITS = f"{IN_ONE_PROCESS}ask()\nprint(ask(ttft_s=3.0, tpot_s=0.04))"
LENGTHS = f"{IN_ONE_PROCESS}ask()\nprint(ask(input_len=3000, output_len=500))"
FIFTY = f"""{IN_ONE_PROCESS}
print(sum(ask(input_len=1000 + 150 * i, output_len=300 + 40 * (i % 13), tpot_s=0.05 + 0.001 * i) for i in range(50)))
"""
MILLION = f"""{IN_ONE_PROCESS}
found = tc.compare(
    "deepseek-v3", device="h200", world_size=32, input_len=4096, output_len=1024, ttft_s=2.0, tpot_s=0.05, full=True,
    runnable_only=False,
)
used = resource.getrusage(resource.RUSAGE_SELF)
print(1e6 * (used.ru_utime + used.ru_stime) / found.examined)
"""


@dataclass(frozen=True)
class Question:
    """Arguments of Python, from an empty cache if ``cold``; ``inside``: the process prints the seconds that count."""

    name: str
    arguments: tuple[str, ...]
    cold: bool = False
    inside: bool = False


def questions(folder: Path) -> list[Question]:
    """All that are asked; files go into ``folder``."""
    runs = written(different(random.Random(0), 10_000), folder / "runs.csv")
    out = str(folder / "out")
    return [
        Question("compare, 32 GPUs, warm", (*COMPARE, "-n", "32")),
        Question("compare, 32 GPUs, cold, --out", (*COMPARE, "-n", "32", "--out", out), cold=True),
        Question("compare, 32 GPUs, warm, --out", (*COMPARE, "-n", "32", "--out", out)),
        Question("the same question again", ("-c", AGAIN), inside=True),
        Question("other limits", ("-c", LIMITS), inside=True),
        Question("other lengths", ("-c", LENGTHS), inside=True),
        Question("50 questions in one process", ("-c", FIFTY), inside=True),
        Question("compare, every axis, warm", (*COMPARE, "-n", "32", "--full", "--any-engine")),
        Question("a million candidates, every axis", ("-c", MILLION), inside=True),
        Question("compare, 1,024 GPUs, warm", (*COMPARE, "-n", "1024")),
        Question("simulate, cold", SIMULATE, cold=True),
        Question("simulate, warm", SIMULATE),
        Question("predict, 10,000 rows", ("-m", "tensorcast", "predict", str(runs), "--out", f"{out}.csv")),
    ]


def measured(
    command: Sequence[str], environment: dict[str, str], folder: Path | None = None
) -> tuple[float, float, str]:
    """CPU seconds, peak memory in bytes and standard output of a process that starts in ``folder``."""
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL, env=environment, cwd=folder)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)[:200]} failed with {process.returncode}")
    scale = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB here
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * scale, text


def checkout(wanted: str, folder: Path) -> Path:
    """A folder as it is, or the files of a git ref of this repository."""
    if Path(wanted).is_dir():
        return Path(wanted).resolve()
    packed = subprocess.run(["git", "-C", str(HERE), "archive", wanted], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder / "beside", filter="data")
    return folder / "beside"


def asked(question: Question, version: Path, folder: Path, tries: int) -> tuple[float, float]:
    """Least CPU seconds and most memory of some tries."""
    found = []
    for _ in range(tries):
        cache = folder / f"cache-{version.name}"
        if question.cold:
            cache = Path(tempfile.mkdtemp(dir=folder))
        own = {"PYTHONPATH": str(version), "TENSORCAST_CACHE": str(cache), "COLUMNS": "160"}
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | own
        # Python looks for modules where it starts before anywhere else
        seconds, memory, text = measured((sys.executable, *question.arguments), environment, version)
        found.append((float(text) if question.inside else seconds, memory))
        if question.cold:
            shutil.rmtree(cache)
    return min(seconds for seconds, _ in found), max(memory for _, memory in found)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--beside", help="a git ref, such as the last release's tag, or a folder with a checkout")
    parser.add_argument("--also", action="append", default=[], metavar="NAME=COMMAND", help="another tool's command")
    parser.add_argument("--only", default="", help="questions whose names hold this")
    parser.add_argument("--tries", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tensorcast-bench-") as name:
        folder = Path(name)
        versions = {"here": HERE}
        if options.beside:
            versions[options.beside] = checkout(options.beside, folder)
        table = Table(title="CPU seconds of the whole process and peak memory")
        for heading in ("question", *(f"{version} {what}" for version in versions for what in ("s", "MB"))):
            table.add_column(heading, justify="left" if heading == "question" else "right")
        every = questions(folder)
        for version in versions.values():
            asked(every[0], version, folder, 1)  # fills the cache
        for question in every:
            if options.only in question.name:
                found = [asked(question, version, folder, options.tries) for version in versions.values()]
                table.add_row(question.name, *(text for s, b in found for text in (f"{s:.2f}", f"{b / 1e6:.0f}")))
        for one in options.also:
            name, _, command = one.partition("=")
            seconds, memory, _ = measured(shlex.split(command), dict(os.environ))
            table.add_row(name, f"{seconds:.2f}", f"{memory / 1e6:.0f}")
        Console(width=110).print(table)


if __name__ == "__main__":
    main()
