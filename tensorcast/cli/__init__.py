"""The command line: arguments in, one call, report out. Nothing heavy is imported before a command needs it."""

from tensorcast.cli.app import MODULES, app, main

__all__ = ["app", "main"]

for _name in (
    "simulate", "compare", "explore", "explain", "experts", "predict", "replay", "launch", "validate", "calibrate"
):  # fmt: skip
    MODULES[_name] = f"tensorcast.cli.{_name}"
for _name in ("models", "devices", "engines"):
    MODULES[_name] = "tensorcast.cli.catalog"
