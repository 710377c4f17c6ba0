"""What a launch table says: an engine's flags, the version and file they were read from, and what it cannot run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tensorcast.errors import unknown_name
from tensorcast.profiles import store
from tensorcast.profiles.sourced import Frozen

FOLDER = "launch"


class LaunchFlag(Frozen):
    """One flag, environment variable or key of a config file."""

    flag: str = Field(min_length=1, description="as it is typed; of a config file the dotted key")
    place: Literal["command", "launcher", "environment", "config"] = "command"
    takes: Literal["value", "nothing"] = "value"
    values: dict[str, str] = Field(default={}, description="our word to the engine's; empty: passed on as it is")
    value_devices: dict[str, tuple[str, ...]] = Field(
        default={}, description="our word -> architectures of the devices that it is for; else for all"
    )
    version: str | None = Field(default=None, description="of the engine it was read from, if not the table's")
    source: str


class LaunchRule(Frozen):
    """A limit of the engine; ``deploy/runnable.py`` has the condition under the same name."""

    says: str
    source: str


class LaunchTable(Frozen):
    """How an engine is started."""

    name: str
    version: str
    releases: tuple[str, ...] = ()
    description: str
    sources: dict[str, str]
    program: tuple[str, ...] = Field(min_length=1)
    remote_code: tuple[str, ...] = Field(
        default=(), description="types of models whose config.json neither transformers nor the engine reads by itself"
    )
    flags: dict[str, LaunchFlag]
    rules: dict[str, LaunchRule]

    @model_validator(mode="after")
    def _sources_are_named(self) -> LaunchTable:
        entries: dict[str, LaunchFlag | LaunchRule] = {**self.flags, **self.rules}
        for name, entry in entries.items():
            if entry.source not in self.sources:
                raise ValueError(f"{name}: source {entry.source!r} is no key of sources")
        return self


def list_launch_tables() -> tuple[str, ...]:
    """Names of the engines that can be launched, shipped and the user's, sorted. Reads no file."""
    folders = [root / FOLDER for root in store.profile_roots()]
    return tuple(sorted({path.stem for folder in folders for path in folder.glob("*.yaml")}))


def load_launch_table(engine: str, release: str = "") -> LaunchTable:
    """Table of a ``release`` of ``engine`` (empty: its newest), the user's before the shipped one.

    Raises :class:`InputError`, one line, on bad input.
    """
    for root in store.profile_roots():
        path = root / FOLDER / f"{engine}.yaml"
        if path.is_file():
            return store._read(path, LaunchTable, release)
    raise unknown_name("engine to launch", engine, list_launch_tables())
