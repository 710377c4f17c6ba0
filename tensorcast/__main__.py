"""``python -m tensorcast``, and the console script: a Ctrl-C while modules are still read is one line, too."""

import sys


def main() -> None:
    """Entry point of the console script."""
    try:
        from tensorcast.cli import main as run
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()
