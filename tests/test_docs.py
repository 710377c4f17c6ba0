"""The documents: links lead somewhere, code and targets that they name exist, and the site builds without a warning."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "reports").glob("*.md")])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]

FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`((?:tensorcast|tests|benchmarks|profiles|docs|reports|notebooks)/[\w./*-]*)(?::([\w.]+))?`")
SHORT = re.compile(r"`((?:[a-z_]+/)+[a-z_]+\.py)`")
"""Modules named from inside the package, or from its modeling: ``deploy/plan/plan.py``, ``moe/layer.py``."""
TARGET = re.compile(r"`make ([a-z-]+)")


def words(page: Path) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """What ``#...`` may name: headings as GitHub and the site write them."""
    headings = re.findall(r"^#+ (.*)$", words(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def defined(path: Path) -> Iterator[str]:
    """Functions, classes, methods and constants of a module: ``Step.price`` too."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
            for inner in ast.iter_child_nodes(node):
                if isinstance(inner, ast.FunctionDef):
                    yield f"{node.name}.{inner.name}"
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(target, ast.Name):
                yield target.id


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    broken = []
    for link in LINK.findall(words(page)):
        path, _, anchor = link.partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("name", NAMES)
def test_code_and_targets_that_are_named_exist(name: str) -> None:
    said = words(ROOT / name)
    wrong = []
    for path, inside in CODE.findall(said):
        found = [one for one in ROOT.glob(path.rstrip("/")) if one.exists()]
        if not found or (inside and inside not in set(defined(found[0]))):
            wrong.append(f"{path}:{inside}")
    homes = (ROOT, ROOT / "tensorcast", ROOT / "tensorcast" / "modeling")
    wrong += [path for path in SHORT.findall(said) if not any((home / path).exists() for home in homes)]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    wrong += [f"make {target}" for target in TARGET.findall(said) if target not in targets]
    assert not wrong


def test_the_guards_see_what_is_wrong(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A head: two\n[a](#a-head-two) `tensorcast/api.py:compare`\n```\n[not](a-link)\n```\n")
    assert anchors(page) == {"a-head-two"} and LINK.findall(words(page)) == ["#a-head-two"]
    assert CODE.findall(words(page)) == [("tensorcast/api.py", "compare")]
    names = set(defined(ROOT / "tensorcast" / "search" / "compare.py"))
    assert {"Comparison", "Comparison.deployments", "CONTENDERS"} <= names and "nothing" not in names


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    done = subprocess.run(
        [sys.executable, *"-m sphinx -qW --keep-going -b html -d".split(), str(tmp_path / "trees"), str(ROOT / "docs"),
         str(tmp_path / "site")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "index.html").exists()
