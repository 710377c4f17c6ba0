"""``python -m tensorcast``."""

from tensorcast.cli.app import main

if __name__ == "__main__":
    main()
