"""Which devices a folder of measurements is about, and what no device can have run."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from tensorcast.calibrate.impossible_rows import IMPOSSIBLE
from tensorcast.calibrate.measured_devices import read_device, system_of
from tensorcast.errors import InputError
from tensorcast.profiles.store import load_device

GEMM = {"m": 1, "n": 8192, "k": 8192, "gemm_dtype": "bfloat16", "engine": "vllm", "engine_version": "1"}


def write(folder: Path, system: str, *milliseconds: float) -> None:
    pytest.importorskip("pyarrow")
    (folder / system / "any").mkdir(parents=True)
    rows = [GEMM | {"m": 1 + i, "latency": ms, "kernel_source": "any"} for i, ms in enumerate(milliseconds)]
    pd.DataFrame(rows).to_parquet(folder / system / "any" / "vllm_gemm_perf.parquet")


def test_a_system_is_known_by_an_alias(tmp_path: Path) -> None:
    write(tmp_path, "rtx_pro_6000_server", 0.1)
    (tmp_path / "aiter" / "configs").mkdir(parents=True)
    assert system_of(tmp_path, load_device("mi325x")) == "gfx942-304"  # a checkout is one, whatever else lies there
    (tmp_path / "aiter" / "configs").rmdir()
    assert system_of(tmp_path, load_device("rtx-pro-6000")) == "rtx_pro_6000_server"
    assert system_of(tmp_path, load_device("l40s")) is None
    with pytest.raises(InputError, match="no measured tables of l40s"):
        read_device(tmp_path, load_device("l40s"))


def test_rows_from_the_cache_go(tmp_path: Path) -> None:
    """134 MB of weights take 84 us on an RTX PRO 6000; its cache of 128 MB gave them in half of that."""
    write(tmp_path, "rtx_pro_6000_server", 0.042, 0.09)
    read = read_device(tmp_path, load_device("rtx-pro-6000"))
    rows, = read.kernels.values()
    assert rows.seconds == pytest.approx([90e-6]) and read.dropped == {f"gemm: {IMPOSSIBLE}": 1}
    assert "rtx_pro_6000_server" in read.source
