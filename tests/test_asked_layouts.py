"""Layouts and options that a comparison is asked for: nothing else is compared, and what is asked in vain is said."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

import tensorcast as tc
from tensorcast.cli import app

ASKED: dict[str, Any] = {"input_len": 2000, "output_len": 200}


def test_sizes_that_no_asked_layout_divides_are_left_out() -> None:
    found = tc.compare("qwen3-30b-a3b", device="h100", world_size=[4, 8], layouts=["tp8"], **ASKED)
    assert set(found.candidates["layout"]) == {"tp8-dp1"} and set(found.candidates["gpus"]) == {8}
    assert "left out: 4 h100-sxm: no layout asked for divides as many" in found.notes
    alone = tc.compare("qwen3-30b-a3b", device="h100", world_size=8, layouts=["tp8"], **ASKED)
    assert found.best is not None and alone.best is not None
    assert found.best["tokens_per_s_per_gpu"] == alone.best["tokens_per_s_per_gpu"]


def test_asked_layouts_hold_in_both_pools() -> None:
    asked: dict[str, Any] = {**ASKED, "device": "h100", "world_size": 8, "decode_device": "h200"}
    with pytest.raises(tc.InputError, match=r"tp8-dp1 on h200-sxm takes 8 GPUs, which does not divide 4$"):
        tc.compare("qwen3-30b-a3b", **asked, decode_world_size=4, layouts=["tp8"])
    found = tc.compare("qwen3-30b-a3b", **asked, decode_world_size=4, layouts=["tp8", "tp4"]).candidates
    assert set(found["layout"].str.partition("@")[0]) == {"tp4-dp1"}  # of replies
    assert set(found["prefill_layout"].str.partition("@")[0]) == {"tp4-dp1", "tp8-dp1"}


@pytest.mark.parametrize(
    ("world", "decode", "says"),
    [
        (2, None, "it needs at least 4 h100-sxm; or quantise"),  # a pool of two GPUs for each phase
        (2, ("h200", None), "at least 2 h100-sxm and 1 h200-sxm: --world-size 4 or another multiple of 2"),
        (1, ("h200", 1), "it needs at least 2 h100-sxm and 1 h200-sxm; or quantise"),
    ],
)
def test_pools_need_what_both_take(world: int, decode: tuple[str, int | None] | None, says: str) -> None:
    """Mixtral-8x7B in bf16 takes 93 GB: two H100, one H200."""
    apart: dict[str, Any] = {"decode_device": decode[0], "decode_world_size": decode[1]} if decode else {}
    with pytest.raises(tc.InputError, match="mixtral-8x7b does not fit") as caught:
        tc.compare("mixtral-8x7b", device="h100", world_size=world, modes=["disaggregated"], **ASKED, **apart)
    assert says.replace("--world-size", "world_size") in str(caught.value)


def test_what_is_asked_in_vain_is_said() -> None:
    said = " ".join(tc.compare("mixtral-8x7b", device="h100", world_size=2, dcp=[2], layouts=["tp2"], **ASKED).notes)
    assert "no effect here: --dcp (no layout has as many GPUs that would hold copies" in said
    for flag, value in (("--replay-top", "3"), ("--skip-bad", ""), ("--percentile", "99")):
        done = CliRunner().invoke(app, ["compare", "mixtral-8x7b", "-d", "h100", "-n", "2", flag, *value.split()])
        assert done.exit_code == 2 and done.output.strip().endswith(": is about a --trace, and none is given")
