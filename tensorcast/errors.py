"""The one exception that users see as a clear line instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterable

MOST_LISTED = 24
"""Known names that a message lists."""


class InputError(ValueError):
    """Bad input. The message is one line: the field, the value, and what would be right.

    The command line prints it on stderr and exits with ``exit_code``.
    """

    exit_code = 2
    typed: str | None = None
    """The message in the command line's words, where ``str()`` has Python's (:mod:`tensorcast.api`)."""


def unknown_name(what: str, name: str, known: Iterable[str], aliases: Iterable[str] = ()) -> InputError:
    """An :class:`InputError` for a name that does not exist, with the nearest ones that do."""
    import difflib  # where a name is wrong, not in every run

    names = sorted(known)
    near = difflib.get_close_matches(name.lower(), sorted({*names, *aliases}), n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(names[:MOST_LISTED])}"
    if not near and len(names) > MOST_LISTED:
        hint += f" and {len(names) - MOST_LISTED} more"
    return InputError(f"unknown {what} {name!r}: {hint}")
