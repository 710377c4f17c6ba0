"""``python -m tensorcast``, and the console script: a Ctrl-C while modules are still read is one line, too."""

import gc
import os
import sys


def main() -> None:
    """Entry point of the console script."""
    # What a command makes lives until it ends: by default the collector goes through it all dozens of times in vain.
    gc.set_threshold(1_000_000, 50, 50)
    # Products here are of small matrices: threads of NumPy's BLAS would wait for one another longer than they work.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        from tensorcast.cli import main as run
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()
