"""Comparing layouts: every number as if its candidate were alone, the answer by brute force, clear ends."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from one_deployment import OnePrefill, aggregated, disaggregated
from typer.testing import CliRunner

import tensorcast as tc
from tensorcast.cli import app
from tensorcast.cli.values import duration, read_layouts
from tensorcast.deploy.deployment import deploy
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.options import Options
from tensorcast.deploy.plan.plan import Collective
from tensorcast.parallel import note
from tensorcast.profiles.store import load_device, load_engine, load_model
from tensorcast.search.axes import FULL
from tensorcast.search.candidate_arrays import batches, largest_where
from tensorcast.search.candidate_table import COLUMNS, MEMORY, candidates_of
from tensorcast.search.candidates import aggregated as all_aggregated
from tensorcast.search.candidates import disaggregated as all_pools
from tensorcast.search.candidates import steady, told
from tensorcast.search.compare import Comparison
from tensorcast.search.search_task import SearchTask
from tensorcast.search.selection import alike, pareto
from tensorcast.search.space import space
from tensorcast.search.variant_prices import VariantPrices
from tensorcast.serving.traffic import Traffic
from tensorcast.trace.moe import EXPERT_STAGES

QWEN: dict[str, Any] = {"device": "h100", "world_size": 8, "input_len": 2048, "output_len": 256}
LIMITED: dict[str, Any] = {**QWEN, "ttft_s": 1.0, "tpot_s": 0.03}


@pytest.fixture(scope="module")
def found() -> Comparison:
    return tc.compare("qwen3-30b-a3b", **LIMITED)


TASK = SearchTask(
    model=load_model("deepseek-v3"), device=load_device("h200"), engine=load_engine("sglang"), gpus=16,
    load=Traffic(3000, 500, 1), axes=FULL, base=Options(routing="zipf:0.4"), runnable_only=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def shop() -> VariantPrices:
    """Every axis, nothing left out because of an engine, shared experts and uneven load."""
    return VariantPrices(TASK.scenario, space(TASK, Counter()), (2048, 8192))


NUMBERS = (
    "batch", "ttft_s", "tpot_s", "output_tokens_per_s", "ttft_error", "tpot_error", "decode_step_s", "prefill_step_s",
    "exposed_comm_s", "hidden_comm_s",
)  # fmt: skip


def test_every_candidate_is_priced_as_if_alone(shop: VariantPrices) -> None:
    """200 random candidates of both modes against deployments made one by one: the same to rounding.

    The other way round, too: a candidate is given by its batch here, alone by the users that this batch serves.
    """
    generator = np.random.default_rng(0)
    scenario, limits, several = shop.scenario, (3.0, 0.06), 0
    least = 0.0 if scenario.load.input_len > scenario.own_chunk else 5.0
    for pools, (every, _) in ((False, all_aggregated(shop, limits)), (True, all_pools(shop, 16, limits))):
        points = told(shop, every if pools else every.where(steady(shop, every)))
        assert len(points.variant) > 0.9 * len(every.variant)
        for i in generator.choice(len(points.variant), 100, replace=False):
            variant = shop.variants[points.variant[i]]
            numbers = {name: values[i] for name, values in points.columns.items()}
            load = replace(scenario.load, concurrency=float(numbers["concurrency"]))
            decode = scenario.deployment(variant.layout, "decode", variant.decode)
            if pools:
                first = shop.variants[int(numbers["prefill"])]
                prefill = scenario.deployment(first.layout, "prefill", first.prefill)
                workers = int(numbers["prefill_workers"]), int(numbers["decode_workers"])
                alone = disaggregated(prefill, decode, *workers, load, chunk_tokens=scenario.own_chunk, least=least)
            else:
                prefill = scenario.deployment(variant.layout, "prefill", variant.prefill)
                alone = aggregated(prefill, decode, load, int(numbers["chunk_tokens"]), least=least)
            assert not alone.problem
            staged = variant.layout.pp > 1 or (pools and first.layout.pp > 1)
            if alone.batch != pytest.approx(numbers["batch"], rel=1e-3 if staged else 1e-6):
                several += 1  # as many users may be served at another batch, where a step's time jumps
                continue
            for name in NUMBERS:
                # alone, the batch is found by halving, to 1e-9 of the largest that fits (up to some hundreds); what of
                # communication passes unseen starts from nothing at some batch, so it may differ by as much of a step
                unseen = 1e-9 * alone.decode_step_s if name.endswith("_comm_s") else 1e-12
                near = (1e-2 if "error" in name else 5e-4) if staged else 1e-6  # held-up stages move much by little
                assert numbers[name] == pytest.approx(getattr(alone, name), rel=near, abs=unseen), (name, variant)
            for kind, share in alone.evidence.items():
                assert numbers[f"share_{kind}"] == pytest.approx(share, abs=1e-2 if staged else 1e-6)
    assert several <= 12  # of 200, drawn by chance


def test_memory_is_that_of_the_deployment(shop: VariantPrices) -> None:
    points = told(shop, all_aggregated(shop)[0])
    some = points.where(np.random.default_rng(1).choice(len(points.variant), 30, replace=False))
    table = candidates_of(TASK, shop, "aggregated", some).where(slice(None))
    for i in range(30):
        variant, batch = shop.variants[some.variant[i]], some.columns["batch"][i]
        decode = shop.scenario.deployment(variant.layout, "decode", variant.decode)
        alone = decode.memory(batch, 1, int(shop.scenario.load.context) - 1)
        for name, part in MEMORY.items():
            assert table[name][i] == pytest.approx(getattr(alone, part))


def test_batches_are_powers_of_two_and_the_largest() -> None:
    rows, batch = batches(np.array([5.0, 0.0, 8.0]), np.array([3.0, 0.0, 8.0]))
    assert sorted(zip(rows.tolist(), batch.tolist(), strict=True)) == [
        (0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (2, 1), (2, 2), (2, 4), (2, 8),
    ]  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=8))
def test_largest_batch_within_a_limit_by_brute_force(rows: list[tuple[int, int]]) -> None:
    limit, largest = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    expected = [max((b for b in range(1, int(m) + 1) if b <= at), default=0) for at, m in rows]
    assert largest_where(lambda batch: batch <= limit, largest).tolist() == expected


@given(arrays.arrays(float, (2, 40), elements=st.integers(0, 9).map(float)))
def test_pareto_by_brute_force(points: np.ndarray) -> None:
    mask = pareto(points[0], points[1])
    for i in range(points.shape[1]):
        beaten = ((points >= points[:, [i]]).all(axis=0) & (points > points[:, [i]]).any(axis=0)).any()
        assert not (mask[i] and beaten)
    kept = {tuple(p) for p in points[:, mask].T}
    assert all(
        tuple(p) in kept or ((points >= p[:, None]).all(axis=0) & (points > p[:, None]).any(axis=0)).any()
        for p in points.T
    )


def test_ties_are_judged_by_what_differs() -> None:
    """A shared error cancels: half as much again of one kernel is no tie at 30 % error, a tenth of another is."""
    gemm = {"gemm": (1.0, 0.3)}
    assert not alike(gemm, {"gemm": (1.5, 0.3)})
    assert alike({"gemm": (1.0, 0.3)}, {"attention": (1.1, 0.3)})
    assert alike(gemm, {"gemm": (1.01, 0.0001)}) and not alike({"gemm": (1.0, 0.0)}, {"gemm": (1.1, 0.0)})


def test_frame_has_the_columns_and_adds_up(found: Comparison) -> None:
    frame = found.candidates
    assert tuple(frame.columns) == COLUMNS and frame["candidate"].is_unique
    assert set(frame["mode"]) == {"aggregated", "disaggregated"}
    per_gpu = frame["output_tokens_per_s"] / frame["gpus"]
    assert np.allclose(frame["tokens_per_s_per_gpu"], per_gpu)
    assert (frame["gpus"] == frame["replicas"] * frame["world_size"]).all() and (frame["gpus"] <= 8).all()
    # Little's law: users in flight are requests per second times the time of a request
    assert np.allclose(frame["concurrency"], frame["output_tokens_per_s"] / found.output_len * frame["request_s"])
    assert (frame["ttft_low_s"] <= frame["ttft_s"]).all() and (frame["tpot_s"] <= frame["tpot_high_s"]).all()
    shares = frame[["share_measured", "share_calibrated", "share_datasheet"]].sum(axis=1)
    assert np.allclose(shares, 1.0)
    within = (frame["ttft_s"] <= 1.0) & (frame["tpot_s"] <= 0.03)
    assert (frame["meets"] == within).all() and (frame["meets"] == (frame["limit"] == "")).all()
    assert (frame["memory_bytes"] <= frame["capacity_bytes"]).all()
    pools = frame[frame["mode"] == "disaggregated"]
    assert (pools["prefill_workers"] >= 1).all() and pools["chunk_tokens"].isna().all()


def test_the_best_is_the_best(found: Comparison) -> None:
    frame = found.candidates[found.candidates["meets"]]
    assert found.best is not None and found.runner_up is not None
    assert found.best["tokens_per_s_per_gpu"] == frame["tokens_per_s_per_gpu"].max()
    assert (found.best["mode"], found.best["layout"]) != (found.runner_up["mode"], found.runner_up["layout"])
    assert found.best["candidate"] not in found.ties
    assert found.examined > 10 * len(found.families) and any(found.pruned.values())


def test_a_candidate_can_be_made_again(found: Comparison) -> None:
    assert found.best is not None
    prefill, decode = found.deployments(found.best["candidate"])
    assert (prefill.phase, decode.phase) == ("prefill", "decode") and str(decode.layout) == found.best["layout"]
    step = decode.step.price(found.best["batch"], 1.0, 2048 + 128)
    longer = decode.step.pricer.engine.overhead.pool_factor if found.best["mode"] == "disaggregated" else 1.0
    assert float(step.seconds) * longer == pytest.approx(found.best["decode_step_s"], rel=0.02)
    with pytest.raises(tc.InputError, match="unknown candidate"):
        found.deployments("z9")


def test_objectives() -> None:
    fast = tc.compare("qwen3-30b-a3b", **QWEN, objective="latency", modes=["aggregated"])
    assert fast.best is not None and fast.best["request_s"] == fast.candidates["request_s"].min()
    few = tc.compare("qwen3-30b-a3b", **LIMITED, objective="gpus", request_rate=4.0)
    assert few.best is not None
    rate = few.best["output_tokens_per_s"] / 256
    assert rate >= 4.0 and few.best["gpus"] < 8
    cheap = tc.compare("qwen3-30b-a3b", **LIMITED, objective="cost", prices={"h100": 2.0})
    assert cheap.best is not None
    by_hand = 2.0 / 3600 / cheap.best["tokens_per_s_per_gpu"] * 1e6
    assert cheap.best["cost_per_million_tokens"] == pytest.approx(by_hand)


def test_several_devices_sizes_and_processes_agree() -> None:
    asked: dict[str, Any] = {**LIMITED, "device": ["h100", "h200"], "world_size": [2, 4]}
    one, two = (tc.compare("qwen3-30b-a3b", **asked, jobs=jobs) for jobs in (1, 2))
    assert set(one.candidates["device"]) == {"h100-sxm", "h200-sxm"}
    assert one.best is not None and two.best is not None
    pd.testing.assert_frame_equal(one.candidates, two.candidates, rtol=1e-12)  # sums may round in another order
    assert one.best["candidate"] == two.best["candidate"]


def test_only_the_layouts_asked_for() -> None:
    asked = ["tp4-ep4", "tp8", "dp8-ep8"]
    some = tc.compare("qwen3-30b-a3b", **LIMITED, layouts=asked)
    assert set(some.candidates["layout"]) <= {"tp4-dp1-ep4", "tp8-dp1", "tp1-dp8-ep8"}
    assert set(some.candidates.loc[some.candidates["layout"] == "tp4-dp1-ep4", "replicas"]) >= {2}


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        ({"ttft_s": 1e-4}, r"no layout meets TTFT <= 0.1 ms: the limit on TTFT binds; the closest, .* has a TTFT", 3),
        ({"tpot_s": 1e-4}, "the limit on TPOT binds", 3),
        ({"model": "deepseek-v3"}, r"does not fit on 8 h100-sxm .*needs at least 16 h100-sxm", 2),
        ({"model": "llama-3.1-70b", "world_size": 1}, "needs at least 2 h100-sxm", 2),
        ({"objective": "best"}, "unknown objective 'best'", 2),
        ({"objective": "gpus"}, "request_rate", 2),
        ({"objective": "cost", "device": "h20"}, "no price per GPU hour is known for h20; use prices", 2),
        ({"layouts": ["tp3"]}, "takes 3 GPUs, which does not divide world_size 8", 2),
        ({"layouts": ["tp8-tp2"]}, "layout 'tp8-tp2'", 2),
        ({"world_size": 0}, "world_size 0", 2),
        ({"ttft_s": -1.0}, "ttft_s -1.0", 2),
        ({"modes": ["both"]}, "unknown modes 'both'", 2),
        ({"routing": "skewed"}, "routing 'skewed'", 2),
        ({"prices": {"b200": 3.0}}, r"prices b200-sxm=3: b200-sxm is not one of device h100-sxm", 2),
        ({"mtp_depth": [1, 2]}, "mtp_depth 1,2: the config of qwen3-30b-a3b has no multi-token prediction module", 2),
        ({"model": "llama-3.1-8b", "placement": "eplb"}, "^the model has no experts: placement does not apply$", 2),
        ({"model": "llama-3.1-8b", "all2all": ["deepep"]}, "no experts: all2all does not apply", 2),
        ({"model": "llama-3.1-8b", "routing": "zipf:0.6"}, "no experts: routing does not apply", 2),
        ({"executor": "ray:x"}, "executor 'ray:x': must be dask:ADDRESS", 2),
    ],
)
def test_bad_input_is_one_clear_line(arguments: dict[str, Any], message: str, code: int) -> None:
    given_ = {"model": "qwen3-30b-a3b", **QWEN, **arguments}
    with pytest.raises(tc.InputError, match=message) as caught:
        tc.compare(given_.pop("model"), **given_)
    assert "--" not in str(caught.value)  # from Python, arguments go by their own names
    assert "\n" not in str(caught.value) and caught.value.exit_code == code


def test_too_few_gpus_for_a_rate_names_how_few_it_takes() -> None:
    """By hand from what each candidate serves: whole replicas, as many as the rate needs."""
    asked: dict[str, Any] = {**QWEN, "modes": ["aggregated"], "tpot_s": 0.03}
    every = tc.compare("qwen3-30b-a3b", **asked).candidates
    every = every[every["meets"]]
    served = every["output_tokens_per_s"] / every["replicas"] / 256
    fewest = int((np.ceil(20_000 / served) * every["world_size"]).min())
    with pytest.raises(tc.InputError, match="the limit on GPUs binds") as caught:
        tc.compare("qwen3-30b-a3b", **asked, objective="gpus", request_rate=20_000)
    message = str(caught.value)
    assert "no layout meets TPOT <= 30 ms and 20000 requests/s on 8 GPUs" in message
    named = re.search(r"the closest, (\d+) h100-sxm as", message)
    assert named and int(named[1]) == pytest.approx(fewest, rel=0.01)


def test_one_server_of_vllm_exchanges_tokens_in_one_way() -> None:
    """Pools are servers of their own and may differ; SGLang's DeepEP has a mode for each phase."""
    asked: dict[str, Any] = {**LIMITED, "layouts": ["dp4-ep4", "dp2-ep2"], "all2all": ["deepep"]}
    kinds: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for engine in ("vllm", "sglang"):
        compared = tc.compare("qwen3-30b-a3b", **asked, engine=engine)
        for name, mode in zip(compared.candidates["candidate"], compared.candidates["mode"], strict=True):
            _, prefill, decode = compared.behind[name]
            kinds.setdefault((engine, mode), set()).add((prefill.prefill.all2all, decode.decode.all2all))
    high, low = "high_throughput", "low_latency"
    assert kinds["vllm", "aggregated"] == {(high, high), (low, low)}
    assert (high, low) in kinds["vllm", "disaggregated"]
    assert kinds["sglang", "aggregated"] == kinds["sglang", "disaggregated"] == {(high, low)}


