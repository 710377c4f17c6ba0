"""The explorer in a browser: sliders, hover, links, two sessions, bad input, a phone, the dark; and its guard."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import pytest

import tensorcast as tc
from tensorcast.report import units

pytest.importorskip("starlette", reason="no server here: pip install 'tensorcast[explore]'")
uvicorn = pytest.importorskip("uvicorn", reason="no server here: pip install 'tensorcast[explore]'")

START = {
    "model": "qwen3-30b-a3b", "device": "h100-sxm", "world_size": "2", "engine": "vllm", "input_len": "1024",
    "output_len": "256", "tpot_ms": "30",
}  # fmt: skip


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server of its own on a free port."""
    from tensorcast.explore.server import Explorer

    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()  # who asks before the server is up waits for it
    explorer = Explorer(START)
    server = uvicorn.Server(uvicorn.Config(explorer.app, log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright here: pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("TENSORCAST_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=found, args=["--disable-gpu"])
        yield running
        running.close()


class Opened:
    """A page with what it said and asked for; bad questions alone are answered with an error."""

    def __init__(self, browser: Any, address: str, query: str = "", **options: Any) -> None:
        self.address, self.said, self.asked, self.weight = address, list[str](), list[str](), 0
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(20_000)
        self.page = self.context.new_page()
        self.page.on("console", self.heard)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address + query)
        self.answered(START["input_len"] if "input_len" not in query else "")

    def heard(self, message: Any) -> None:
        if message.type == "error" and "422" not in message.text:
            self.said.append(message.text)

    def answered(self, text: str = "") -> None:
        """Wait for the full answer of a question that has ``text`` in its address."""
        about = f'[data-answer*="{text}"]' if text else ""
        self.page.wait_for_selector(f'body[data-answer^="full"]{about}')

    def best(self) -> str:
        return str(self.page.locator("#table tr.best").first.inner_text())

    def slide(self, key: str, steps: int) -> str:
        """Move a slider with the keyboard; what its field then says."""
        slider = self.page.locator(f"#f-{key}-slider")
        slider.focus()
        for _ in range(steps):
            slider.press("ArrowRight")
        return str(self.page.input_value(f"#f-{key}"))

    def close(self) -> None:
        self.context.close()
        assert not self.said, self.said
        assert [url for url in self.asked if not url.startswith((self.address, "data:", "blob:"))] == []


@pytest.fixture(scope="module")
def opened(browser: Any, address: str) -> Iterator[Opened]:
    """One page that tests leave with the question that it opened with."""
    page = Opened(browser, address)
    yield page
    page.close()


@pytest.fixture(scope="module")
def moving(browser: Any, address: str) -> Iterator[Opened]:
    """Another page, whose question each test takes further from where it is."""
    page = Opened(browser, address)
    yield page
    page.close()


def compare(**changed: Any) -> Any:
    asked: dict[str, Any] = {
        "device": "h100", "world_size": 2, "input_len": 1024, "output_len": 256, "ttft_s": 2.0, "tpot_s": 0.03
    }
    return tc.compare("qwen3-30b-a3b", **asked | changed)


def agrees(opened: Opened, found: Any) -> None:
    """The page's best row says what ``compare`` found."""
    best, told = found.best, opened.best()
    for text in (
        units.rate(best["tokens_per_s_per_gpu"]), units.seconds(best["ttft_s"]), units.seconds(best["tpot_s"]),
        units.rate(best["output_tokens_per_s"]), units.digits(best["cost_per_million_tokens"]),
    ):
        assert text in told, (text, told)


def test_it_opens_with_the_answer(opened: Opened) -> None:
    agrees(opened, compare())
    assert re.search(r"servers? of \d GPU|One GPU|servers of one GPU", opened.page.locator("h1").inner_text())
    assert opened.page.locator("#front svg").count() == 1
    assert "All layouts searched" in opened.page.inner_text("#status")
    files = {url for url in opened.asked if "/static/" in url or url == opened.address}
    weight = sum(len(opened.page.request.get(url).body()) for url in files)
    assert 300_000 < weight < 1_500_000


def test_a_slider_moves_the_answer_and_the_address(moving: Opened) -> None:
    before = moving.best()
    token_ms, length = moving.slide("tpot_ms", 2), moving.slide("input_len", 5)
    moving.answered(f"input_len={length}")
    assert float(token_ms) > 30 and int(length) > 1100 and moving.best() != before
    assert f"input_len={length}" in moving.page.url and f"tpot_ms={token_ms}" in moving.page.url
    agrees(moving, compare(input_len=int(length), tpot_s=float(token_ms) / 1e3))


def test_hover_click_and_keys_lead_from_a_point_to_its_step(opened: Opened) -> None:
    page = opened.page
    best = page.locator("#front svg g[aria-label=dot] > *").last.bounding_box()
    page.mouse.move(best["x"] + best["width"] / 2, best["y"] + best["height"] / 2)
    page.wait_for_selector("#table tr.hovered")
    assert "per user" in page.inner_text("#front-help")
    page.mouse.down()
    page.mouse.up()
    page.wait_for_selector("#table tr.selected")
    assert "sel=" in page.url
    for tab, says in (("step", "decode"), ("roofline", "kernel time"), ("line", "One layer"), ("memory", "batch of"),
                      ("launch", "vllm serve")):
        page.click(f"#tab-{tab}")
        page.wait_for_selector(f"#tab-body:has-text('{says}')")
    page.locator("#front").focus()
    for key in ("Home", "ArrowRight"):
        page.keyboard.press(key)
    assert "tokens per second for a user" in page.inner_text("#spoken")


def test_a_link_shows_the_same_in_another_browser(browser: Any, opened: Opened) -> None:
    page = opened.page
    page.locator("#cards button").nth(1).click()
    page.click("#tab-memory")
    page.wait_for_selector("#tab-body svg")
    other = Opened(browser, opened.address, page.url.removeprefix(opened.address))
    other.page.wait_for_selector("#tab-body svg")
    for part in ("h1", "#details", "#table", "#cards"):
        assert other.page.inner_text(part) == page.inner_text(part)
    other.close()


def test_two_sessions_ask_different_things_at_once(opened: Opened, moving: Opened) -> None:
    opened.page.fill("#f-input_len", "1100")
    moving.page.fill("#f-output_len", "96")
    opened.answered("input_len=1100")
    moving.answered("output_len=96")
    assert "1,100 tokens in and 256 out" in opened.page.inner_text(".question")
    assert "and 96 out" in moving.page.inner_text(".question")
    assert opened.best() != moving.best()
    opened.page.fill("#f-input_len", START["input_len"])
    opened.answered("input_len=1024")


def test_two_rows_side_by_side(opened: Opened) -> None:
    opened.page.locator("#table tbody tr").nth(2).locator("button.small").click()
    opened.page.wait_for_selector("#tab-body:has-text('10 % more of a resource')")
    assert "vs=" in opened.page.url and opened.page.locator("#table tr.versus").count() == 1


@pytest.mark.parametrize(("key", "value", "says"), [
    ("input_len", "many", "must be a whole number"), ("layouts", "<img src=x onerror=alert(1)>", "<img"),
    ("routing", "recorded:/etc/passwd", "by name"),
])  # fmt: skip
def test_bad_input_is_one_line_in_place(opened: Opened, key: str, value: str, says: str) -> None:
    page = opened.page
    page.eval_on_selector_all("details.more", "all => all.forEach((one) => { one.open = true; })")
    good = page.input_value(f"#f-{key}")
    page.fill(f"#f-{key}", value)
    page.wait_for_selector(f"#f-{key}-problem:not([hidden])")
    line = page.inner_text(f"#f-{key}-problem")
    assert says in line and "\n" not in line and page.get_attribute(f"#f-{key}", "aria-invalid") == "true"
    assert page.locator("img").count() == 0
    page.fill(f"#f-{key}", good)
    page.wait_for_selector("#error", state="hidden")
    assert page.get_attribute(f"#f-{key}", "aria-invalid") == "false"


def test_a_phone_in_the_dark(browser: Any, address: str) -> None:
    opened = Opened(browser, address, viewport={"width": 390, "height": 844}, color_scheme="dark", is_mobile=True,
                    has_touch=True)
    assert opened.page.evaluate("document.documentElement.scrollWidth") == 390
    colour = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", colour)[:3])) < 60
    opened.page.locator("#panel > summary").click()
    opened.page.fill("#f-input_len", "900")
    opened.answered("input_len=900")
    assert opened.page.evaluate("document.documentElement.scrollWidth") == 390
    opened.close()


def test_all_controls_have_names_and_the_page_its_parts(opened: Opened) -> None:
    unnamed = opened.page.eval_on_selector_all(
        "input, select, button", "all => all.filter((e) => !(e.labels?.length || e.ariaLabel || e.title || "
        "e.textContent.trim())).map((e) => e.outerHTML)"
    )
    assert unnamed == []
    for part in ("main", "aside[aria-label]", "[aria-live]", "h1"):
        assert opened.page.locator(part).count() >= 1


def test_ten_questions_within_two_actions_each(moving: Opened) -> None:
    page = moving.page
    said = page.inner_text("#said")
    assert "The limit on TTFT" in said and "The limit on TPOT" in said  # which limit binds?
    assert "Spreading whole experts over GPUs (EP)" in said  # expert or tensor parallel?
    assert "Serving from two pools" in said and "with one pool" in page.inner_text("#cards")  # one pool or two?
    first = page.locator("#cards .card.first").inner_text()
    assert re.search(r"ms \((\d+|>99) %\)", first)  # how sure is it that the limits are kept?
    page.select_option("#y-axis", "concurrency")  # how many users on what I have?
    assert "users at once" in page.inner_text("#front") and " users" in page.inner_text("#cards .card.first")

    def asked(key: str, value: str) -> None:
        page.fill(f"#f-{key}", value)
        moving.answered(urlencode({key: value}))

    fast = moving.best()
    asked("input_len", "2000")  # what does a longer prompt do?
    assert moving.best() != fast and page.locator("#front svg [stroke-dasharray='2,3']").count() == 1  # as it was
    asked("price", "1.25")  # what if the price halves?
    row = page.inner_text("#cards .card.first").replace(",", "")
    total = float(re.search(r"(\d+) tokens/s", row)[1])  # type: ignore[index]
    per_million = float(re.search(r"([\d.]+) USD/M", row)[1])  # type: ignore[index]
    assert per_million == pytest.approx(2 * 1.25 / 3600 / total * 1e6, rel=0.01)
    asked("cached", "50")  # does the prefix cache help?
    asked("users", "100")  # can they hold so many users?
    assert "too few users" in page.inner_text("#table")
    page.click("text=Numbers and experts")
    asked("routing", "zipf:1")  # what if experts are chosen unevenly?
    page.click("#f-device")
    page.click("#f-device-field label:has-text('h200-sxm')")  # which GPU is cheapest?
    moving.answered("h200-sxm")
    cards = page.inner_text("#cards").lower()
    assert "cheapest tokens" in cards and "best on h200-sxm" in cards


def test_files_to_keep(opened: Opened) -> None:
    page = opened.page
    for words, name, says in (("YAML", "compare.yaml", "# tensorcast compare"), ("CSV", "candidates.csv", "ttft_s")):
        page.click("#exports > summary")
        with page.expect_download() as waiting:
            page.click(f"#exports button:has-text('{words}')")
        assert waiting.value.suggested_filename == name
        assert says in waiting.value.path().read_text(encoding="utf-8")


# The guard


def asked(address: str, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
    host = address.removeprefix("http://").rstrip("/")
    connection = http.client.HTTPConnection(host, timeout=20)
    connection.putrequest(method, path, skip_host=True)
    given = {"Host": host, **{name.replace("_", "-"): value for name, value in headers.items()}}
    if body is not None:
        given.setdefault("Content-Length", str(len(body)))
    for name, value in given.items():
        connection.putheader(name, value)
    connection.endheaders(body)
    reply = connection.getresponse()
    found = reply.status, reply.read().decode("utf-8", "replace")
    connection.close()
    return found


QUESTION = json.dumps({"browser": "b", "state": {**START, "input_len": "x"}}).encode()


def test_only_its_own_page_may_ask(address: str) -> None:
    json_type, own = "application/json", address.rstrip("/")
    assert asked(address, "POST", "/api/answer", QUESTION, Content_Type=json_type, Origin=own)[0] == 422
    for wrong in (
        {"Origin": "https://elsewhere.example"}, {"Origin": "null"}, {"Host": "rebound.example"},
        {"Sec_Fetch_Site": "cross-site"}, {"Content_Type": "text/plain"}, {"Content_Length": str(1 << 20)},
    ):
        status, said = asked(address, "POST", "/api/answer", QUESTION, **{"Content_Type": json_type, **wrong})
        assert status == 403 and said.startswith("refused: ") and said.count("\n") == 1, wrong
    assert asked(address, "GET", "/api/export/csv", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors")[0] == 403
    assert asked(address, "GET", "/", Host="rebound.example")[0] == 403


@pytest.mark.parametrize("path", [
    "/static/../server.py", "/static/%2e%2e/server.py", "/static//etc/passwd", "/static/..%2f..%2fapi.py",
    "/etc/passwd", "/static/vendor/../app.py", "/api/export/../../x",
])  # fmt: skip
def test_no_file_of_the_machine_is_served(address: str, path: str) -> None:
    status, said = asked(address, "GET", path)
    assert status in (404, 422) and "import" not in said and "root:" not in said


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b'{"browser": "x", "state": 3}'])
def test_what_is_no_question_is_refused(address: str, body: bytes) -> None:
    status, said = asked(address, "POST", "/api/details", body, Content_Type="application/json")
    assert status == 400 and "a question is" in said


def test_a_row_that_is_not_there_is_one_line(address: str) -> None:
    body = json.dumps({"browser": "b", "state": START, "about": {"key": "<b>", "batch": 1}}).encode()
    status, said = asked(address, "POST", "/api/details", body, Content_Type="application/json")
    assert status == 422 and "is none of this answer's" in json.loads(said)["error"]
