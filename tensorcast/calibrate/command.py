"""What the modules that ``make`` runs do around their ``main``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tensorcast.calibrate.measured_tables import installed_tables
from tensorcast.errors import InputError


def tables_parser(module: str, description: str) -> argparse.ArgumentParser:
    """The arguments of a module that fits device profiles to measured tables; :func:`tables_of` reads the first two."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--tables", type=Path, help="folder laid out SYSTEM/KIND/ENGINE_TABLE.parquet")
    source.add_argument("--from", dest="origin", choices=["silicon"], help="silicon: an installed aiconfigurator-core")
    parser.add_argument("--device", action="append", default=[], help="device profile (default: every one measured)")
    parser.add_argument("--profiles", type=Path, default=Path("profiles"), help="folder of profiles to write into")
    return parser


def tables_of(options: argparse.Namespace) -> Path:
    """The folder of tables that was asked for."""
    folder: Path = options.tables if options.origin is None else installed_tables()
    return folder


def run(main: Callable[[], int]) -> NoReturn:
    """Exit with the code of ``main``; what was asked wrongly is one line on stderr."""
    try:
        sys.exit(main())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
