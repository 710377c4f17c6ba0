"""Arguments of ``vllm serve``, read from a release: calls of ``add_argument``, and the fields of config classes that
they take their type and choices from."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from tensorcast.errors import InputError
from tensorcast.validate.engines.arguments import TAKES, Argument, Declared
from tensorcast.validate.engines.source import Source, literal

ARGUMENTS = "vllm/engine/arg_utils.py"
FRONTENDS = ("vllm/entrypoints/common/cli_args.py", "vllm/entrypoints/openai/cli_args.py")
"""Where a release may keep the server's own arguments."""

NUMBERS = ("max_num_batched_tokens", "max_num_scheduled_tokens", "kv_cache_memory_bytes", "max_model_len")
"""Integers that may be written as people do (``16k``)."""

PLAIN = {"int": "int", "float": "float", "dict": "json", "str": "str"}


def read_arguments(source: Source) -> Declared:
    """All of them, by their first name."""
    configs = _Configs(source)
    tree = source.tree(ARGUMENTS)
    declared = _added(tree, configs)
    frontend = next(name for name in FRONTENDS if name in source.files("vllm/entrypoints"))
    declared |= _added(source.tree(frontend), configs)
    for field, hint in _fields_of(source.tree(frontend), ("BaseFrontendArgs", "FrontendArgs")):
        declared[f"--{field.replace('_', '-')}"] = configs.argument(field, hint)
    return declared


class _Configs:
    """Config classes of a release, by name, and the names that stand for types."""

    def __init__(self, source: Source) -> None:
        self._fields: dict[str, dict[str, ast.expr]] = {}
        self._names: dict[str, ast.expr] = {}
        for path in (*source.files("vllm/config"), ARGUMENTS):
            for node in source.tree(path).body:
                if isinstance(node, ast.ClassDef):
                    self._fields[node.name] = dict(_annotated(node))
                elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    self._names[node.targets[0].id] = node.value
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                    self._names[node.target.id] = node.value

    def of_field(self, config: str, field: str, **changed: Any) -> Argument:
        """The argument of a config's field. Raises :class:`InputError` where there is none."""
        fields = self._fields.get(config, {})
        if field not in fields:
            raise InputError(f"vllm: {config}.{field}: no such field")
        return self.argument(field, fields[field], **changed)

    def argument(self, field: str, hint: ast.expr, **changed: Any) -> Argument:
        """What ``get_kwargs`` makes of a field of this type."""
        parts = list(self._parts(hint))
        names = {part.id for part in parts if isinstance(part, ast.Name)}
        kinds = {ast.unparse(part.value): part for part in parts if isinstance(part, ast.Subscript)}
        if names & set(self._fields) or any(name.endswith("Config") for name in names):
            return Argument(kind="json", **changed)
        if names == {"bool", "str"}:
            return Argument(takes="?", **changed)
        if "bool" in names:
            also = (*changed.pop("also", ()), f"--no-{field.replace('_', '-')}")
            return Argument(takes="nothing", also=also, **changed)
        if "Literal" in kinds:
            said = literal(kinds["Literal"].slice)
            choices = said if isinstance(said, tuple) else (said,)
            kind = "int" if isinstance(choices[0], int) else "str"
            return Argument(kind=kind, choices=() if "str" in names else choices, **changed)
        if "dict" in kinds:
            return Argument(kind="str" if "str" in names else "json", **changed)
        for several in ("tuple", "list", "set"):
            if several in kinds or several in names:
                return Argument(takes="+", **changed)
        if "int" in names and field in NUMBERS:
            return Argument(kind="number", **changed)
        return Argument(kind=next((PLAIN[name] for name in PLAIN if name in names), "str"), **changed)

    def _parts(self, hint: ast.expr) -> Iterator[ast.expr]:
        """Members of a union; names that stand for types are looked up, ``None`` is left out."""
        if isinstance(hint, ast.Constant) and isinstance(hint.value, str):
            yield from self._parts(ast.parse(hint.value, mode="eval").body)
        elif isinstance(hint, ast.BinOp):
            yield from (*self._parts(hint.left), *self._parts(hint.right))
        elif isinstance(hint, ast.Subscript) and ast.unparse(hint.value) in ("Annotated", "Optional"):
            inner = hint.slice.elts[0] if isinstance(hint.slice, ast.Tuple) else hint.slice
            yield from self._parts(inner)
        elif isinstance(hint, ast.Name) and hint.id in self._names and hint.id not in self._fields:
            yield from self._parts(self._names[hint.id])
        elif isinstance(hint, ast.Subscript) and ast.unparse(hint.value) == "Literal":
            members = hint.slice.elts if isinstance(hint.slice, ast.Tuple) else [hint.slice]
            flat = [value for one in members for value in self._values(one)]
            yield ast.Subscript(ast.Name("Literal"), ast.Tuple([ast.Constant(value) for value in flat]))
        elif not (isinstance(hint, ast.Constant) and hint.value is None):
            yield hint

    def _values(self, one: ast.expr) -> list[Any]:
        if isinstance(one, ast.Name) and one.id in self._names:
            inner = next(self._parts(self._names[one.id]))
            said = literal(inner.slice) if isinstance(inner, ast.Subscript) else ()
            return list(said) if isinstance(said, tuple) else [said]
        return [literal(one)]


