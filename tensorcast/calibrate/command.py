"""What the modules that ``make`` runs do around their ``main``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from tensorcast.errors import InputError


def run(main: Callable[[], int]) -> NoReturn:
    """Exit with the code of ``main``; what was asked wrongly is one line on stderr."""
    try:
        sys.exit(main())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
