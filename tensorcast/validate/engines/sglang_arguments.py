"""Arguments of ``sglang.launch_server``, read from a release: annotated fields, and calls of ``add_argument``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from tensorcast.errors import InputError
from tensorcast.validate.engines.arguments import TAKES, Argument, Declared
from tensorcast.validate.engines.source import Source, literal

ARGUMENTS = "sglang/srt/server_args.py"
FIELDS, CHOICES = "sglang/srt/arg_groups/fields", "sglang/srt/arg_groups/choices.py"

PLAIN = {"int": "int", "float": "float", "str": "str"}


def read_arguments(source: Source) -> Declared:
    """All of them, by their first name."""
    folder = source.files(FIELDS)
    files = (*folder, *([CHOICES] if CHOICES in source.files("sglang/srt/arg_groups") else []), ARGUMENTS)
    trees = [source.tree(path) for path in files]
    names = _constants(trees)
    declared: Declared = {}
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.AnnAssign) and (found := _field(node, names)):
                declared[found[0]] = found[1]
            elif isinstance(node, ast.Call) and (found := _added(node, names)):
                declared.setdefault(*found)
    return declared


def _constants(trees: list[ast.Module]) -> dict[str, Any]:
    """Lists of choices, by name, with what other files of the package add to them."""
    names: dict[str, Any] = {}
    for tree in trees:
        for node in tree.body:
            value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if isinstance(target, ast.Name) and isinstance(value, ast.List | ast.Tuple):
                said = list(_elements(value, names))
                names[target.id] = said
    return names


def _elements(node: ast.expr, names: dict[str, Any]) -> Iterator[Any]:
    """Values of a list of constants and of other lists; nothing of what is neither."""
    if isinstance(node, ast.Name):
        yield from names.get(node.id, ())
    elif isinstance(node, ast.BinOp):
        yield from (*_elements(node.left, names), *_elements(node.right, names))
    elif isinstance(node, ast.List | ast.Tuple | ast.Set):
        for one in node.elts:
            if isinstance(one, ast.Starred):
                yield from _elements(one.value, names)
            elif isinstance(one, ast.Constant):
                yield one.value


def _field(node: ast.AnnAssign, names: dict[str, Any]) -> tuple[str, Argument] | None:
    """The argument of ``name: A[type, Arg(...)]``."""
    hint = node.annotation
    if not (isinstance(hint, ast.Subscript) and ast.unparse(hint.value) in ("A", "Annotated")):
        return None
    if not isinstance(hint.slice, ast.Tuple) or not isinstance(node.target, ast.Name):
        return None
    kind, *rest = hint.slice.elts
    meta: dict[str, ast.expr] = {}
    for one in rest:
        if isinstance(one, ast.Call) and ast.unparse(one.func) == "Arg":
            meta = {str(keyword.arg): keyword.value for keyword in one.keywords}
    if "no_cli" in meta and literal(meta["no_cli"]):
        return None
    first = str(literal(meta["cli_name"])) if "cli_name" in meta else "--" + node.target.id.replace("_", "-")
    return first, _argument(kind, meta, names)


def _argument(kind: ast.expr, meta: dict[str, ast.expr], names: dict[str, Any]) -> Argument:
    also = tuple(_elements(meta["aliases"], names)) if "aliases" in meta else ()
    choices = tuple(_elements(meta["choices"], names)) if "choices" in meta else ()
    text = ast.unparse(meta["help"]) if "help" in meta else ""
    action = ast.unparse(meta["action"]) if "action" in meta else ""
    said: dict[str, Any] = {"also": also, "deprecated": _warning(text, meta, action)}
    inner = ast.unparse(kind).removeprefix("Optional[").split("]")[0].split("[")[0].split(" |")[0].strip()
    if "Boolean" in action or "StoreTrue" in action or "store_true" in action:
        return Argument(takes="nothing", **said)
    if inner == "bool" and not action:
        return Argument(takes="nothing", **said)
    if isinstance(kind, ast.Subscript) and "Literal" in ast.unparse(kind) and not choices:
        parts = (one for one in ast.walk(kind) if isinstance(one, ast.Subscript))
        values = literal(next(one.slice for one in parts if ast.unparse(one.value) == "Literal"))
        choices = values if isinstance(values, tuple) else (values,)
    several = inner.lower() == "list" and "type_parser" not in meta
    takes = TAKES.get(str(literal(meta["nargs"])), "+") if "nargs" in meta else ("+" if several else "value")
    parser = ast.unparse(meta["type_parser"]) if "type_parser" in meta else ""
    read = "number" if "human_readable" in parser else "str" if parser else PLAIN.get(inner, "str")
    return Argument(takes=takes, kind=read, choices=choices, **said)


def _warning(text: str, meta: dict[str, ast.expr], action: str) -> str:
    if "eprecat" not in action and not text.strip("'\"f(").lower().startswith("deprecated"):
        return ""
    new = meta.get("new_flag")
    return f"use {literal(new)}" if new is not None else text.strip("'\"")[:120]


def _added(node: ast.Call, names: dict[str, Any]) -> tuple[str, Argument] | None:
    """The argument of ``parser.add_argument("--name", ...)``."""
    if not (isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"):
        return None
    said = [str(arg.value) for arg in node.args if isinstance(arg, ast.Constant)]
    if not said or len(said) != len(node.args):
        return None
    meta = {str(keyword.arg): keyword.value for keyword in node.keywords}
    meta["aliases"] = ast.List([ast.Constant(name) for name in said[1:]])
    try:
        return said[0], _argument(meta.get("type", ast.Name("str")), meta, names)
    except InputError:  # choices that are worked out as the server starts
        return said[0], Argument()
