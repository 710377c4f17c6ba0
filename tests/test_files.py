"""What can be written is known before the work, and nothing is left of the question."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tensorcast.errors import InputError
from tensorcast.files import check_directory, check_file


def test_out_must_be_a_directory(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, file / "deeper"):
        with pytest.raises(InputError, match="is a file, not a directory"):
            check_directory(path)
    check_directory(tmp_path / "to" / "be" / "made")
    assert sorted(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no file system here that takes nothing")
def test_a_place_that_takes_nothing_is_said_before_the_work() -> None:
    with pytest.raises(InputError, match="--out /proc/nope: cannot be written: "):
        check_directory(Path("/proc/nope"))
    with pytest.raises(InputError, match=r"--out /proc/nope\.csv: cannot be written: "):
        check_file("--out", Path("/proc/nope.csv"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_out_must_be_writable(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="no permission"):
        check_directory(tmp_path / "new")
