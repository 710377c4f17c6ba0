"""Download engines' wheels and print what differs from our profiles and launch tables: ``make engines-check``."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tensorcast.calibrate import command
from tensorcast.errors import InputError
from tensorcast.profiles.releases import nearest_release, release_order
from tensorcast.validate.engines.check import READERS, Read, differences, read

PINNED = Path("tests", "data", "engines")
"""Where names and values of releases are kept that profiles were held to."""


def download(what: str, folder: Path) -> Path:
    """The wheel of ``NAME`` or ``NAME==RELEASE`` without what it depends on; one that is there is not fetched again.

    Raises :class:`InputError` where pip does not get it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--only-binary", ":all:", what]
    done = subprocess.run([*pip, "--dest", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{what}: pip cannot download it: {' '.join(done.stderr.split())[-200:]}")
    name, _, release = what.partition("==")
    wheels = {release_order(release_of(path)[1]) or (): path for path in folder.glob(f"{name}-{release or '*'}-*.whl")}
    if not wheels:
        raise InputError(f"{what}: no wheel in {folder} after pip's download")
    return wheels[max(wheels)]


def release_of(wheel: Path) -> tuple[str, str]:
    """Engine and release that a wheel's name tells."""
    found = re.match(r"(?P<name>[a-z_]+)-(?P<release>[^-]+)-", wheel.name)
    if found is None:
        raise InputError(f"{wheel}: no wheel's name (NAME-RELEASE-...whl)")
    return found["name"], found["release"]


def beside_pinned(found: Read, folder: Path) -> list[str]:
    """Arguments that a release has more or fewer than the pinned copy of its engine: its own, or the one before."""
    copies = {path.stem.partition("-")[2]: path for path in folder.glob(f"{found.engine}-*.json")}
    if not copies:
        return []
    release = nearest_release(found.release, copies) or next(iter(copies))
    kept = Read.kept(copies[release])
    if kept.arguments == found.arguments:
        return []
    changed = {
        "new": sorted(found.arguments.keys() - kept.arguments.keys()),
        "gone": sorted(kept.arguments.keys() - found.arguments.keys()),
        "changed": sorted(
            name for name in found.arguments.keys() & kept.arguments.keys()
            if found.arguments[name] != kept.arguments[name]
        ),
    }  # fmt: skip
    return [f"arguments {what} since {release}: {' '.join(names)}" for what, names in changed.items() if names]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit code is 1 where anything differs."""
    program = "python -m tensorcast.validate.engines.command"
    parser = argparse.ArgumentParser(prog=program, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engines", nargs="*", default=[], help="NAME, NAME==RELEASE or a wheel (default: the newest)")
    parser.add_argument("--wheels", type=Path, default=Path("out", "wheels"), help="folder of downloads")
    parser.add_argument("--pin", action="store_true", help=f"keep what was read in {PINNED}")
    options = parser.parse_args(arguments)
    differ = False
    for what in options.engines or list(READERS):
        wheel = Path(what) if what.endswith(".whl") else download(what, options.wheels)
        found = read(*release_of(wheel), wheel)
        said = [*differences(found), *beside_pinned(found, PINNED)]
        differ |= bool(said)
        print(f"{found.engine} {found.release}: {len(said) or 'no'} difference{'s' if len(said) != 1 else ''}")
        for line in said:
            print(f"  {line}")
        if options.pin:
            path = PINNED / f"{found.engine}-{found.release}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            found.write(path)
            print(f"  kept in {path}")
    return int(differ)


if __name__ == "__main__":
    command.run(main)
