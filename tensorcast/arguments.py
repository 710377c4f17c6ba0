"""Arguments of the Python API by their own names, where messages of bad input name the command line's options."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from tensorcast.errors import InputError, unknown_name
from tensorcast.parallel import uncollected

P = ParamSpec("P")
R = TypeVar("R")

NAMES = {
    "--ttft": "ttft_s", "--tpot": "tpot_s", "--mtp": "mtp_depth", "--price": "prices", "--mode": "modes",
    "--any-engine": "runnable_only=False", "--e2e": "request_s",
}
"""Arguments that are not called what the command line calls them, but for dashes."""


def python_names(call: Callable[P, R]) -> Callable[P, R]:
    """Messages of bad input name the arguments of ``call``: ``kv_dtype`` instead of ``--kv-dtype``.

    An argument that there is not is bad input, too: the message has the nearest that there is.
    """
    code = call.__code__
    own = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]

    @functools.wraps(call)
    def named(*args: P.args, **kwargs: P.kwargs) -> R:
        with uncollected():  # modules that are read leave no garbage
            from tensorcast.deploy.option_types import SearchedOptions
            from tensorcast.deploy.options import OPTIONS

        options = tuple(SearchedOptions.__annotations__ if call.__name__ == "compare" else OPTIONS)
        for name in kwargs:
            if name not in own and name not in options:
                raise unknown_name(f"argument of {call.__name__}", name, (*own, *options))
        try:
            return call(*args, **kwargs)
        except InputError as error:
            error.typed = error.typed or str(error)
            argument = lambda flag: NAMES.get(flag[0], flag[0][2:].replace("-", "_"))  # noqa: E731
            error.args = (re.sub(r"--[a-z][a-z0-9-]*", argument, error.typed),)
            raise

    return named
