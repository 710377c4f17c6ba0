"""What the processes behind the page do, one job at a time: an answer, or one line on what is wrong with a question."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from tensorcast.errors import InputError
from tensorcast.explore.answer import Found, full, quick
from tensorcast.explore.details import details, versus
from tensorcast.explore.exports import exported
from tensorcast.explore.question import Question, command, field_of, question
from tensorcast.report.plain import to_json
from tensorcast.search.space import Variant


@dataclass(frozen=True)
class Reply:
    """``text``: JSON for the browser, or a file. ``wrong``: it is an error. ``behind``, ``known``: as of an answer."""

    text: str
    wrong: bool = False
    behind: dict[tuple[str, float], Found] = field(default_factory=dict)
    known: tuple[Variant, ...] = ()


State = dict[str, str]
Named = tuple[str, ...]
Worth = Sequence[Variant]


def begin(lease: Connection) -> None:
    """First act of a process: it ends once the server has closed the other end of ``lease`` or died. Ctrl-C is the
    server's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

    def watch() -> None:
        with suppress(OSError):
            lease.poll(None)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def answer_all(state: State, named: Named) -> Reply:
    """The answer of every layout."""
    return _said(state, named, lambda asked: _reply(asked, full(asked)))


def answer_known(state: State, named: Named, known: Worth) -> Reply:
    """The answer of the ``known`` variants alone."""
    return _said(state, named, lambda asked: _reply(asked, quick(asked, known)))


def tell_details(state: State, named: Named, found: Found) -> Reply:
    """One row from close by."""
    return _said(state, named, lambda asked: Reply(to_json(details(asked, found))))


def tell_versus(state: State, named: Named, a: Found, b: Found) -> Reply:
    """Two rows side by side."""
    return _said(state, named, lambda asked: Reply(to_json(versus(asked, a, b))))


def export(state: State, named: Named, kind: str) -> Reply:
    """A file's text."""
    return _said(state, named, lambda asked: Reply(exported(asked, kind)))


def warm() -> int:
    """Nothing but what its import takes; the process's id."""
    return os.getpid()


def _reply(asked: Question, found: Any) -> Reply:
    page = found.page | {"state": asked.state, "command": command(asked)}
    return Reply(to_json(page), behind=found.behind, known=found.known)


def _said(state: State, named: Named, made: Callable[[Question], Reply]) -> Reply:
    try:
        return made(question(state, named))
    except InputError as error:
        line = " ".join((error.typed or str(error)).split())
        return Reply(to_json({"error": line, "field": field_of(line)}), wrong=True)
