"""The house rules, checked on the source: who may import whom, how large a file may grow, what loads when."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tensorcast as tc

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tensorcast"
LONGEST = 400
MOST_MODULES = 15
"""Lines of a file and modules of a folder that a newcomer still takes in at a glance."""

FLOW: tuple[tuple[str, ...], ...] = (
    ("errors", "version"), ("files", "parallel"), ("profiles", "ops"), ("modeling",), ("trace",), ("cost",),
    ("deploy",), ("serving", "measure"), ("scheduling",), ("search", "predict", "launch", "arguments"),
    ("calibrate", "report"), ("validate", "api"), ("explore",), ("cli",),
)
"""Parts of the package in the order that data passes them: each imports itself and parts of earlier groups only."""

MAY_IMPORT: dict[str, set[str]] = {
    **{part: {one for group in FLOW[:level] for one in group} for level, parts in enumerate(FLOW) for part in parts},
    "__init__": {"api", "errors", "version"},
    "__main__": {"cli"},
}
"""Per part the others that it may import."""

HEAVY = {"torch", "transformers"}
HEAVY_PARTS = {"ops", "modeling", "measure"}
HEAVY_FILES = {
    "trace/record.py", "trace/layers.py", "trace/forward.py", "trace/tracer.py", "trace/vision/record.py",
    "trace/vision/tracer.py",
}
"""The only files that may import torch or transformers when they are themselves imported."""


def sources(folder: Path = PACKAGE) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def part_of(path: Path) -> str:
    """``trace`` for ``tensorcast/trace/dims.py``, ``cli`` for ``tensorcast/cli.py``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def targets(node: ast.AST, package: tuple[str, ...]) -> Iterator[str]:
    """Dotted names that an import statement may load, the imported names included (they may be modules)."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package[: len(package) - node.level + 1] if node.level else ()
        base = ".".join((*above, node.module)) if node.module else ".".join(above)
        yield from (f"{base}.{alias.name}" for alias in node.names)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, name) of every import, wherever it stands: a late import couples two stages as much as an early one."""
    package = ("tensorcast", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(parsed(path)):
        yield from ((getattr(node, "lineno", 0), name) for name in targets(node, package))


def at_import_time(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported: no function bodies, nothing under ``if TYPE_CHECKING``."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            yield from at_import_time(statement.orelse)
        elif not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            for field in ("body", "orelse", "finalbody"):
                yield from at_import_time(getattr(statement, field, []))
            for handler in getattr(statement, "handlers", []):
                yield from at_import_time(handler.body)


def test_each_stage_imports_only_earlier_ones() -> None:
    wrong = []
    for path in sources():
        part = part_of(path)
        assert part in MAY_IMPORT, f"{path.relative_to(ROOT)}: a new part; give it its place in MAY_IMPORT"
        for line, name in imports(path):
            head, *rest = name.split(".")
            if head != "tensorcast" or (rest and rest[0].startswith("__")):
                continue
            # a name that is no part of the package comes from its top, which is the api
            other = rest[0] if rest and rest[0] in MAY_IMPORT else "api"
            if other != part and other not in MAY_IMPORT[part]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}: {part} may not know {other}")
    assert not wrong, "\n".join(wrong)


def test_the_import_guard_sees_every_kind_of_import() -> None:
    """The guard itself: relative, late, aliased and from-package imports are all found."""
    code = "def f():\n    from . import fuse\n    from ..cost import work\nimport tensorcast.report.units as u\n"
    found = [name for node in ast.walk(ast.parse(code)) for name in targets(node, ("tensorcast", "trace"))]
    assert sorted(found) == ["tensorcast.cost.work", "tensorcast.report.units", "tensorcast.trace.fuse"]


def dotted(path: Path) -> str:
    """``tensorcast.trace.dims`` for its file; a package's name for its ``__init__.py``."""
    return ".".join(("tensorcast", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def circles(reads: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            new = reads[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    beyond = {module: reached(module) for module in reads}
    groups = {tuple(sorted(m for m in beyond[one] if one in beyond[m])) for one in reads if one in beyond[one]}
    return [list(group) for group in sorted(groups)]


def test_no_import_runs_in_a_circle() -> None:
    """Late imports and those for types count: whoever reads a file must not need a file that needs it."""
    modules = {dotted(path): path for path in sources()}
    reads: dict[str, set[str]] = {}
    for module, path in modules.items():
        named = {name if name in modules else name.rpartition(".")[0] for _, name in imports(path)}
        reads[module] = {name for name in named if name in modules and name != module}
    assert not circles(reads)


def test_the_circle_guard_sees_circles() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_folders_stay_readable() -> None:
    """Modules of each folder, packages' own faces aside."""
    counts = {
        folder.relative_to(ROOT).as_posix(): len([path for path in folder.glob("*.py") if path.name != "__init__.py"])
        for folder in {path.parent for path in sources()}
    }
    full = {folder: count for folder, count in counts.items() if count > MOST_MODULES}
    assert not full, f"over {MOST_MODULES} modules, make packages of them: {full}"


def test_torch_and_transformers_load_late() -> None:
    wrong = []
    for path in sources():
        relative = path.relative_to(PACKAGE).as_posix()
        if (part_of(path) in HEAVY_PARTS and relative != "modeling/quantization.py") or relative in HEAVY_FILES:
            continue
        for statement in at_import_time(parsed(path).body):
            heavy = HEAVY & {name.split(".")[0] for name in targets(statement, ())}
            wrong += [f"tensorcast/{relative}:{statement.lineno} imports {name} when imported" for name in heavy]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", ["tensorcast", "tests", "benchmarks"])
def test_files_stay_readable(folder: str) -> None:
    long = {
        path.relative_to(ROOT).as_posix(): lines
        for path in sources(ROOT / folder)
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST
    }
    assert not long, f"over {LONGEST} lines, split them: {long}"


def test_no_drawer_for_odds_and_ends() -> None:
    drawers = {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"}
    assert not [path for path in sources() if path.name in drawers]


def test_no_path_of_one_machine() -> None:
    """A file that names somebody's folder works on one machine only."""
    folder = re.compile(r"(?<![\w.~/:])/(?:" + "|".join(["work", "home", "root", "Users", "tmp", "mnt"]) + r")/\w")
    wrong = []
    for path in (*sources(), *sources(ROOT / "tests"), *sources(ROOT / "benchmarks")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if folder.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not wrong, "\n".join(wrong)


def loaded_by(code: str, *watched: str) -> set[str]:
    """Which of the ``watched`` packages a fresh interpreter has loaded after running ``code``."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted(set({watched!r}) & set(sys.modules))))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return set(found)


@pytest.mark.parametrize("module", ["tensorcast", "tensorcast.cli"])
def test_importing_is_light(module: str) -> None:
    heavy = ("torch", "transformers", "pandas", "matplotlib", "sympy", "scipy")
    assert not loaded_by(f"import {module}", *heavy)


@pytest.mark.parametrize("written", [False, True])
def test_a_comparison_makes_no_frame(written: bool, tmp_path: Path) -> None:
    """Frames are for those who read them: pandas stays out, and what draws and writes files where none is asked."""
    asked = ["compare", "qwen3-30b-a3b", "-d", "h200", "-n", "1", "--tpot", "50ms"]
    asked += ["--out", str(tmp_path)] if written else []
    code = "from typer.testing import CliRunner\nfrom tensorcast.cli import app\n"
    code += f"assert not CliRunner().invoke(app, {asked}).exit_code"
    assert not loaded_by(code, "torch", "transformers", "pandas", *([] if written else ["pyarrow", "matplotlib"]))


def test_a_comparison_asked_before_reads_no_fitted_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels' models answered on disk, and what reads images and recorded traffic is not needed: none is imported, nor
    NumPy's masked arrays, which some of its functions read. In a cache of its own, as whoever ends last writes what is
    kept."""
    monkeypatch.setenv("TENSORCAST_CACHE", str(tmp_path))
    asked = "device='h200', world_size=2, input_len=900, output_len=90"
    call = f"import tensorcast as tc\ntc.compare('qwen3-30b-a3b', {asked})"
    unread = ("cost.kernels.predictor", "cost.kernels.trees", "cost.recordings.recording", "serving.encoder")
    assert loaded_by(call, "tensorcast.search.search")
    assert not loaded_by(call, "numpy.ma", *(f"tensorcast.{name}" for name in unread))


def test_a_warm_simulation_needs_no_torch() -> None:
    """From the second time a step is priced from the table on disk: torch and transformers stay out."""
    call = "simulate('qwen3-30b-a3b', device='h200', world_size=2, tp=2, ep=2, batch=8).step_s"
    assert tc.simulate("qwen3-30b-a3b", device="h200", world_size=2, tp=2, ep=2, batch=8).step_s > 0
    assert not loaded_by(f"import tensorcast as tc\nassert tc.{call} > 0", "torch", "transformers")
