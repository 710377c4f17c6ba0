"""A comparison's question, kept: the options by their flags, the command that asks it again, and a file of them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tensorcast.search.search_task import SEARCHED

if TYPE_CHECKING:
    from tensorcast.search.compare import Comparison

Words = Callable[[Any], Any]


def _listed(value: Any) -> str:
    if isinstance(value, str):
        return value
    return ",".join(map(str, value if isinstance(value, list | tuple) else [value]))


def _seconds(value: float) -> str:
    return f"{value!r}s"


FLAGS: dict[str, tuple[str, Words]] = {
    "device": ("device", _listed), "world_size": ("world-size", _listed), "engine": ("engine", _listed),
    "ttft_s": ("ttft", _seconds), "tpot_s": ("tpot", _seconds), "modes": ("mode", _listed),
    "layouts": ("layouts", _listed), "mtp_depth": ("mtp", _listed), "runnable_only": ("any-engine", lambda on: not on),
    **{name: (name.replace("_", "-"), _listed) for name in SEARCHED.values() if name != "mtp_depth"},
}
"""Arguments of :func:`tensorcast.api.compare` that the command line calls otherwise, or takes as a list."""

NOT_ASKED = ("prices", "jobs", "executor", "options")
"""Arguments that are told apart or change no answer."""


def flags(comparison: Comparison) -> dict[str, Any]:
    """What was asked, by flag: all options that hold something, and the price of every device, as it was used."""
    asked = {**comparison.question, **comparison.question.get("options", {})}
    found: dict[str, Any] = {}
    for name, value in asked.items():
        flag, written = FLAGS.get(name, (name.replace("_", "-"), lambda one: one))
        said = None if name in NOT_ASKED or value is None else written(value)
        if said is not None and said is not False and said != "":
            found[flag] = said
    tasks = [one for task in comparison.tasks for one in task.pools or (task,)]
    prices = {task.device.name: task.price for task in tasks if task.price is not None}
    if found and prices:
        found["price"] = ",".join(f"{name}={price!r}" for name, price in prices.items())
    return found


def command(given: Mapping[str, Any]) -> str:
    """The shell command that asks the same; empty where nobody kept what was asked."""
    if not given:
        return ""
    words = ["tensorcast", "compare", str(given["model"])]
    for name, value in given.items():
        if name != "model":
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join(words)


def config(given: Mapping[str, Any]) -> str:
    """The same as YAML, for ``--config``."""
    import yaml

    return f"# {command(given)}\n" + yaml.safe_dump(dict(given), sort_keys=False)
