"""``python -m tensorcast``, and the console script: a Ctrl-C while modules are still read is one line, too."""

import atexit
import contextlib
import gc
import os
import sys
import threading


def main() -> None:
    """Entry point of the console script."""
    # What a command makes lives until it ends: by default the collector goes through it all dozens of times in vain.
    gc.set_threshold(1_000_000, 50, 50)
    # Products here are of small matrices: threads of NumPy's BLAS would wait for one another longer than they work.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Tables are small and written once: Arrow's own allocator would set aside 15 MB for them.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    try:
        from tensorcast.cli import main as run
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    try:
        run()
    except SystemExit as leaving:
        if isinstance(leaving.code, int) and not (sys.getprofile() or sys.gettrace()):
            _leave(leaving.code)
        raise


def _leave(code: int) -> None:
    """End the process as Python does, but for taking apart, one by one, all objects that a command made: that takes as
    long as some commands. Where other threads run Python waits for them."""
    if threading.active_count() > 1:
        return
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
