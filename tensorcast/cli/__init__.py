"""The command line: arguments in, one call, report out. Nothing heavy is imported before a command needs it."""

from tensorcast.cli.app import app, main

from tensorcast.cli import simulate, launch, catalog  # isort: skip  (each registers its commands, in the order of --help)

__all__ = ["app", "catalog", "launch", "main", "simulate"]
