"""Why one layout beats another: parts that add up, reasons that are true, elasticities by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import tensorcast as tc
from tensorcast.cli import app
from tensorcast.deploy import explain
from tensorcast.deploy.deployment import deploy
from tensorcast.deploy.explain import Explanation, applicable, by_group
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.options import Options

PAIR: dict[str, Any] = {"device": "h200", "world_size": 32, "layout": "tp1-dp32-ep32", "versus": "tp8-dp4-ep32"}


@pytest.fixture(scope="module")
def why() -> Explanation:
    return tc.explain("deepseek-v3", **PAIR, batch=16)


def test_groups_add_up_to_both_steps(why: Explanation) -> None:
    for letter, side in (("a", why.a), ("b", why.b)):
        assert why.groups[f"seconds_{letter}"].sum() == pytest.approx(side.step_s)
    assert why.groups["saved_s"].sum() == pytest.approx(why.b.step_s - why.a.step_s)
    assert "pipeline: waiting" not in set(why.groups["group"])


def test_pipeline_stages_add_up_too() -> None:
    piped = tc.explain("qwen3-30b-a3b", device="h100", world_size=8, layout="tp4-pp2", versus="tp8", batch=12)
    assert piped.groups["seconds_a"].sum() == pytest.approx(piped.a.step_s)
    waiting = by_group(piped.a)["pipeline: waiting"].seconds
    assert waiting >= -1e-9 and waiting < 0.2 * piped.a.step_s


def test_both_hold_the_same_load(why: Explanation) -> None:
    assert why.a.sequences == why.b.sequences == 16 * 32
    assert why.b.batch == 128
    full = tc.explain("deepseek-v3", **PAIR)
    assert full.a.sequences == full.b.sequences
    assert full.b.batch <= full.b.largest_batch < full.b.batch + 8


def test_reasons_by_hand(why: Explanation) -> None:
    """The latent cache lies on every tp rank: tp8 has 8 x the sequences per rank, so 8 x the cache to read."""
    rows = {row["group"]: row for row in why.groups.to_dict("records")}
    cache = rows["attention"]["bytes_b"] / rows["attention"]["bytes_a"]
    assert 4 < cache < 8 and rows["attention"]["saved_s"] > 0
    assert "memory traffic" in rows["attention"]["why"] and rows["attention"]["why"].startswith("B")
    assert rows["all-reduce"]["why"] == "only B has it" and rows["all-reduce"]["seconds_a"] == 0
    # the experts are the same on both
    assert rows["experts"]["flops_a"] == pytest.approx(rows["experts"]["flops_b"], rel=1e-6)


def test_a_layout_explains_itself_backwards() -> None:
    there = tc.explain("qwen3-30b-a3b", device="h100", world_size=8, layout="tp8", versus="dp8-ep8", batch=64)
    back = tc.explain("qwen3-30b-a3b", device="h100", world_size=8, layout="dp8-ep8", versus="tp8", batch=8)
    assert there.faster == pytest.approx(1 / back.faster)
    assert there.groups.set_index("group")["saved_s"].to_dict() == pytest.approx(
        {name: -saved for name, saved in back.groups.set_index("group")["saved_s"].items()}
    )


def test_elasticities_are_gains_no_larger_than_the_resource(why: Explanation) -> None:
    gains = why.elasticities.set_index("resource")
    assert list(gains.index) == [
        "compute", "memory bandwidth", "scale-up bandwidth", "scale-out bandwidth", "latency", "memory size",
    ]  # fmt: skip
    speed = gains.drop(index="memory size")
    assert (speed >= -1e-12).all().all() and (speed <= 0.1 + 1e-9).all().all()
    # 10 % more of everything that a step waits for is about 10 % in all
    assert 0.05 < speed["gain_a"].sum() < 0.115
    links: dict[Any, Any] = gains.loc[["scale-up bandwidth", "scale-out bandwidth"]].sum().to_dict()
    # all 32 ranks gather the same tokens, of which B's tp ranks send slices: rings go through both tiers at once
    assert links["gain_a"] > 0 and links["gain_b"] > 0
    seconds = why.groups.set_index("group").loc["dispatch"]
    assert seconds["seconds_a"] == pytest.approx(seconds["seconds_b"])


@settings(max_examples=12, deadline=None)
@given(
    model=st.sampled_from(["deepseek-v3", "qwen3-30b-a3b", "gpt-oss-120b"]),
    layouts=st.permutations(["tp1-dp32-ep32", "tp8-dp4-ep32", "tp4-dp8-ep8", "tp2-dp16-ep32", "tp1-dp16-ep16-pp2"]),
    past=st.integers(0, 30_000), engine=st.sampled_from(["vllm", "sglang", "trtllm"]),
)
def test_more_memory_never_hurts(model: str, layouts: list[str], past: int, engine: str) -> None:
    """A server may always run the smaller batch. At most, all cache that is won holds sequences at no cost."""
    asked: dict[str, Any] = {"device": "h200", "world_size": 32, "engine": engine, "batch": 1}
    try:
        why = tc.explain(model, **asked, layout=layouts[0], versus=layouts[1], context=past + 1)
    except tc.InputError:
        reject()  # a layout that the model or its memory does not allow
    for side, gained in ((why.a, "gain_a"), (why.b, "gain_b")):
        won: Any = why.elasticities.set_index("resource").loc["memory size", gained]
        bigger = explain.RESOURCES["memory size"](side.deployment.device)
        one = side.deployment
        other = deploy(one.model, bigger, one.engine, one.layout, "decode", options=one.options)
        more = other.largest_batch(1, why.past)
        assert 0 <= won <= more / side.largest_batch - 1 + 1e-9


def test_links_between_nodes_do_not_matter_inside_one() -> None:
    inside = tc.explain("qwen3-30b-a3b", device="h100", world_size=8, layout="tp8", versus="dp8-ep8", batch=8)
    gains = inside.elasticities.set_index("resource")
    assert gains.loc["scale-out bandwidth"].abs().max() == 0 and gains.loc["scale-up bandwidth"].min() > 0


def test_the_winner_of_a_comparison_can_be_explained() -> None:
    """Its step, to the digit, from the options in its row."""
    found = tc.compare(
        "deepseek-v3", device="h200", world_size=16, input_len=2048, output_len=512, engine="sglang",
        modes=["aggregated"], layouts=["dp16-ep16"], mtp_depth=[1], all2all=["deepep"],
        tpot_s=0.06,
    )  # fmt: skip
    assert found.best is not None
    best = found.best
    names = (
        "all2all", "redundant_experts", "external_shared_experts", "shared_expert_tp", "dual_batch_overlap", "mtp_depth"
    )
    why = tc.explain(
        "deepseek-v3", device="h200", world_size=16, layout="dp16-ep16", versus="tp2-dp8-ep16", engine="sglang",
        batch=int(best["batch"]), context=2048 + 256, dispatch=best["dispatch"] or None,
        **{name: best[name] for name in names},
    )  # fmt: skip
    assert best["all2all"] == "low_latency" and best["mtp_depth"] == 1
    assert why.a.step_s == pytest.approx(best["decode_step_s"], rel=0.02)
    assert "drafting" in set(why.groups["group"])


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("depth", [0, 1])
def test_halves_that_overlap_and_draft_are_told_apart(dual: bool, depth: int) -> None:
    why = tc.explain(
        "deepseek-v3", device="h200", world_size=16, layout="dp16-ep16", versus="tp2-dp8-ep16", engine="sglang",
        batch=86, context=2304, dual_batch_overlap=dual, mtp_depth=depth, all2all="low_latency",
    )  # fmt: skip
    assert ("drafting" in set(why.groups["group"])) == (depth > 0)
    told = float(why.groups["seconds_a"].sum())
    assert told == pytest.approx(why.a.step_s, rel=1e-6)


def test_options_hold_for_the_other_layout_as_far_as_they_apply() -> None:
    asked = Options(
        all2all="low_latency", redundant_experts=8, external_shared_experts=1, dual_batch_overlap=True, mtp_depth=1
    )
    assert applicable(asked, Layout(8, 1, 8, 8)) == asked
    assert applicable(asked, Layout(8, 8, 1, 8)) == Options(redundant_experts=8, mtp_depth=1)
    assert applicable(asked, Layout(8, 8)) == applicable(asked, Layout(8, 2, 4)) == Options(mtp_depth=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"versus": "tp1-dp32-ep32"}, "versus tp1-dp32-ep32: is the layout itself"),
        ({"layout": "tp8-dp2-ep16"}, "breaks rule 'world size'"),
        ({"layout": "fast"}, "layout 'fast'"),
        ({"batch": 300}, "which holds"),
        ({"world_size": 4, "layout": "tp4", "versus": "dp4-ep4"}, "does not hold one sequence"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(tc.InputError, match=message) as caught:
        tc.explain("deepseek-v3", **{**PAIR, **arguments})
    assert "--" not in str(caught.value)  # from Python, arguments go by their own names
    assert "\n" not in str(caught.value)


def test_command_line() -> None:
    words = ["explain", "qwen3-30b-a3b", "-d", "h100", "-n", "8", "--layout", "tp8", "--versus", "dp8-ep8"]
    for columns in (80, 100, 160):
        done = CliRunner().invoke(app, words, env={"COLUMNS": str(columns)})
        assert done.exit_code == 0, done.output
        assert max(map(len, done.output.splitlines())) <= min(columns, 100)
        assert "x as fast as" in done.output and "memory size" in done.output
    overlapped = CliRunner().invoke(app, [*words[:-3], "dp8-ep8", "--versus", "tp8", "--all2all", "low_latency",
                                         "--dual-batch-overlap", "--dispatch", "bf16"])  # fmt: skip
    assert overlapped.exit_code == 0 and "hidden by overlap" in overlapped.output
    document = json.loads(CliRunner().invoke(app, [*words, "--json", "-o", "100"]).output)
    assert document["context"] == 4096 + 50 and document["a"]["layout"] == "tp8-dp1"