def _annotated(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr]]:
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield statement.target.id, statement.annotation


def _fields_of(tree: ast.Module, classes: tuple[str, ...]) -> Iterator[tuple[str, ast.expr]]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name in classes:
            yield from _annotated(node)


def _added(tree: ast.Module, configs: _Configs) -> Declared:
    """Arguments of every ``add_argument(...)``."""
    said: dict[str, str] = {}
    for node in ast.walk(tree):
        value = node.value if isinstance(node, ast.Assign) else None
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "get_kwargs":
            said[ast.unparse(node.targets[0])] = ast.unparse(value.args[0])  # type: ignore[attr-defined]
    declared: Declared = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            names = [str(arg.value) for arg in node.args if isinstance(arg, ast.Constant)]
            if len(names) != len(node.args) or not names[0].startswith("-"):
                continue
            one = _one(node, tuple(names[1:]), said, configs)
            if one is not None:
                declared[names[0]] = one
    return declared


def _one(node: ast.Call, also: tuple[str, ...], said: dict[str, str], configs: _Configs) -> Argument | None:
    own = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    inside = next((keyword.value for keyword in node.keywords if keyword.arg is None), None)
    text = ast.unparse(own["help"]) if "help" in own else ""
    deprecated = text.strip("'\"")[:120] if "deprecat" in text.lower() else ""
    if isinstance(inside, ast.Subscript) and ast.unparse(inside.value) in said:
        field = str(literal(inside.slice))
        return configs.of_field(said[ast.unparse(inside.value)], field, also=also, deprecated=deprecated)
    if isinstance(inside, ast.Dict) and isinstance(inside.values[0], ast.Subscript):  # {**kwargs["field"], ...}
        first = inside.values[0]
        if ast.unparse(first.value) in said:
            field = str(literal(first.slice))
            return configs.of_field(said[ast.unparse(first.value)], field, also=also, deprecated=deprecated)
    if inside is not None:  # a name for arguments that are put together elsewhere
        return Argument(takes="?", also=also, deprecated=deprecated)
    action = ast.unparse(own["action"]).strip("'\"") if "action" in own else ""
    if action in ("store_true", "argparse.BooleanOptionalAction") or "StoreTrue" in action:
        return Argument(takes="nothing", also=also, deprecated=deprecated)
    kind = ast.unparse(own["type"]) if "type" in own else "str"
    takes = TAKES.get(str(literal(own["nargs"])), "+") if "nargs" in own else "value"
    return Argument(takes=takes, kind=PLAIN.get(kind, "str"), also=also, deprecated=deprecated)
