"""The report of a comparison: files that agree, words and figures that follow from the numbers, a page that works."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tensorcast as tc
from tensorcast.errors import InputError
from tensorcast.report import units
from tensorcast.report.compare import choices, runner_up, table, words
from tensorcast.report.compare.choices import PARTS, View, step_parts
from tensorcast.report.compare.files import FIGURE_NAMES, six_digits, write_comparison
from tensorcast.report.compare.takeaway import takeaways
from tensorcast.search.candidate_table import Candidates

MODEL = "qwen3-30b-a3b"


@pytest.fixture(scope="module")
def compared() -> Any:
    return tc.compare(
        MODEL, device="h100", world_size=4, input_len=1024, output_len=256, ttft_s=2.0, tpot_s=0.03, engine="sglang"
    )


@pytest.fixture(scope="module")
def view(compared: Any) -> View:
    return View(compared, price=2.5)


@pytest.fixture(scope="module")
def written(compared: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    hostile = dataclasses.replace(compared, notes=("</script><script>alert('note')</script>", "5 < 6 & 'so on'"))
    paths = write_comparison(hostile, folder, price=2.5)
    assert sorted(paths) == sorted(folder.iterdir())
    return folder


# Files


def test_all_files_say_the_same(compared: Any, written: Path) -> None:
    csv = pd.read_csv(written / "candidates.csv")
    parquet = pd.read_parquet(written / "candidates.parquet")
    assert list(csv.columns) == list(parquet.columns) == list(compared.candidates.columns)
    assert len(csv) == len(parquet) == len(compared.candidates)
    for name in ("tpot_s", "tokens_per_s_per_gpu", "memory_bytes"):
        np.testing.assert_allclose(csv[name], compared.candidates[name], rtol=5.1e-6)
    assert parquet["prefill_layout"].isna().any() and parquet["prefill_layout"].notna().any()
    held = View(compared, price=2.5).kept.frame()
    pd.testing.assert_frame_equal(parquet, held.astype({"prefill_layout": "str"}), check_exact=True)
    summary = json.loads((written / "summary.json").read_text(encoding="utf-8"))
    assert summary["best"]["candidate"] == compared.best["candidate"]
    assert summary["candidates"] == len(csv) and summary["pruned"] == dict(compared.pruned)
    assert set(summary["findings"]) == {path.stem for path in written.glob("*.svg")} <= set(FIGURE_NAMES)


@given(st.floats(1e-15, 1e15) | st.sampled_from([0.0, -2.5, np.nan, np.inf]))
def test_six_digits(value: float) -> None:
    assert repr(float(six_digits(np.array([value]))[0])) == repr(float(f"{value:.6g}"))


def test_price_gives_the_cost(view: View) -> None:
    """USD per million tokens from first principles: GPUs' dollars per second over tokens per second."""
    row = view.kept.frame().iloc[0]
    assert row["cost_per_million_tokens"] == pytest.approx(
        row["gpus"] * 2.5 / 3600 / row["output_tokens_per_s"] * 1e6
    )


