"""Routing counts read from files as engines write them, merged, compared, and refused in one line."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tensorcast.cost.recordings.formats import balancedness_log, read_counts
from tensorcast.cost.recordings.named import recording, shipped
from tensorcast.cost.recordings.recording import EITHER, LayerCounts, checked_counts, drift, merged
from tensorcast.cost.routing import Routing
from tensorcast.errors import InputError

COUNTS = np.random.default_rng(0).integers(1, 50, (3, 8))
"""Of three MoE layers, after two dense ones."""
WITH_DENSE = np.vstack([np.zeros((2, 8), dtype=int), COUNTS])


def test_sglang_json_drops_dense_layers_and_keeps_their_numbers(tmp_path: Path) -> None:
    file = tmp_path / "counts.json"
    file.write_text(json.dumps({"logical_count": WITH_DENSE.tolist()}))
    found = read_counts(file)[EITHER]
    assert np.array_equal(found.counts, COUNTS) and found.layers == (2, 3, 4)


def test_sglang_dump_adds_up_its_buffer_of_steps(tmp_path: Path) -> None:
    """``_StatAccumulator.dump``: [buffered steps, layers, experts], steps that were not seen are zeros."""
    file = tmp_path / "expert_distribution_recorder_1.pt"
    steps = torch.zeros(4, 5, 8, dtype=torch.int32)
    steps[0], steps[2] = torch.tensor(WITH_DENSE), torch.tensor(2 * WITH_DENSE)
    torch.save({"rank": 0, "logical_count": steps, "average_utilization_rate_over_window": None}, file)
    assert np.array_equal(read_counts(file)[EITHER].counts, 3 * COUNTS)


def test_sglang_passes_map_slots_back_to_experts(tmp_path: Path) -> None:
    """``per_pass``: counts of physical experts; copies of an expert are added up."""
    file = tmp_path / "expert_distribution_recorder_1_0.pt"
    placed = torch.tensor([[0, 1, 2, 0], [2, 1, 0, 2]])
    counts = torch.tensor([[1, 2, 3, 4]] * 2)
    records = [{"forward_pass_id": i, "rank": 0, "global_physical_count": counts} for i in (7, 8)]
    torch.save({"records": records, "last_physical_to_logical_map": placed}, file)
    assert read_counts(file)[EITHER].counts.tolist() == [[10, 4, 6], [6, 4, 10]]


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (Path(tmp_path / "ran"),))  # type: ignore[return-value]

    file = tmp_path / "dump.pt"
    torch.save({"logical_count": Bomb()}, file, pickle_module=pickle)
    with pytest.raises(InputError, match="without running code in it"):
        read_counts(file)
    assert not (tmp_path / "ran").exists()


def test_trtllm_folder_adds_up_ranks_and_iterations(tmp_path: Path) -> None:
    (tmp_path / "meta_info.json").write_text(json.dumps({"num_experts": 4, "num_experts_per_token": 2}))
    for rank in (0, 1):
        held = {f"{step}_{layer}": torch.tensor([rank, step, layer, 1]) for step in (50, 51) for layer in (3, 10)}
        save_file(held, tmp_path / f"rank{rank}.safetensors")
    save_file({"50_3": torch.zeros(9)}, tmp_path / "rank0_raw.safetensors")
    found = read_counts(tmp_path)[EITHER]
    assert found.layers == (3, 10)
    assert found.counts.tolist() == [[2, 202, 12, 4], [2, 202, 40, 4]]


def test_csv_keeps_layers_and_phases_apart(tmp_path: Path) -> None:
    file = tmp_path / "load.csv"
    lines = [f"{p},{layer},{e},{(layer + 1) * e + (p == 'decode')}" for p in ("prefill", "decode") for layer in (0, 1)
             for e in range(3)]
    file.write_text("phase,layer,expert,count\n" + "\n".join(lines) + "\n")
    assert Routing.parse(str(file), "prefill").counts.counts.tolist() == [[0, 1, 2], [0, 2, 4]]  # type: ignore[union-attr]
    assert Routing.parse(f"recorded:{file}", "decode").counts.counts.tolist() == [[1, 2, 3], [1, 3, 5]]  # type: ignore[union-attr]


def test_csv_without_layers_stands_for_every_layer(tmp_path: Path) -> None:
    file = tmp_path / "load.csv"
    file.write_text("count\n3\n1\n")
    counts = read_counts(file)[EITHER]
    assert counts.counts.tolist() == [[3, 1]] and counts.layers == ()
    assert counts.for_model(2, (3, 4, 5)) is counts


def test_a_layer_column_is_not_summed(tmp_path: Path) -> None:
    """Two layers that mirror each other are even when added up, and far from it one by one."""
    file = tmp_path / "load.csv"
    file.write_text("layer,expert,count\n0,0,9\n0,1,1\n1,0,1\n1,1,9\n")
    shares = read_counts(file)[EITHER].shares
    assert shares.max(axis=1).tolist() == [0.9, 0.9]


def test_several_recordings_are_added_up_or_kept_apart(tmp_path: Path) -> None:
    for name, counts in (("a", COUNTS), ("b", 2 * COUNTS)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"logical_count": counts.tolist()}))
    both = recording(f"{tmp_path}/a.json,{tmp_path}/b.json")
    assert np.array_equal(both.of("decode").counts, 3 * COUNTS)
    apart = recording(f"prefill={tmp_path}/a.json,decode={tmp_path}/b.json")
    assert np.array_equal(apart.of("decode").counts, 2 * COUNTS) and not apart.stands_in("decode")
    one = recording(f"prefill={tmp_path}/a.json")
    assert one.stands_in("decode") and np.array_equal(one.of("decode").counts, COUNTS)


def test_drift_is_the_part_of_choices_that_moved() -> None:
    before, after = (LayerCounts("x", np.array(c, dtype=float)) for c in ([[5, 5], [1, 3]], [[9, 1], [2, 6]]))
    assert drift(before, after).tolist() == pytest.approx([0.4, 0.0])
    with pytest.raises(InputError, match="cannot be compared"):
        drift(before, LayerCounts("c", np.ones((1, 2))))
    with pytest.raises(InputError, match="cannot be added"):
        merged("sum", [before, LayerCounts("c", np.ones((2, 3)))])


def test_shipped_popularity_has_both_phases_and_a_source() -> None:
    assert "deepseek-r1" in shipped()
    found = recording("deepseek-r1")
    assert {phase: found.of(phase).counts.shape for phase in ("prefill", "decode")} == {
        "prefill": (58, 256), "decode": (58, 256)
    }
    assert found.of("decode").layers == tuple(range(3, 61)) and "sglang" in found.source
    # the busiest of 32 ranks in order, over the mean: 2.3 to 3.0 in the recordings themselves
    by_rank = found.of("prefill").shares.reshape(58, 32, 8).sum(-1)
    assert 2.2 < (by_rank.max(1) * 32).mean() < 3.1


def test_balancedness_lines_of_engines() -> None:
    """As vLLM 0.24.0 (eplb_state.py) and SGLang 0.5.14 (expert_distribution.py) print them."""
    lines = [
        "INFO 07-01 12:00:00 EPLB step: 120 for model m: avg_tokens=64.00, max_tokens=128, balancedness=0.5000, steps "
        "until the next rearrangement: 2880",
        "nothing",
        "[Expert Balancedness] forward_pass_id=3 current_pass_balancedness=0.731 last_10_average_balancedness=0.700 ",
    ]
    assert balancedness_log(lines) == [(0.5, 120), (0.731, None)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"logical_count": [[1, -2]]}', "at least 0"), ('{"logical_count": [[0, 0]]}', "not all 0"),
        ('{"logical_count": [[1, 2], [3]]}', "as many in every layer"),
        ('{"other": 1}', "needs logical_count, found other"),
        ("[1]", "must hold logical_count"), ("{", "not JSON"),
        ('{"logical_count": [[1, 2], [1, 2], [0, 0], [1, 2]]}', "layer 2 has no counts"),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        read_counts(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("layer,expert,count\n0,0,1\n0,2,1\n", "expert 1 is in no row"),
        ("layer,expert,count\n-1,0,1\n", "whole numbers"),
        ("phase,expert,count\ntrain,0,1\n", "phase 'train': must be prefill or decode"),
    ],
)
def test_bad_tables_are_one_clear_line(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "bad.csv"
    file.write_text(content)
    with pytest.raises(InputError, match=message):
        read_counts(file)


def test_counts_of_another_model_are_refused() -> None:
    counts = checked_counts("x", WITH_DENSE, dense=True)
    assert counts.for_model(8, (2, 3, 4)) is counts
    for experts, layers, message in (
        (16, (2, 3, 4), "8 counts a layer, but the model has 16"),
        (8, (2, 3), "counts of 3 layers, but .* 2 MoE layers"),
        (8, (2, 3, 4, 5), "3 layers, but"),
    ):
        with pytest.raises(InputError, match=message):
            counts.for_model(experts, layers)


def test_an_unknown_name_lists_those_that_exist() -> None:
    with pytest.raises(InputError, match="unknown recording 'deepseek-r9': did you mean deepseek-r1"):
        recording("deepseek-r9")
    with pytest.raises(InputError, match="no such file"):
        recording("nowhere/x.json")
