"""How many functions one command enters: what a newcomer has to follow.

``python benchmarks/functions_entered.py [ARGUMENTS OF tensorcast]`` counts distinct functions of this package that run,
by package, and the files they are in (comprehensions and lambdas count with the function that holds them).
"""

from __future__ import annotations

import contextlib
import inspect
import io
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
DEFAULT = "compare deepseek-v3 --device h200 --world-size 32 --input-len 4096 --output-len 1024 --ttft 2s --tpot 50ms"


def entered(arguments: list[str]) -> dict[str, set[str]]:
    """Qualified names of the package's functions that a command enters, by file."""
    from tensorcast.cli import main

    package = str(HERE / "tensorcast")
    found: dict[str, set[str]] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(package):
            name = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)
            name = name.split(".<locals>.<")[0].split(".<locals>.<lambda>")[0]
            if frame.f_code.co_flags & inspect.CO_OPTIMIZED and not name.startswith("<"):  # no bodies of classes
                file = frame.f_code.co_filename[len(package) + 1 :]
                found.setdefault(file, set()).add(name)

    sys.argv = ["tensorcast", *arguments]
    sys.setprofile(note)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            main()
    finally:
        sys.setprofile(None)
    return found


def run() -> None:
    found = entered(sys.argv[1:] or DEFAULT.split())
    packages: Counter[str] = Counter()
    for file, names in found.items():
        packages[str(Path(file).parent)] += len(names)
    for package, count in packages.most_common():
        print(f"{count:5d}  {package}")
    print(f"{sum(packages.values())} functions in {len(found)} files")


if __name__ == "__main__":
    run()
