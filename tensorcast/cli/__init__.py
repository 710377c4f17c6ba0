"""The command line: arguments in, one call, report out. Nothing heavy is imported before a command needs it."""

from tensorcast.cli.app import app, main

# each registers its commands, in the order of --help
from tensorcast.cli import simulate, compare, explain, predict, launch, validate, calibrate, catalog  # isort: skip

__all__ = ["app", "calibrate", "catalog", "compare", "explain", "launch", "main", "predict", "simulate", "validate"]