def test_steps_that_cannot_be_captured_are_launched_kernel_by_kernel() -> None:
    captured = {
        (engine, kind): deploy(
            load_model("qwen3-30b-a3b"), load_device("h100"), load_engine(engine), Layout(4, 1, 4, 4), "decode",
            options=Options(all2all=kind),
        ).step.captured
        for engine in ("vllm", "sglang") for kind in ("high_throughput", "low_latency")
    }  # fmt: skip
    assert [key for key, value in captured.items() if not value] == [("vllm", "high_throughput")]


@pytest.mark.parametrize("kind", ["high_throughput", "low_latency"])
def test_what_overlap_hides_is_not_saved_again_where_ranks_idle(kind: str) -> None:
    """A lone prompt spares experts and exchange; its attention and dense matmuls take as long as ever."""
    options = Options(all2all=kind, dual_batch_overlap=True)
    one = deploy(
        load_model("deepseek-v3"), load_device("h200"), load_engine("vllm"), Layout(32, 1, 32, 32), "prefill",
        options=options,
    )  # fmt: skip
    line = OnePrefill.of(one, Traffic(2048, 1, 1), 2048)
    price = one.step.price(1.0, 2048.0, 0.0)
    own = sum(
        float(n) * float(row.seconds) for row, n in price.calls
        if not isinstance(row.row, Collective) and row.row.stage not in EXPERT_STAGES
    )  # fmt: skip
    assert float(price.hidden_s) > 0
    assert own * 0.9 < float(line.step_s - line.expert_s) < float(line.step_s)


