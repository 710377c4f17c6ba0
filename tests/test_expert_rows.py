"""Rows that are priced for recorded choices are the rows that the layer sends, on four gloo ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch.multiprocessing as mp
from expert_rows import EXPERTS, RANKS, TOKENS, TOP_K, counts, placements, run

from tensorcast.cost.placing import rank_loads
from tensorcast.cost.recordings.named import recording


@pytest.fixture(scope="module")
def received(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[int]]]:
    """By rank and placement: rows received, and how often this rank's tokens chose each expert."""
    address = tmp_path_factory.mktemp("ranks") / "rendezvous"
    mp.get_context("forkserver").set_forkserver_preload(["expert_rows"])
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(Path(__file__).parent))
        mp.start_processes(run, (str(address),), nprocs=RANKS, start_method="forkserver")
    return [json.loads(Path(f"{address}.{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("name", ["linear", "round_robin", "eplb"])
def test_priced_rows_are_the_rows_sent(received: list[dict[str, list[int]]], name: str, tmp_path: Path) -> None:
    """The layer's own counters, written as a recording and read back, give every rank's rows exactly."""
    recorded = np.sum([one[name][1:] for one in received], axis=0)
    assert np.array_equal(recorded[:EXPERTS], counts())
    file = tmp_path / "layer.json"
    file.write_text(json.dumps({"logical_count": [recorded[:EXPERTS].tolist()]}))
    read = recording(str(file)).of("decode").counts
    placement = placements()[name]
    priced = rank_loads(read, np.array([placement.physical_to_logical]), placement.experts_per_rank)[0]
    sent = np.array([one[name][0] for one in received])
    assert sent.sum() == sum(TOKENS) * TOP_K
    assert priced * sent.mean() == pytest.approx(sent, abs=1e-9)


def test_copies_share_the_rows(received: list[dict[str, list[int]]]) -> None:
    """Tokens take copies in turn: a rank's rows differ from even shares by the odd token of each rank and copy."""
    placement = placements()["copies"]
    sent = np.array([one["copies"][0] for one in received])
    even = placement.loads(counts())
    assert sent.sum() == pytest.approx(even.sum()) and np.abs(sent - even).max() <= 0.1 * even.max()
