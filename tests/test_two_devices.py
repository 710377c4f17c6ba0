"""Pools of two devices: every number is that of a prefill deployment on one and a decode deployment on the other."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from one_deployment import disaggregated
from typer.testing import CliRunner

import tensorcast as tc
from tensorcast.cli.app import app
from tensorcast.deploy.deployment import deploy
from tensorcast.deploy.layout import parse_layout
from tensorcast.profiles.store import load_device, load_engine, load_model
from tensorcast.report.compare.choices import View, cost_apart
from tensorcast.scheduling.pools import parse_servers
from tensorcast.scheduling.replay import priced_servers
from tensorcast.scheduling.requests import Length, drawn
from tensorcast.search.candidates import disaggregated as pairs
from tensorcast.search.compare import Comparison, compare
from tensorcast.search.replayed import replay_best
from tensorcast.search.search import search
from tensorcast.search.search_task import search_tasks
from tensorcast.search.space import space
from tensorcast.search.variant_prices import VariantPrices
from tensorcast.serving.curves import unevenly
from tensorcast.serving.hand_over import hand_over_s

MODEL, FIRST, SECOND = "qwen3-30b-a3b", "l40s", "h100-sxm"
LOAD: dict[str, Any] = {"input_len": 3000, "output_len": 300}


def asked(**more: Any) -> Comparison:
    question: dict[str, Any] = {"device": FIRST, "decode_device": SECOND, "world_size": 8, "tpot_s": 0.03, **LOAD}
    return tc.compare(MODEL, **question | more)


@pytest.fixture(scope="module")
def found() -> Comparison:
    return asked(ttft_s=2.0)


def sizes(row: Any) -> tuple[int, int]:
    """GPUs of all prefill and of all decode workers of a candidate."""
    first = parse_layout(row["prefill_layout"].partition("@")[0]).world_size * row["prefill_workers"]
    return int(row["replicas"] * first), int(row["gpus"] - row["replicas"] * first)


def test_a_candidate_is_its_two_pools_priced_alone(found: Comparison) -> None:
    """Deployments made one by one on either device, and a step of each by ``simulate``."""
    model, engine = load_model(MODEL), load_engine("vllm").in_pools()
    frame = found.candidates
    assert {*frame["mode"]} == {"disaggregated"} and {*frame["device"]} == {f"{FIRST} > {SECOND}"}
    for row in frame.sample(25, random_state=0).to_dict("records"):
        name = str(row["candidate"])
        scenario, first, second = found.behind[name]
        prefill = deploy(model, load_device(FIRST), engine, first.layout, "prefill", options=first.prefill)
        decode = deploy(model, load_device(SECOND), engine, second.layout, "decode", options=second.decode)
        load = replace(scenario.load, concurrency=float(row["concurrency"] / row["replicas"]))
        workers = int(row["prefill_workers"]), int(row["decode_workers"])
        alone = disaggregated(prefill, decode, *workers, load, least=5.0)
        assert not alone.problem
        if alone.batch != pytest.approx(row["batch"], rel=1e-6):
            continue  # as many users may be served at another batch, where a step's time jumps
        for column in ("ttft_s", "tpot_s", "decode_step_s", "prefill_step_s"):
            assert row[column] == pytest.approx(getattr(alone, column), rel=1e-6), (column, name)
        assert row["output_tokens_per_s"] == pytest.approx(alone.output_tokens_per_s * row["replicas"], rel=1e-6)
        one = second.layout
        step = tc.simulate(
            MODEL, device=SECOND, tp=one.tp, dp=one.dp, ep=one.ep, pp=one.pp,
            batch=int(unevenly(row["batch"], one.pp, 5.0)), context=int(load.context),
            **{key: getattr(second.decode, key) for key in (
                "routing", "all2all", "dispatch", "combine", "redundant_experts", "dual_batch_overlap",
                "external_shared_experts", "shared_expert_tp")},
        )  # fmt: skip
        assert row["decode_step_s"] == pytest.approx(step.step_s * engine.overhead.pool_factor, rel=1e-6)
        again = found.deployments(name)
        assert [made.device.name for made in again] == [FIRST, SECOND]
        assert row["capacity_bytes"] == float(load_device(SECOND).memory_bytes)


def test_two_pools_of_one_device_are_its_own() -> None:
    """The same device twice: every pair of pools, number by number, is what the device alone has, and the best is."""
    (task,) = search_tasks(
        load_model(MODEL), [load_device("h100")], [load_engine("vllm")], [8], modes=("disaggregated",), tpot_s=0.03,
        ttft_s=2.0, **LOAD,
    )
    twice, limits = replace(task, pools=(task, task)), (2.0, 0.03)
    shop = VariantPrices(task.scenario, space(task, Counter()), task.axes.chunk_tokens)
    alone, late = pairs(shop.in_pools(), 8, limits)
    both, too_late = pairs(shop.fed_by(shop).in_pools(), 8, limits, twice.pools_room())
    assert late == too_late and len(alone.variant) > 1000
    np.testing.assert_array_equal(both.variant, alone.variant)
    for name, values in alone.columns.items():
        np.testing.assert_array_equal(both.columns[name], values, err_msg=name)
    best = [compare([one], [search(one)]).best for one in (task, twice)]
    assert best[0] is not None and best[1] is not None
    assert best[1]["layout"] == f"{best[0]['layout']}@{SECOND}" and best[1]["ttft_s"] == best[0]["ttft_s"]
    assert best[1]["tokens_per_s_per_gpu"] == best[0]["tokens_per_s_per_gpu"]


def test_gpus_of_each_device() -> None:
    each = asked(world_size=4, decode_world_size=2, objective="throughput")
    rows = each.candidates.to_dict("records")
    within = [sizes(row) for row in rows if row["meets"]]
    assert max(first for first, _ in within) <= 4 and max(second for _, second in within) <= 2
    # of all pools of six GPUs of both, the best that takes no more of either
    free = asked(world_size=6, objective="throughput").candidates.to_dict("records")
    fitting = [row for row in free if row["meets"] and sizes(row)[0] <= 4 and sizes(row)[1] <= 2]
    assert each.best is not None
    assert each.best["output_tokens_per_s"] >= max(row["output_tokens_per_s"] for row in fitting) * (1 - 1e-9)


def test_each_pool_is_paid_at_its_own_price() -> None:
    prices = {"l40s": 1.0, "h100": 5.0}
    cheap = asked(objective="throughput", budget=11.0, prices=prices)
    for row in cheap.candidates.to_dict("records"):
        first, second = sizes(row)
        assert row["usd_per_hour"] == pytest.approx(first * 1.0 + second * 5.0)
        per_million = row["usd_per_hour"] / 3600 / row["output_tokens_per_s"] * 1e6
        assert row["cost_per_million_tokens"] == pytest.approx(per_million)
        assert not row["meets"] or row["usd_per_hour"] <= 11.0 * (1 + 1e-9)
    assert cheap.best is not None
    # two H100 leave one USD: the budget is used for what it buys, not for eight GPUs
    assert sizes(cheap.best)[1] <= 2
    read, _, _ = cost_apart(View(cheap), cheap.best)
    assert read == pytest.approx(sizes(cheap.best)[0] / cheap.best["usd_per_hour"])


def test_the_cheapest_pools_are_found_where_cost_decides() -> None:
    """Where an H100 costs twenty L40S, all pairs of workers tried one by one are no cheaper than what is found."""
    prices = {"l40s": 0.5, "h100": 10.0}
    best = asked(objective="cost", prices=prices, ttft_s=2.0, layouts=["tp1-dp1", "tp2-dp1"]).best
    assert best is not None
    (task,) = search_tasks(
        load_model(MODEL), [load_device(FIRST)], [load_engine("vllm")], [8], tpot_s=0.03, ttft_s=2.0,
        decode_device=load_device(SECOND), layouts=["tp1-dp1", "tp2-dp1"], objective="cost", **LOAD,
    )
    shops = [
        VariantPrices(one.scenario, space(one, Counter()), one.axes.chunk_tokens).in_pools() for one in task.pools
    ]
    cheapest = np.inf
    for y in range(1, 8):
        for x in range(1, 9 - y):  # exactly so many GPUs of each
            room = [(float(x + y), 1.0, 1.0), (float(x), 1.0, 0.0), (float(y), 0.0, 1.0)]
            points, _ = pairs(shops[1].fed_by(shops[0]).in_pools(), x + y, (2.0, 0.03), room)
            if not len(points.variant):
                continue
            c = points.columns
            late = (c["ttft_s"] > 2.0) | (c["tpot_s"] > 0.03)
            usd = 0.5 * shops[0].layouts["world_size"][c["prefill"].astype(int)] * c["prefill_workers"]
            usd = usd + 10.0 * shops[1].layouts["world_size"][points.variant] * c["decode_workers"]
            cheapest = min(cheapest, np.where(late, np.inf, usd / 3600 / c["output_tokens_per_s"] * 1e6).min())
    assert np.isfinite(cheapest)
    assert best["cost_per_million_tokens"] <= cheapest * (1 + 1e-9)


def test_its_name_is_read_by_replay(found: Comparison) -> None:
    """Pools, layouts and devices of the one name; caches go over the slower of both devices' networks."""
    assert found.best is not None
    servers = parse_servers(View(found).name(found.best))
    assert [one.device.name for one in servers if one.device] == [FIRST, SECOND]
    assert [one.count for one in servers] == [
        found.best["replicas"] * found.best[f"{role}_workers"] for role in ("prefill", "decode")
    ]
    priced = priced_servers(
        load_model(MODEL), load_device("h100"), load_engine("vllm"), servers, longest=4000,
        options=replace(found.deployments(found.best["candidate"])[1].options, all2all="auto"),
    )
    prefill, _ = found.deployments(found.best["candidate"])
    slowest = max(
        float(hand_over_s(replace(prefill, device=one, layout=prefill.layout), 8, 1000, 3000))
        for one in map(load_device, (FIRST, SECOND))
    )
    assert priced.pools[0].hand_over_s is not None
    assert priced.pools[0].hand_over_s(3000) == pytest.approx(slowest, rel=1e-6)