def test_page_needs_nothing_from_outside(written: Path) -> None:
    page = (written / "report.html").read_text(encoding="utf-8")
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(([^)]*)\)|@import""", page)
    assert links and all((link or other).startswith(("#", "data:")) for link, other in links)
    assert "alert('note')" not in page and page.count("</script>") == 2
    identifiers = re.findall(r'\bid="([^"]*)"', page)
    assert len(identifiers) == len(set(identifiers))


def test_figures_stand_alone(written: Path) -> None:
    for name in json.loads((written / "summary.json").read_text(encoding="utf-8"))["findings"]:
        root = ElementTree.parse(written / f"{name}.svg").getroot()
        text = " ".join("".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text"))
        assert len(text) > 40, name


def test_old_figures_go_and_a_failed_write_leaves_what_was_there(
    compared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("expert_load.png", "summary.json", "notes.txt"):
        (tmp_path / name).write_text("old")
    empty = dataclasses.replace(compared, kept=compared.kept.where(slice(0)), best=None, runner_up=None)
    write_comparison(empty, tmp_path)
    assert not (tmp_path / "expert_load.png").exists()
    assert (tmp_path / "notes.txt").read_text() == "old"
    assert "No layout" in json.loads((tmp_path / "summary.json").read_text())["answer"]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(self: Path, *args: Any, **kwargs: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match=r"--out .*: cannot be written: No space left on device"):
        write_comparison(empty, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# Words


def test_answer_is_what_the_numbers_say(view: View, compared: Any) -> None:
    answer, best = words.conclusion(view), view.best
    assert best is not None and view.runner_up is not None
    assert view.name(best) in answer.headline and units.rate(best["tokens_per_s_per_gpu"]) in answer.headline
    assert view.name(view.runner_up) in answer.runner_up and answer.ways
    meeting = view.kept.frame()[view.kept.frame()["meets"]]
    assert best["tokens_per_s_per_gpu"] == meeting["tokens_per_s_per_gpu"].max()
    for column in ("tokens_per_s_per_gpu", "tokens_per_s_per_user", "ttft_s", "tpot_s", "cost_per_million_tokens"):
        low, high = choices.interval(view, best, column)
        assert low <= best[column] <= high
    alike = {view.name(row) for row in view.kept.frame().to_dict("records") if row["candidate"] in compared.ties}
    assert all(name in answer.ties for name in sorted(alike - {view.name(best)})[:1])


def test_no_layout_meets_the_targets(compared: Any) -> None:
    """The limit that binds, and how far the closest candidate is from it, against a search of our own."""
    late = {"meets": np.zeros(len(compared.kept), dtype=bool)}
    frame = dataclasses.replace(compared.kept, columns=compared.kept.columns | late)
    limits = (float(frame["ttft_s"].max()), float(frame["tpot_s"].min()) / 2)
    none = dataclasses.replace(compared, kept=frame, targets=limits, best=None, runner_up=None)
    answer = words.conclusion(View(none))
    assert answer.headline == "No layout meets the targets: TPOT binds"
    assert units.seconds(frame["tpot_s"].min()) in answer.how and "100.0% over" in answer.how


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30), st.booleans()), min_size=1, max_size=40))
def test_leader_at_every_limit(rows: list[tuple[int, int, bool]]) -> None:
    frame = pd.DataFrame(rows, columns=["tpot_s", "tokens", "own"])
    kept = Candidates({str(name): column.to_numpy() for name, column in frame.items()})
    leads = pd.DataFrame(runner_up._leader_by_limit(kept, "tpot_s", "tokens", less=False).columns)
    for limit in range(31):
        allowed = frame[frame["tpot_s"] <= limit]
        found = leads[leads["tpot_s"] <= limit]
        assert found.empty == allowed.empty
        if not allowed.empty:
            assert found["tokens"].iloc[-1] == allowed["tokens"].max()


@pytest.mark.parametrize("ahead", [1.0, 1 + 1e-6, 1.02])
def test_a_runner_up_that_is_no_worse_is_asked_for_no_faster_step(view: View, ahead: float) -> None:
    """Ranked by a bound that is reached with a chance, the second may be ahead in the mean."""
    best, second = view.best, view.runner_up
    assert best is not None and second is not None
    column = view.objective.column
    text, ways = runner_up.runner_up(view, best, {**second, column: ahead * best[column]})
    assert not [way for way in ways if "less time" in way]
    assert text.endswith("is the surer one.") == (ahead > 1.01) and ("2.0% more" in text) == (ahead > 1.01)


def test_the_runner_up_wins_where_it_is_said_to(view: View) -> None:
    """Each turning point, tried: the best of all candidates within the other limits is one of the runner-up's."""
    assert view.runner_up is not None
    for second in (view.runner_up, *(choice.row for choice in view.shown[2:])):
        own = set(view.kept.frame()["candidate"][view.of_layout(second)])
        for column, limit, looser in runner_up.turning_points(view, second):
            limits = dict(view.limits)
            asked = limits[column]
            assert asked is not None and (limit > asked) == looser
            limits[column] = limit if looser else np.nextafter(limit, 0)
            allowed = view.kept.frame()[np.all([view.kept.frame()[name] <= at for name, at in limits.items()], axis=0)]
            most = allowed["tokens_per_s_per_gpu"].max()
            assert own & set(allowed.loc[allowed["tokens_per_s_per_gpu"] == most, "candidate"])


