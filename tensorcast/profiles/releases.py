"""Releases of an engine: their order, and what a profile says of one of them.

A rule that changed is written as ``{since: {RELEASE: VALUE, ...}}`` anywhere in a file: the newest release that is not
newer than the one asked for has its say. Before the first of them the rule is not there, nor where its value is null.
In a list such an item is left out, and one whose value is a list stands for all of its items.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import date
from typing import Any

from tensorcast.errors import InputError

SINCE = "since"

_RELEASE = re.compile(r"v?(\d+(?:\.\d+)*)(?:\.?(a|b|rc|dev)(\d+))?(?:\.?post(\d+))?")


def release_order(text: str) -> tuple[tuple[int, ...], int, int, int] | None:
    """What releases are sorted by, pre-releases before and repaired ones after their own; None for what is none."""
    found = _RELEASE.fullmatch(text.strip())
    if found is None:
        return None
    numbers, kind, count, post = found.groups()
    stage = ("dev", "a", "b", "rc", None).index(kind)
    return tuple(map(int, numbers.split("."))), stage, int(count or 0), int(post or 0)


def nearest_release(text: str, known: Iterable[str]) -> str | None:
    """Of the ``known`` releases the newest that is not newer than ``text``, else the oldest; None for no release. A
    repaired one (``0.5.10.post1``) is no newer than its own (``0.5.10``), whose rules it shares."""
    order = release_order(text)
    if order is None:
        return None
    orders = {one: release_order(one) or () for one in sorted(known, key=lambda one: release_order(one) or ())}
    exact = [one for one, its in orders.items() if its == order]
    return (exact or [one for one, its in orders.items() if its[:3] <= order[:3]] or [*orders][:1])[-1]


_DAY = re.compile(r"(?<!\d)(20\d\d)(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])(?!\d)")


def built_near(text: str, days: Mapping[str, str]) -> str | None:
    """Of the releases with their ``days`` (``2026-04-08``) the one nearest to the day that a build names
    (``nightly-dev-20260402-d7256eb6``); None where it names none, or no release has one."""
    if not days or not (found := _DAY.search(text)):
        return None
    try:
        built = date.fromisoformat("-".join(found.groups()))
    except ValueError:  # the 31st of June
        return None
    return min(days, key=lambda release: abs(date.fromisoformat(days[release]) - built))


def at_release(content: dict[str, Any], release: str) -> dict[str, Any]:
    """What a profile's file says of ``release`` (empty: of its newest). Raises :class:`InputError` for one that it
    does not list."""
    newest = str(content.get("version"))
    listed = content.get("releases", [newest])
    if not isinstance(listed, list):
        raise InputError(f"{content.get('name')}: releases {listed!r}: must be a list, such as [{newest}]")
    known = [str(one) for one in listed]
    if release and release not in known:
        name, near = content.get("name"), nearest_release(release, known) or newest
        raise InputError(f"{name}: release {release!r} was not read; nearest: {near} (read: {', '.join(known)})")
    asked, own = release or newest, content.get("calibrated")
    found = {**_resolved(content, release_order(asked) or ()), "version": asked}
    if isinstance(own, dict) and asked not in (newest, *own.values()):
        measured = f"kernels measured with {own.get('kernels')}, steps with {own.get('steps')}"
        found["remark"] = f"{content.get('name')} {asked} by its own rules; {measured}"
    return found


def _is_rule(content: Any) -> bool:
    return isinstance(content, dict) and set(content) == {SINCE} and isinstance(content[SINCE], dict)


def _resolved(content: Any, asked: tuple[Any, ...]) -> Any:
    if _is_rule(content):
        since = {release_order(str(release)) or (): value for release, value in content[SINCE].items()}
        first = max((release for release in since if release <= asked), default=None)
        return None if first is None else _resolved(since[first], asked)
    if isinstance(content, dict):
        found = {key: (value, _resolved(value, asked)) for key, value in content.items()}
        return {key: new for key, (old, new) in found.items() if new is not None or not _is_rule(old)}
    if not isinstance(content, list):
        return content
    items: list[Any] = []
    for item in content:
        new = _resolved(item, asked)
        if not _is_rule(item):
            items.append(new)
        elif new is not None:
            items += new if isinstance(new, list) else [new]
    return items