def test_the_best_are_replayed_on_their_devices(found: Comparison) -> None:
    sent = drawn(40, Length(2000, 0.2), Length(100, 0.2), rate=2.0)
    for one in replay_best(found, sent, top=2).candidates:
        assert one.outcome is not None, one.problem
        assert f"@{FIRST}" in one.outcome.layout and f"@{SECOND}" in one.outcome.layout


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"modes": ["aggregated"]}, "decode_device h100-sxm: is of pools, and modes aggregated has none"),
        ({"decode_device": None, "decode_world_size": 4}, "decode_world_size 4: is of decode_device, and none"),
        ({"decode_world_size": 0}, "decode_world_size 0: must be at least 1"),
        ({"decode_device": "h300"}, "unknown device 'h300'"),
        ({"prices": {"b200": 3.0}}, "b200-sxm is not one of device l40s or decode_device h100-sxm"),
        ({"layouts": ["tp3"], "decode_world_size": 2}, "does not divide world_size 8 or decode_world_size 2"),
        ({"world_size": 1}, "does not fit on 1 l40s > h100-sxm .* at least 2 l40s and 1 h100-sxm"),
        ({"world_size": 1, "decode_world_size": 1}, "does not fit on 1 l40s > 1 h100-sxm"),
    ],
)
def test_what_cannot_be(more: dict[str, Any], says: str) -> None:
    with pytest.raises(tc.InputError, match=says) as error:
        asked(**more)
    assert "\n" not in str(error.value)