# What figures show


def test_parts_add_up_to_the_step(view: View) -> None:
    assert len(view.shown) > 1
    for choice in view.shown:
        for batch in (1, int(choice.row["largest_batch"])):
            price = view.decode_price(choice, batch)
            split = step_parts(choice.decode, price)
            assert set(split.parts) == set(PARTS) and min(split.parts.values()) >= 0
            assert sum(split.parts.values()) == pytest.approx(float(price.seconds))
            assert split.parts["attention"] > 0 and split.parts["experts"] > 0


def test_large_tables_keep_the_front_and_the_best_of_each_layout(view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not table.table(view).left_out
    monkeypatch.setattr(table, "MOST_ROWS", len(view.kept.frame()) - 1)
    short = table.table(view)
    assert f"Of {units.count(len(view.kept.frame()))} candidates" in short.left_out
    front = view.kept.frame()["pareto"] | view.kept.frame()["candidate"].isin(view.per_layout["candidate"])
    assert len(short.rows) == front.sum() < len(view.kept.frame())


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright here: pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("TENSORCAST_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=found)
        yield running
        running.close()


class Watched:
    """A page with what it said and asked for."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(10_000)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def column(self, name: str) -> list[str]:
        heads = self.page.locator("#table th").all_text_contents()
        return list(self.page.locator(f"#table tbody td:nth-child({heads.index(name) + 1})").all_text_contents())

    def sort(self, name: str) -> str | None:
        head = self.page.locator("#table").get_by_role("columnheader", name=name, exact=True)
        head.get_by_role("button").click()
        state = head.get_attribute("aria-sort")
        return None if state is None else str(state)

    def show_all(self) -> None:
        while self.page.locator("#more").is_visible():
            self.page.locator("#more").click()


@pytest.fixture
def opened(browser: Any, written: Path) -> Iterator[Watched]:
    watched = Watched(browser, written / "report.html")
    yield watched
    watched.context.close()
    assert not watched.said, watched.said
    assert [url for url in watched.asked if not url.startswith(("file:", "data:"))] == []


def test_page_leads_with_the_answer(opened: Watched, view: View) -> None:
    assert opened.page.title() == opened.page.locator("p.code").inner_text() == words.conclusion(view).headline
    plain = opened.page.locator("h1").inner_text()
    assert re.match(r"(One|\d+) .*(server|GPU)", plain) and "tp" not in plain  # the code name comes second
    assert opened.page.locator("h1").bounding_box()["y"] < 200
    figures = opened.page.locator("figure svg")
    assert figures.count() >= 6
    for i in range(figures.count()):
        box = figures.nth(i).bounding_box()
        assert box["width"] > 500 and box["height"] > 150


def test_sorting(opened: Watched, view: View) -> None:
    opened.show_all()
    fastest_first = view.kept.frame()["tokens_per_s_per_user"].sort_values(ascending=False)
    assert opened.sort("tokens/s/user") == "descending"
    assert opened.column("tokens/s/user") == [units.rate(value) for value in fastest_first]
    assert opened.sort("tokens/s/user") == "ascending"
    assert opened.column("tokens/s/user") == [units.rate(value) for value in fastest_first[::-1]]
    assert opened.sort("TTFT") == "ascending"
    assert opened.column("TTFT") == [units.seconds(value) for value in view.kept.frame()["ttft_s"].sort_values()]
    assert opened.page.locator("th[aria-sort]").count() == 1
    opened.page.locator("#table").get_by_role("columnheader", name="layout", exact=True).get_by_role("button").focus()
    opened.page.keyboard.press("Enter")
    assert opened.column("layout")[0] == min(map(view.name, view.kept.frame().to_dict("records")))


def test_filtering(opened: Watched, view: View) -> None:
    opened.show_all()
    family = view.kept.frame()["family"].mode()[0]
    opened.page.get_by_label("Family").select_option(family)
    opened.show_all()
    assert set(opened.column("family")) == {family}
    assert len(opened.column("family")) == (view.kept.frame()["family"] == family).sum()
    opened.page.get_by_label("Pareto front only").check()
    both = ((view.kept.frame()["family"] == family) & view.kept.frame()["pareto"]).sum()
    assert f"of {both} matching" in opened.page.locator("#shown").inner_text()
    opened.page.get_by_role("button", name="Clear").click()
    opened.page.locator("#shown", has_text=f"of {len(view.kept.frame())} matching").wait_for()
    opened.page.get_by_label("Search").fill("tp2 EP4")
    opened.show_all()
    wanted = [name for name in map(view.name, view.kept.frame().to_dict("records")) if "tp2" in name and "ep4" in name]
    assert sorted(opened.column("layout")) == sorted(wanted)
    opened.page.get_by_label("Search").fill("no such layout")
    assert opened.page.locator("#table tbody tr").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phones_and_both_themes(browser: Any, written: Path, scheme: str) -> None:
    """Nothing but figures and the table scrolls sideways; text stands out from its background."""
    watched = Watched(
        browser, written / "report.html", viewport={"width": 400, "height": 800}, color_scheme=scheme
    )
    assert watched.page.evaluate("document.documentElement.scrollWidth") <= 400
    look = "element => [getComputedStyle(element).color, getComputedStyle(document.body).backgroundColor]"
    ink, paper = (
        sum(map(int, re.findall(r"\d+", colour)[:3])) / 765
        for colour in watched.page.locator("h1").evaluate(look)
    )
    assert (ink < 0.25 and paper > 0.75) if scheme == "light" else (ink > 0.75 and paper < 0.25)
    drawn = watched.page.locator("figure svg text").first.evaluate("e => getComputedStyle(e).fill")
    assert abs(sum(map(int, re.findall(r"\d+", drawn)[:3])) / 765 - paper) > 0.4
    watched.context.close()
    assert not watched.said


def test_without_scripts_the_answer_is_still_there(browser: Any, written: Path) -> None:
    watched = Watched(browser, written / "report.html", java_script_enabled=False)
    assert "is best" in watched.page.locator("p.code").inner_text()
    assert watched.page.locator("noscript p").is_visible()
    watched.context.close()


# Launch commands


def test_the_best_candidate_can_be_started_from_the_report(view: View, written: Path) -> None:
    """The page and the files hold what `tensorcast launch` writes for the best candidate's layout, per engine."""
    assert view.best is not None
    found = {one.engine: one for one in takeaways(view)}
    assert next(iter(found)) == "sglang" and set(found) == {"vllm", "sglang", "trtllm"}
    page = (written / "report.html").read_text()
    for engine, one in found.items():
        file = written / f"launch-{engine}.sh"
        assert file.exists() == (not one.problem)
        if one.problem:
            assert "cannot run it" in page
            continue
        assert file.read_text() == one.script
        assert subprocess.run(["bash", "-n", file], check=False).returncode == 0
        assert one.script.splitlines()[-1] in unescape(page)
    ranks = view.best["tp"] * view.best["dp"]
    assert f"--tp-size {ranks}" in found["sglang"].script


def best_scripts(**asked: Any) -> tuple[View, dict[str, Any]]:
    given = {"device": "h100", "world_size": 4, "input_len": 1024, "output_len": 256, "modes": ["aggregated"], **asked}
    view = View(tc.compare(MODEL, **given))
    return view, {one.engine: one for one in takeaways(view)}


@pytest.mark.parametrize("chunk", [1536, 8192])
def test_the_script_takes_chunks_as_large_as_were_priced(chunk: int) -> None:
    view, found = best_scripts(chunk_tokens=[chunk], layouts=["tp4", "tp4-ep4"], engine="vllm", tpot_s=0.03)
    assert view.best is not None and view.best["chunk_tokens"] == chunk
    assert f"--max-num-batched-tokens {chunk}" in found["vllm"].script
    assert f"--chunked-prefill-size {chunk}" in found["sglang"].script


def test_no_script_where_one_server_cannot_exchange_both_ways() -> None:
    """Priced with DeepEP's mode by phase, as SGLang runs it: no launch of vLLM or TensorRT-LLM is that candidate."""
    _, found = best_scripts(all2all=["deepep"], layouts=["dp4-ep4"], engine="sglang")
    assert found["sglang"].script and not found["vllm"].script
    assert found["vllm"].problem.startswith("one exchange: ") and found["trtllm"].problem.startswith("one exchange: ")
