"""What a process keeps from question to question: nothing is priced twice, and no answer hangs on what came before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import tensorcast as tc
from tensorcast.deploy.step import alike, row_prices, step, sums
from tensorcast.profiles import kept
from tensorcast.profiles.store import load_engine
from tensorcast.search import compare, search, search_task, selection, variant_prices, workspace
from tensorcast.serving.prefill_costs import PrefillCosts
from tensorcast.serving.steady_state import Disaggregated, ServingModel


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How many deployments are made, and how often a step is priced, from nothing kept on."""
    counts: Counter[str] = Counter()
    deploy, prices, questions = search_task.deploy, compare.prices, variant_prices.Questions

    def deployed(*args: Any, **options: Any) -> Any:
        counts["deployments"] += 1
        return deploy(*args, **options)

    def priced(asked: Any) -> Any:
        counts["steps"] += len(asked)
        return prices(asked)

    class Together(variant_prices.Together):
        def __init__(self, steps: Any, *args: Any, **varied: Any) -> None:
            counts["steps"] += len(steps)
            super().__init__(steps, *args, **varied)

    def asked() -> Any:
        counts["passes"] += 1
        return questions()

    monkeypatch.setattr(search_task, "deploy", deployed)
    monkeypatch.setattr(compare, "prices", priced)
    monkeypatch.setattr(variant_prices, "Together", Together)
    monkeypatch.setattr(variant_prices, "Questions", asked)
    _forget()
    yield counts
    _forget()


def _forget() -> None:
    workspace.CURRENT.get().clear()


def _ask(**changes: Any) -> pd.DataFrame:
    asked = {"device": "h200", "world_size": 4, "input_len": 1024, "output_len": 128, "tpot_s": 0.05}
    found = tc.compare("qwen3-30b-a3b", **{**asked, **changes})
    assert found.best is None or found.best["candidate"] not in found.ties  # which are told apart kernel by kernel
    return found.candidates


def test_many_steps_are_priced_in_few_passes(made: Counter[str]) -> None:
    """Kernels' models are asked once for a block of groups, whatever number of layouts and options these are; of each
    structure one variant is laid out."""
    _ask()
    assert made["steps"] > 10 * made["passes"] > 0
    (_, prices, _), *_ = workspace.CURRENT.get().prices.values()
    assert made["deployments"] < 2 * len(prices.variants) / 3