def test_one_question_says_that_it_has_nothing_to_spread() -> None:
    asked: dict[str, Any] = {**LIMITED, "layouts": ["tp8"], "modes": ["aggregated"]}
    one, two = (tc.compare("qwen3-30b-a3b", **asked, jobs=jobs).notes for jobs in (1, 4))
    assert two == (*one, "--jobs 4 spreads devices and sizes: one of each is one question, answered in one process")
    assert note(2, 4) == note(1, 1) == "" and note(1, 1, "dask:x").startswith("--executor dask:x spreads")


def test_drafts_are_spoken_of_where_the_model_has_them() -> None:
    dense = tc.compare("llama-3.1-8b", device="h100", world_size=1, input_len=512, output_len=64, full=True)
    assert not [line for line in dense.notes if "drafted" in line]


def test_durations_and_layout_files(tmp_path: Path) -> None:
    texts = {"2s": 2.0, "50ms": 0.05, "0.5s": 0.5, "1min": 60.0, " 7 us ": 7e-6, "2S": 2.0, ".5 s": 0.5, "2e-2s": 0.02}
    assert {text: duration("--ttft", text) for text in texts} == pytest.approx(texts)
    assert duration("--ttft", None) is None
    for text in ("fast", "-2s", "0s", "2 h"):
        with pytest.raises(tc.InputError, match=r"--ttft .*must be a time"):
            duration("--ttft", text)
    for text in ("50", "0.05", " 2 "):
        with pytest.raises(tc.InputError, match=rf"--tpot '{text}': .* needs its unit: {text.strip()}ms or "):
            duration("--tpot", text)
    with pytest.raises(tc.InputError, match="tpot_s '50ms': must be a number more than 0"):
        tc.compare("qwen3-30b-a3b", **QWEN, tpot_s="50ms")  # type: ignore[arg-type]
    path = tmp_path / "layouts.yaml"
    path.write_text("layouts:\n  - tp8-ep8\n  - {tp: 4, dp: 2}\n")
    assert read_layouts(path) == ["tp8-ep8", "tp4-dp2"]
    path.write_text("tp8")
    with pytest.raises(tc.InputError, match="must be a list of layouts"):
        read_layouts(path)
    with pytest.raises(tc.InputError, match="cannot be read"):
        read_layouts(tmp_path / "none.yaml")