def test_layouts_are_asked_of_either_pool() -> None:
    some = asked(layouts=["tp2", "tp4", "tp1-pp2"], world_size=4, decode_world_size=2)
    assert {name.partition("@")[0] for name in some.candidates["layout"]} <= {"tp2-dp1", "tp1-dp1-pp2"}
    assert any(note.startswith("left out: tp4-dp1 on l40s") for note in some.notes) or any(
        name.startswith("tp4-dp1@") for name in some.candidates["prefill_layout"]
    )


NAME = "2 x tp4@h100 > tp2-dp2@h200"


def ran(*words: str) -> str:
    done = CliRunner().invoke(app, [*words], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return done.output


def test_commands_read_a_pools_device(tmp_path: Path) -> None:
    of_phase = [ran("simulate", MODEL, "-d", "l40s", "-l", NAME, "--phase", phase) for phase in ("prefill", "decode")]
    assert "on 4 x h100-sxm" in of_phase[0] and "on 4 x h200-sxm" in of_phase[1]
    # each server takes what its own device holds
    most = {
        text: [int(line.split()[1]) for line in ran(
            "launch", MODEL, "-d", "l40s", "-l", text, "-e", "vllm").splitlines() if "--max-num-seqs" in line]
        for text in (NAME, "tp4@h100 > tp2-dp2@h100", "tp4@h200 > tp2-dp2@h200")
    }  # fmt: skip
    assert most[NAME] == [most["tp4@h100 > tp2-dp2@h100"][0], most["tp4@h200 > tp2-dp2@h200"][1]]
    ran("launch", MODEL, "-d", "l40s", "-l", NAME, "--out", str(tmp_path / "run"))
    assert "h100-sxm > h200-sxm" in (tmp_path / "run" / "runs.csv").read_text()
    with pytest.raises(tc.InputError, match="its decode runs on h200-sxm; ask on device h200"):
        tc.explain(MODEL, device="h100", world_size=4, layout=NAME, versus="tp4")
    why = tc.explain(MODEL, device="h200", world_size=4, layout=NAME, versus="tp4")
    assert np.isfinite(why.groups.select_dtypes("number")).all().all()