def test_no_batch_is_priced_twice_and_no_setting_that_a_structure_lacks(
    made: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All variants are priced at one grid; closer looks add decode steps at the batches between alone. No more is added
    up than the variants there are, at each batch that fits and the next."""
    asked = list[tuple[str, set[float], list[int]]]()

    class Together(variant_prices.Together):
        def __init__(self, steps: Any, load: Any, *args: Any, **varied: Any) -> None:
            super().__init__(steps, load, *args, **varied)
            one_stage = np.equal(varied["pp"], 1)  # micro-batches of pipelines are as uneven as chance has them
            asked.append((steps[0].table.phase, {*np.ravel(load[0])[one_stage]}, []))

        def each(self, member: Any, batch: Any, wanted: Any = None) -> Any:
            added = [added for phase, _, added in asked if phase == self.steps[0].table.phase]
            added[-1].append(batch.size if wanted is None else wanted.sum())
            return super().each(member, batch, wanted)

    monkeypatch.setattr(variant_prices, "Together", Together)
    _ask()
    (_, prices, _), *_ = workspace.CURRENT.get().prices.values()
    decode = [(batches, added) for phase, batches, added in asked if phase == "decode" and 1.0 in batches]
    assert all(batches == {*variant_prices.GRID} for batches, _ in decode)
    fit = (prices.room_decode[:, None] >= variant_prices.GRID).sum(axis=1)
    assert sum(sum(added) for _, added in decode) == np.minimum(fit + 1, len(variant_prices.GRID)).sum()
    known = {*variant_prices.GRID}
    for phase, between, _ in asked[asked.index(next(one for one in asked if 1.0 not in one[1])) :]:
        assert phase == "decode" and not known & between
        known |= between


def test_rows_are_added_up_in_blocks_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many steps are priced together, the sums of their rows are held of some members at a time: the same."""
    sizes, sums_of_steps = list[tuple[int, int]](), step.sums_of_steps

    def counted(recipes: Any, prices: Any, places: Any, families: Any, members: Any) -> Any:
        found = sums_of_steps(recipes, prices, places, families, members)
        sizes.append((len(recipes), sum(members) * found.shared.shape[-1]))
        return found

    monkeypatch.setattr(step, "sums_of_steps", counted)
    _forget()
    whole = _ask()
    most = max(size for _, size in sizes)
    for bound in (most // 2, 1):
        sizes.clear()
        _forget()
        monkeypatch.setattr(step, "SUMMED", bound)
        pd.testing.assert_frame_equal(_ask(), whole, rtol=1e-12)
        assert all(size <= 2 * bound or steps == 1 for steps, size in sizes) and max(size for _, size in sizes) < most


def test_other_lengths_price_what_sees_cached_tokens_alone(
    made: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of decode steps: GEMMs, experts and exchanges at the same batches are those of the question before."""
    asked, op, collective = Counter[str](), alike.Questions.op, row_prices.RowPricer.collective

    def at_all_batches(at: Any) -> bool:
        # a closer look leaves out what is priced already, but for a stage's part of larger batches
        return bool(at.decode and np.isin(variant_prices.GRID, at.sizes.B).all())

    def op_asked(self: Any, pricer: Any, content: Any, row: Any, *at: Any) -> Any:
        asked[row.name] += at_all_batches(at[0])
        return op(self, pricer, content, row, *at)

    def collective_asked(self: Any, row: Any, at: Any, corrections: Any) -> Any:
        asked[row.op] += at_all_batches(at)
        return collective(self, row, at, corrections)

    monkeypatch.setattr(alike.Questions, "op", op_asked)
    monkeypatch.setattr(row_prices.RowPricer, "collective", collective_asked)
    _ask()
    assert {"mm", "grouped_matmul", "attention", "all_reduce", "all_gather"} <= {*+asked}
    asked.clear()
    _ask(input_len=700, output_len=300)
    assert "attention" in +asked and {*+asked} <= {"attention", "kv_cache_write"}


def test_prices_that_steps_share_are_read_once(made: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that cost all members of all steps alike stand in one table for each pass; others once for their step."""
    tables, added, rows = list[int](), list[int](), list[int]()
    columns, several = sums._columns, sums.sums_of_steps

    def counted(prices: Any, shape: Any) -> Any:
        assert len({*map(id, prices)}) == len(prices)
        tables.append(len(prices))
        return columns(prices, shape)

    def summed(recipes: Any, prices: Any, places: Any, *more: Any) -> Any:
        every = [prices[i] for place in places for i in place]
        added.append(len({id(one) for one in every if np.ndim(one.seconds) < 2}))
        added.append(sum(np.ndim(one.seconds) > 1 for one in every))
        rows.append(len(every))
        return several(recipes, prices, places, *more)

    monkeypatch.setattr(sums, "_columns", counted)
    monkeypatch.setattr(step, "sums_of_steps", summed)
    _ask()
    assert sum(tables) == sum(added) < sum(rows)


def test_a_closed_loop_looks_at_the_queue_once(made: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    looked, at_rate, closed_loop = Counter[str](), PrefillCosts.at_rate, Disaggregated.closed_loop
    metrics = ServingModel.metrics

    def rated(self: Any, rate: Any) -> Any:
        looked["queues"] += 1
        return at_rate(self, rate)

    def closed(self: Any, batch: Any) -> Any:
        looked["loops"] += 1
        return closed_loop(self, batch)

    def said(self: Any, batch: Any, concurrency: Any) -> Any:
        looked["told"] += isinstance(self, Disaggregated)
        return metrics(self, batch, concurrency)

    monkeypatch.setattr(ServingModel, "metrics", said)
    monkeypatch.setattr(PrefillCosts, "at_rate", rated)
    monkeypatch.setattr(Disaggregated, "closed_loop", closed)
    _ask(ttft_s=0.3)
    assert looked["loops"] + looked["told"] == looked["queues"] > 2


def test_all_is_told_of_chosen_candidates_alone(made: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    told, metrics = list[int](), ServingModel.metrics

    def counted(self: Any, batch: Any, concurrency: Any) -> Any:
        told.append(len(batch))
        return metrics(self, batch, concurrency)

    sure, interval = list[int](), selection.served_interval

    def ended(ttft_error: Any, *more: Any, **named: Any) -> Any:
        sure.append(np.size(ttft_error))
        return interval(ttft_error, *more, **named)

    monkeypatch.setattr(ServingModel, "metrics", counted)
    monkeypatch.setattr(selection, "served_interval", ended)
    found = tc.compare("qwen3-30b-a3b", device="h200", world_size=4, input_len=1024, output_len=128, tpot_s=0.05)
    assert sum(told) == sum(sure) == len(found.candidates) < found.examined / 3


def test_a_question_asked_again_prices_nothing(made: Counter[str]) -> None:
    first = _ask()
    made.clear()
    pd.testing.assert_frame_equal(_ask(), first)
    assert not made["steps"] and not made["deployments"]


@pytest.mark.parametrize("changes", [
    {"tpot_s": 0.02}, {"ttft_s": 0.5}, {"objective": "latency"}, {"objective": "cost", "prices": {"h200-sxm": 2.0}},
    {"input_len": 700, "output_len": 300}, {"world_size": 2}, {"engine": "sglang"}, {"quant": "fp8"},
    {"routing": "zipf:0.6"}, {"prefix_cached": 512}, {"modes": ("aggregated",)},
])  # fmt: skip
def test_no_answer_hangs_on_what_came_before(made: Counter[str], changes: dict[str, Any]) -> None:
    _ask()
    after = _ask(**changes)
    _forget()
    pd.testing.assert_frame_equal(after, _ask(**changes), rtol=1e-12)


def test_a_profile_asked_about_often_pushes_no_other_out() -> None:
    first, other = kept.same(load_engine("vllm")), load_engine("sglang")
    for _ in range(kept.MOST_SHARED + 1):
        other = kept.same(other)
    assert kept.same(load_engine("vllm")) is first


def test_other_limits_price_no_variant_again(made: Counter[str]) -> None:
    """All that is priced: a closer look at what may do best under the new limits, and what is told apart kernel by
    kernel."""
    _ask()
    first = dict(made)
    made.clear()
    _ask(tpot_s=0.03)
    assert made["deployments"] < first["deployments"] / 3  # those of groups that are looked at closer now
    assert made["steps"] < first["steps"]


def test_other_lengths_and_sizes_make_no_deployment_again(
    made: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _ask()
    first = dict(made)
    made.clear()
    with monkeypatch.context() as patched:
        patched.delattr(search, "space")  # the layouts to try are known
        _ask(input_len=700, output_len=300)
    _ask(world_size=2)
    assert made["deployments"] < first["deployments"] / 3  # those of groups that are looked at closer now


def test_other_lengths_name_no_row_and_look_at_no_variant_again(
    made: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which rows cost alike, and what variants are, is found once; a closer look, at other variants, names theirs."""
    looked, named, look = Counter[str](), step.named, variant_prices.VariantPrices._look_at_variants

    def naming(*row: Any) -> Any:
        looked["rows"] += 1
        return named(*row)

    def looking(self: Any) -> None:
        looked["variants"] += len(self.variants)
        look(self)

    monkeypatch.setattr(step, "named", naming)
    monkeypatch.setattr(variant_prices.VariantPrices, "_look_at_variants", looking)
    _ask()
    (_, prices, _), *_ = workspace.CURRENT.get().prices.values()
    first = dict(looked)
    assert first["variants"] == len(prices.variants) and first["rows"] > 0
    _ask(input_len=700, output_len=300)
    assert looked["variants"] == first["variants"]
    assert looked["rows"] - first["rows"] < 0.6 * first["rows"]  # those of variants that were not looked at closer


def test_a_file_that_has_changed_is_read_again(made: Counter[str], tmp_path: Path) -> None:
    """Popularity of experts, under one name: counts that were even and are not any more."""
    file, asked = tmp_path / "counts.csv", {"modes": ("aggregated",), "layouts": ["dp4-ep4"]}
    said = []
    for popular in (1, 50):
        rows = "\n".join(f"{expert},{popular if expert < 8 else 1}" for expert in range(128))
        file.write_text(f"expert,count\n{rows}\n")
        said.append(_ask(**asked, routing=str(file))["decode_step_s"].min())
    assert said[1] > said[0]


def test_the_oldest_is_forgotten(made: Counter[str]) -> None:
    for number in range(12):
        _ask(modes=("aggregated",), layouts=["dp4-ep4"], tpot_s=0.05 + 0.01 * number)
    results = workspace.CURRENT.get().results
    assert len(results) <= workspace.CURRENT.get().questions + 1
    assert min(task.tpot_s for task, _ in results.values()) > 0.05, "the first ones are gone"


def test_a_workspace_keeps_for_those_who_ask_with_it(made: Counter[str]) -> None:
    """The process's own knows nothing of it, and takes over again where it ends, by an error, too."""
    few: dict[str, Any] = {"modes": ("aggregated",), "layouts": ["dp4-ep4"]}
    one, other = tc.Workspace(), tc.Workspace(questions=1)
    with one:
        first = _ask(**few)
        made.clear()
        pd.testing.assert_frame_equal(_ask(**few), first)
        assert not made["steps"]
        with pytest.raises(tc.InputError), other:
            _ask(**few, tpot_s=-1.0)
        _ask(**few)
        assert not made["steps"]
    pd.testing.assert_frame_equal(_ask(**few), first)
    assert made["steps"] > 0 and len(one.results) == 1
    one.clear()
    assert not one.results and not one.parts


def test_a_workspace_keeps_something() -> None:
    with pytest.raises(tc.InputError, match="questions = 0: a workspace keeps at least 1"), tc.Workspace(questions=0):
        pass