def run(*arguments: str, columns: int = 100) -> Any:
    return CliRunner().invoke(app, ["compare", *arguments], env={"COLUMNS": str(columns)})


def test_command_line_answers_in_words_and_fits() -> None:
    load = ("-i", "2048", "-o", "256", "--ttft", "1s", "--tpot", "30ms")
    for columns in (80, 100, 200):
        done = run("qwen3-30b-a3b", "-d", "h100", "-n", "8", *load, columns=columns)
        assert done.exit_code == 0, done.output
        assert max(map(len, done.output.splitlines())) <= min(columns, 100)
        assert " is best: " in " ".join(done.output.split()) and "pruned by rule" in done.output
        assert "…" not in re.split(r"layout +GPUs", done.output)[1].splitlines()[0]
    done = run("qwen3-30b-a3b", "-d", "h100", "-n", "8", *load, "--json")
    document = json.loads(done.output)
    assert document["best"]["meets"] and document["layouts"] and document["tpot_limit_s"] == 0.03
    failed = run("qwen3-30b-a3b", "-d", "h100", "-n", "8", "--tpot", "1us")
    assert failed.exit_code == 3 and failed.output.startswith("error: no layout meets TPOT")


def test_dask_gives_the_same_though_a_worker_dies(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed", reason="no Dask here: pip install 'tensorcast[dask]'")
    import threading
    import time

    asked: dict[str, Any] = {**LIMITED, "world_size": [1, 2, 4, 8], "device": ["h100", "h200"]}
    alone = tc.compare("qwen3-30b-a3b", **asked)
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
        spread = tc.compare("qwen3-30b-a3b", **asked, executor=f"dask:{cluster.scheduler_address}")
        killer.join()
        assert killed
    assert spread.best is not None and alone.best is not None
    pd.testing.assert_frame_equal(spread.candidates, alone.candidates, rtol=1e-12)  # sums may round in another order
    assert spread.best["candidate"] == alone.best["candidate"]
