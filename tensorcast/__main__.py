"""``python -m tensorcast``."""

from tensorcast.cli import main

if __name__ == "__main__":
    main()
