"""The report's page where limits, price and aim move: held against the candidates, in Chromium."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

import tensorcast as tc
from tensorcast.cli.values import config_words
from tensorcast.report import units
from tensorcast.report.compare.best_of import best_of_each
from tensorcast.report.compare.choices import View
from tensorcast.report.compare.files import write_comparison
from tensorcast.report.question import command, flags


@pytest.fixture(scope="module")
def compared() -> Any:
    return tc.compare(
        "qwen3-30b-a3b", device=["h100", "h200"], world_size=4, input_len=1024, output_len=256, ttft_s=2.0, tpot_s=0.03
    )


@pytest.fixture(scope="module")
def folder(compared: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("live")
    write_comparison(compared, made)
    return made


@pytest.fixture(scope="module")
def page(folder: Path) -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright here: pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("TENSORCAST_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=found)
        opened = running.new_page(viewport={"width": 390, "height": 844})
        said: list[str] = []
        opened.on("console", lambda message: said.append(message.text))
        opened.on("pageerror", lambda error: said.append(str(error)))
        opened.goto((folder / "report.html").as_uri())
        yield opened
        assert not said, said
        running.close()


def told(page: Any) -> str:
    return str(page.inner_text("#live-best"))


def test_limits_price_and_aim_move_without_a_server(page: Any, compared: Any) -> None:
    view = View(compared)
    assert view.best is not None and told(page).startswith(view.name(view.best))
    frame = compared.candidates
    page.fill("#limit-tpot", "15")
    inside = frame[(frame["ttft_s"] <= 2.0) & (frame["tpot_s"] <= 0.015)]
    best = inside.loc[inside["tokens_per_s_per_gpu"].idxmax()]
    assert told(page).startswith(view.name(best)) and units.rate(best["tokens_per_s_per_gpu"]) in told(page)
    page.select_option("#live-y", "cost_per_million_tokens")
    page.fill("#price", "2")  # of every GPU: the faster ones win
    cost = 1e6 * inside["gpus"] * 2.0 / 3600.0 / inside["output_tokens_per_s"]
    assert f"{units.digits(cost.min())} USD per million output tokens" in told(page)
    users = int(inside["concurrency"].max()) + 1
    page.fill("#limit-users", str(users))
    assert told(page) == "No candidate of this page keeps these limits."
    page.fill("#search", "too few users")
    fewer = ((frame["ttft_s"] <= 2.0) & (frame["tpot_s"] <= 0.015) & (frame["concurrency"] < users)).sum()
    assert f"of {fewer} matching rows" in page.inner_text("#shown")
    page.fill("#search", "")
    page.click("#live button[type=reset]")
    page.wait_for_function(f"document.getElementById('live-best').textContent.startsWith({view.name(view.best)!r})")


def test_verdicts_move_with_the_limits_as_the_program_tells_them(page: Any, compared: Any) -> None:
    """At the limits that were asked for the page's own arithmetic gives the chances of the frame."""
    embedded = page.evaluate(
        "candidateTable.rows.map((row) => Object.fromEntries(candidateTable.columns.map((c, i) => [c.key, row[i]])))"
    )
    frame = View(compared).ranked.frame()
    for row, truth in list(zip(embedded, frame.to_dict("records"), strict=True))[::7]:
        assert row["tpot_chance"][0] == pytest.approx(truth["tpot_chance"], abs=2e-4)
        assert row["ttft_chance"][1] == units.chance(truth["ttft_chance"])
        assert (row["verdict"].startswith("over")) == (not truth["meets"])


def test_points_lead_to_rows(page: Any) -> None:
    dot = page.locator("#live-chart .dot.best").last
    dot.hover()
    said = page.inner_text("#live-tip")
    assert "TTFT" in said and "TPOT" in said
    page.focus("#live-chart")
    page.keyboard.press("ArrowRight")
    name = page.inner_text("#live-tip").partition(":")[0]
    page.mouse.move(1, 1)  # away from the point: what the keys have walked to stays
    assert page.inner_text("#live-tip").startswith(f"{name}:") and name != "Squares"
    page.keyboard.press("Enter")
    assert page.input_value("#search") == name
    assert name in page.inner_text("#table tbody")
    drawn = page.locator("#live-chart .dot").count()
    page.fill("#search", "")
    assert page.locator("#live-chart .dot").count() > drawn  # filters hold for both
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.fill("#search", "tp2")
    with page.expect_download() as waiting:
        page.click("#csv")
    kept = pd.read_csv(waiting.value.path())
    assert f"of {len(kept)} matching" in page.inner_text("#shown") and kept["name"].str.contains("tp2").any()
    page.fill("#search", "")
    assert page.locator("button.copy").count() == page.locator("pre").count() >= 2


