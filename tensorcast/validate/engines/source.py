"""Source files of a released package, read from its wheel or from a folder; nothing of it is ever imported."""

from __future__ import annotations

import ast
import functools
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tensorcast.errors import InputError


class Source:
    """Python files of a wheel or folder, by their path in it (``vllm/config/cache.py``)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._wheel = zipfile.ZipFile(path) if path.is_file() else None

    def text(self, name: str) -> str:
        """Raises :class:`InputError` where there is no such file."""
        try:
            if self._wheel is not None:
                return self._wheel.read(name).decode("utf-8")
            return (self.path / name).read_text(encoding="utf-8")
        except (KeyError, OSError):
            raise InputError(f"{self.path}: has no {name}: the release keeps it elsewhere") from None

    @functools.lru_cache(maxsize=512)  # noqa: B019
    def tree(self, name: str) -> ast.Module:
        return ast.parse(self.text(name))

    def files(self, folder: str, suffix: str = ".py") -> list[str]:
        """Paths below ``folder`` that end so, sorted."""
        if self._wheel is not None:
            names: Iterator[str] = iter(self._wheel.namelist())
        else:
            below = (self.path / folder).rglob(f"*{suffix}")
            names = (path.relative_to(self.path).as_posix() for path in below)
        return sorted(name for name in names if name.startswith(f"{folder}/") and name.endswith(suffix))


def found(tree: ast.AST, name: str) -> ast.AST:
    """The class or function called ``name``, or the value that is assigned to it, wherever it stands first."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
        value = assigned(node, name)
        if value is not None:
            return value
    raise InputError(f"{name}: not found: the release calls it otherwise")


def assigned(node: ast.AST, name: str) -> ast.expr | None:
    """The value that a statement gives to ``name`` (or to an attribute of that name); None if it does not."""
    if isinstance(node, ast.Assign):
        targets: list[ast.expr] = node.targets
    elif isinstance(node, ast.AnnAssign) and node.value is not None:
        targets = [node.target]
    else:
        return None
    names = {getattr(target, "id", getattr(target, "attr", None)) for target in targets}
    return node.value if name in names else None


def literal(node: ast.AST) -> object:
    """The value of an expression of constants: products of numbers, ``frozenset({...})`` and ``Field(default=...)``
    included. Raises :class:`InputError` for anything else."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        left, right = literal(node.left), literal(node.right)
        if isinstance(left, int | float) and isinstance(right, int | float):
            return left * right
    if isinstance(node, ast.Call):
        if node.args:
            return literal(node.args[0])
        default = next((keyword.value for keyword in node.keywords if keyword.arg == "default"), None)
        if default is not None:
            return literal(default)
    if isinstance(node, ast.Dict):
        pairs = [(key, value) for key, value in zip(node.keys, node.values, strict=True) if key is not None]
        return {literal(key): literal(value) for key, value in pairs}
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise InputError(f"{ast.unparse(node)[:80]}: is no constant any more") from None
