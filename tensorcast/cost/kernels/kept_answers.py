"""What kernels' fitted models answered, kept on disk from process to process: a search asks for thousands of sizes, and
the next one mostly for the same.

A file holds numbers alone: one line of JSON says whose they are, the rest are doubles. Its name stands for all that an
answer hangs on: the device's profile, the engines', the fitted models and the code that prices.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from itertools import accumulate
from pathlib import Path

import numpy as np

from tensorcast.cost.work import Array
from tensorcast.files import cache_dir, digest_of, write_atomically
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.kept import kept_as
from tensorcast.profiles.store import profile_roots

Answers = dict[tuple[str, ...], Array]
"""By kernel and names of its sizes ``[4, codes]``: codes of sizes, ascending, and factor, error and level of each."""

Name = tuple[str, str, str]
"""Family, dtype and variant of a kernel."""

Residuals = dict[Name, tuple[str, tuple[str, str] | None]]
"""By the kernel that is asked for: the variant that models tell it by, and engine and variant of the kernel whose
residual applies, if one does."""

MOST_KEPT = 1 << 17
"""Sizes in one file (4 MB); a process that has asked for more keeps none of them."""

TRANSFERRED = "other-devices"
"""Name of the model fitted over all measured devices, for those of their vendor that were not."""

_CODE = tuple(sorted(Path(__file__).parent.parent.rglob("*.py")))


def model_path(device: str) -> Path | None:
    """Where the kernel model of a device is kept, the user's own before the shipped one."""
    for root in profile_roots():
        path = root / "calibration" / f"{device}.npz"
        if path.is_file():
            return path
    return None


def answers_file(device: DeviceProfile, engine: str, *models: Path) -> Path | None:
    """Where the answers of ``models`` for a device under an engine are kept; None for a device that is in no file, and
    without a cache."""
    folder, name = cache_dir(), kept_as(device)
    if folder is None or not name or not models:
        return None
    engines = (path for root in profile_roots() for path in sorted((root / "engines").glob("*.y*ml")))
    return folder / "answers" / f"{name}-{engine}-{np.__version__}-{digest_of((*_CODE, *engines, *models))[:16]}"


def read_answers(path: Path | None) -> tuple[Answers, Residuals]:
    """What is kept; nothing where there is no file, or it is damaged."""
    if path is None:
        return {}, {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        with path.open("rb") as file:
            said, body = json.loads(file.readline()), file.read()
        if said["crc32"] == zlib.crc32(body):
            ends, every = [0, *accumulate(said["sizes"])], np.frombuffer(body).reshape(4, -1)
            spans = zip(said["kernels"], ends, ends[1:], strict=False)
            whose = {tuple(asked): (told, belongs and tuple(belongs)) for asked, told, belongs in said["residuals"]}
            return {tuple(name): every[:, start:end] for name, start, end in spans}, whose
    return {}, {}


def keep_answers(path: Path, answers: Answers, residuals: Residuals) -> None:
    """Write them all, unless they are too many."""
    sizes = [each.shape[1] for each in answers.values()]
    if not 0 < sum(sizes) <= MOST_KEPT:
        return
    every = np.concatenate([*answers.values()], axis=1)
    head = {
        "kernels": [list(name) for name in answers], "sizes": sizes, "crc32": zlib.crc32(body := every.tobytes()),
        "residuals": [(asked, *found) for asked, found in residuals.items()],
    }
    with contextlib.suppress(OSError):  # a read-only home costs time, not the answer
        write_atomically(path, json.dumps(head).encode() + b"\n" + body)
