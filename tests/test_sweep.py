"""Sweeps of replays: the same rows in one process, in several, and on a cluster that loses a worker."""

from __future__ import annotations

import threading
import time
from typing import Any

import pandas as pd
import pytest

import tensorcast as tc
from tensorcast.errors import InputError
from tensorcast.scheduling.requests import Length, drawn

ASKED: dict[str, Any] = {
    "device": "h100", "layouts": ["tp2-ep2", "2 x tp1", "tp1 > tp1"], "rates": [2.0, 8.0],
    "requests": drawn(150, Length(800, 0.5), Length(60, 0.5), rate=4.0), "ttft_s": 0.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def alone() -> pd.DataFrame:
    return tc.replay_sweep("qwen3-30b-a3b", **ASKED)


def test_rows_are_replays(alone: pd.DataFrame) -> None:
    assert alone["rate"].tolist() == [2.0, 8.0] * 3 and not alone["problem"].any()
    row = alone.iloc[1]
    own = tc.replay("qwen3-30b-a3b", device="h100", layout="tp2-ep2", ttft_s=0.3,
                    requests=ASKED["requests"].scaled(rate=8.0 / ASKED["requests"].rate))  # fmt: skip
    assert {name: row[name] for name in own.summary()} == pytest.approx(own.summary())


def test_a_cluster_gives_the_same_though_a_worker_dies(alone: pd.DataFrame) -> None:
    distributed = pytest.importorskip("distributed", reason="no Dask here: pip install 'tensorcast[dask]'")
    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with cluster, distributed.Client(cluster) as watch:
        killed: list[int] = []

        def kill() -> None:
            """Once a task runs, kill the process that runs it, without a goodbye."""
            deadline = time.monotonic() + 60
            while not killed and time.monotonic() < deadline:
                for address, keys in watch.processing().items():
                    if keys:
                        worker = next(w for w in cluster.workers.values() if w.worker_address == address)
                        killed.append(worker.pid)
                        worker.process.process._process.kill()
                        return
                time.sleep(0.02)

        killer = threading.Thread(target=kill)
        killer.start()
        there: list[int] = []
        spread = tc.replay_sweep(
            "qwen3-30b-a3b", **ASKED, executor=f"dask:{cluster.scheduler_address}", done=there.append
        )
        killer.join()
    assert killed and there == [1, 2, 3, 4, 5, 6]
    pd.testing.assert_frame_equal(spread, alone, rtol=1e-12)


def test_what_cannot_be_replayed_says_so_and_the_others_are() -> None:
    asked = {**ASKED, "layouts": ["tp2-ep2", "tp1"], "rates": [], "device": "a100"}
    found = tc.replay_sweep("qwen3-30b-a3b", **asked, workers="1s -1")
    assert found["unserved"].gt(0).any() or found["problem"].astype(bool).any()
    with pytest.raises(InputError, match="2 servers fewer"):
        tc.replay_sweep("qwen3-30b-a3b", **asked, workers="1s -2")
    with pytest.raises(InputError, match="layout 'tp'"):
        tc.replay_sweep("qwen3-30b-a3b", **{**asked, "layouts": ["tp2-ep2", "tp"]})


def test_an_interrupt_leaves_the_rows_that_are_there() -> None:
    def done(many: int) -> None:
        if many == 3:
            raise KeyboardInterrupt

    found = tc.replay_sweep("qwen3-30b-a3b", **ASKED, done=done, keep=True)
    assert len(found) == 3 and found.attrs["stopped"]
    with pytest.raises(KeyboardInterrupt):
        tc.replay_sweep("qwen3-30b-a3b", **ASKED, done=done)
