"""Links between each two GPUs: what a group gets of them, and all-reduces on AMD as published."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tensorcast.cost.collectives import collective_time
from tensorcast.profiles.device import Tier
from tensorcast.profiles.store import load_device

KB, MB = 1024, 1024 * 1024

PUBLISHED_US = {
    # ROCm/aiter#801, "vllm cr", 2 GPUs
    ("mi300x", 2): {4 * KB: 7.07, 64 * KB: 7.66, 512 * KB: 17.13, MB: 28.15, 4 * MB: 93.79, 16 * MB: 355.91,
                    128 * MB: 2787.55},
    # vllm-project/vllm#19744, "baseline", 4 GPUs
    ("mi300x", 4): {2 * KB: 7.18, 32 * KB: 7.58, 256 * KB: 14.39, MB: 22.91, 4 * MB: 63.86, 16 * MB: 230.48},
    # vllm-project/vllm#39080, "vllm/us", 8 GPUs
    ("mi355x", 8): {24 * KB: 6.3, 96 * KB: 7.6, 192 * KB: 10.0, 384 * KB: 13.1, 768 * KB: 16.0},
}  # fmt: skip


@pytest.mark.parametrize(("device", "ranks"), PUBLISHED_US)
def test_all_reduces_on_amd_take_what_was_published(device: str, ranks: int) -> None:
    table = PUBLISHED_US[device, ranks]
    time = collective_time("all_reduce", np.array([*table], float), (ranks,), load_device(device))
    ratio = np.asarray(time.seconds) * 1e6 / np.array([*table.values()])
    assert abs(np.median(ratio) - 1) < 0.1
    assert np.all((ratio > 0.75) & (ratio < 1.25)), ratio


def links(size: int) -> Tier:
    return Tier.model_validate({
        "name": "links", "size": size, "bandwidth_bytes_per_s": {"value": 64e9 * max(size - 1, 1), "source": "made up"},
        "latency_s": {"value": 1e-6, "source": "made up"}, "pairwise": True,
    })


@given(st.integers(2, 16), st.data())
def test_each_peer_adds_a_link(size: int, data: st.DataObject) -> None:
    ranks = data.draw(st.integers(2, size))
    assert links(size).among(ranks) == pytest.approx(64e9 * (ranks - 1))


def test_behind_a_switch_a_pair_has_all_of_it() -> None:
    nvlink = load_device("h100-sxm").interconnect[0]
    assert nvlink.among(2) == nvlink.among(8) == float(nvlink.bandwidth_bytes_per_s)


@pytest.mark.parametrize("op", ["all_gather", "reduce_scatter", "send_recv", "all_to_all"])
def test_two_of_eight_move_a_seventh(op: str) -> None:
    device = load_device("mi300x")
    switched = device.model_copy(update={
        "interconnect": (device.interconnect[0].model_copy(update={"pairwise": False}), *device.interconnect[1:])
    })
    per_byte = [
        (float(many.seconds) - float(few.seconds)) / 1e9
        for machine in (device, switched)
        for few, many in [[collective_time(op, size, (2,), machine) for size in (1e9, 2e9)]]
    ]
    # rings reach 0.7 of links between pairs, 0.8 behind a switch; messages 0.75 of both
    worse = 7 * (0.8 / 0.7 if op in ("all_gather", "reduce_scatter") else 1)
    assert per_byte[0] / per_byte[1] == pytest.approx(worse, rel=1e-6)


def test_a_single_gpu_has_no_pairs() -> None:
    with pytest.raises(ValidationError, match="pairwise links of tier 'links' need a size of 2 or more, not 1"):
        links(1)