def test_ten_questions_within_two_actions_each(page: Any, compared: Any) -> None:
    """Each against the frame or the sentence of the program; a longer prompt is asked anew, with a command to copy."""
    frame, view = compared.candidates, View(compared)
    inside = frame[frame["meets"]]
    page.click("#live button[type=reset]")
    text = page.inner_text("body")
    assert "The limit on TTFT" in text and "The limit on TPOT" in text  # which limit binds?
    assert "Spreading whole experts over GPUs (EP)" in text  # expert or tensor parallel?
    assert "Serving from two pools" in text  # one pool or two?
    assert "kept with a chance of" in text  # how sure is it?
    assert "It would win" in text or "Runner-up" in text  # what comes close, and what would make it win?

    def aims(column: str) -> str:
        page.select_option("#live-y", column)
        return told(page)

    users = inside["concurrency"].max()  # how many users on what I have?
    assert f"the most users at once: {units.count(users)}." in aims("concurrency")
    cheapest = inside.loc[inside["cost_per_million_tokens"].idxmin()]  # which GPU is cheapest?
    assert aims("cost_per_million_tokens").startswith(view.name(cheapest))
    page.fill("#price", "1.5")  # what if a GPU costs less?
    cost = 1e6 * inside["gpus"] * 1.5 / 3600.0 / inside["output_tokens_per_s"]
    assert f"{units.digits(cost.min())} USD per million output tokens" in told(page)
    page.click("#live button[type=reset]")
    page.fill("#limit-tpot", "12")  # what if tokens must come faster?
    fast = frame[(frame["tpot_s"] <= 0.012) & (frame["ttft_s"] <= 2.0)]
    assert units.rate(fast["tokens_per_s_per_gpu"].max()) in told(page)
    page.click("#live button[type=reset]")
    asked = [pre for pre in page.locator("pre").all_inner_texts() if pre.startswith("tensorcast compare")]
    assert "--input-len 1024" in asked[0]  # what does a longer prompt do?
    assert any("vllm serve" in pre for pre in page.locator("pre").all_inner_texts())  # how do I start it?


def test_the_question_is_kept_and_asks_the_same(folder: Path, compared: Any) -> None:
    given = yaml.safe_load((folder / "question.yaml").read_text(encoding="utf-8"))
    assert given["model"] == "qwen3-30b-a3b" and given["tpot"] == "0.03s" and given["device"] == "h100,h200"
    assert given["price"] == "h100-sxm=6.88,h200-sxm=7.912"
    assert command(flags(compared)) in (folder / "question.yaml").read_text(encoding="utf-8").replace("\n", " ")
    words = config_words(str(folder / "question.yaml"), {f"--{name}" for name in given}, {"--price"})
    assert words[0] == "qwen3-30b-a3b" and "--price" not in words and words[words.index("--world-size") + 1] == "4"
    with pytest.raises(tc.InputError, match="'device' is no option of this command"):
        config_words(str(folder / "question.yaml"), set(), set())


def test_best_of_each_is_the_best_of_its_rows(compared: Any) -> None:
    view = View(compared)
    found = best_of_each(view)
    assert {one.what for one in found} == {"GPU", "serving", "GPUs in use"}
    for one in found:
        column = {"GPU": "device", "serving": "mode", "GPUs in use": "gpus"}[one.what]
        value = {"one pool": "aggregated", "two pools": "disaggregated"}.get(one.value, one.value)
        mine = compared.candidates[(compared.candidates[column].astype(str) == value) & compared.candidates["meets"]]
        assert (one.row is None) == (not len(mine))
        if one.row is not None:
            assert one.row["tokens_per_s_per_gpu"] == mine["tokens_per_s_per_gpu"].max()


def test_arguments_that_are_kept_have_flags() -> None:
    """Every argument of ``tc.compare`` is an option of the command, or is told to be none."""
    import inspect

    import typer

    from tensorcast.cli import app
    from tensorcast.report.question import FLAGS, NOT_ASKED

    group: Any = typer.main.get_command(app)
    known = {name for param in group.get_command(None, "compare").params for name in param.opts}
    for name in inspect.signature(tc.compare).parameters:
        if name not in (*NOT_ASKED, "model"):
            flag = FLAGS.get(name, (name.replace("_", "-"), None))[0]
            assert f"--{flag}" in known, name


def test_a_figure_is_saved_as_a_picture_with_its_title(page: Any, folder: Path) -> None:
    """As large as the SVG file beside the page, three pixels a point, and not blank where the title stands."""
    with page.expect_download() as saved:
        page.locator("#figure-step").get_by_role("button", name="Save as PNG").click()
    assert saved.value.suggested_filename == "step.png"
    drawn = ElementTree.parse(folder / "step.svg").getroot()
    width, height = (float(drawn.attrib[side].removesuffix("pt")) for side in ("width", "height"))
    with Image.open(saved.value.path()) as picture:
        assert picture.size == pytest.approx((3 * width, 3 * height), abs=1)
        grey = np.asarray(picture.convert("L"), dtype=int)
    title, middle = grey[: len(grey) // 20], grey[len(grey) // 3 : -len(grey) // 3]
    assert title.min() < 100 and middle.min() < 100 and np.median(grey) > 200
