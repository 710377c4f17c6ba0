"""Milliseconds from a slider's move to the new front in the explorer's page, in Chromium: median and 95th percentile.

Starts a server of its own, opens the page, waits for the first full answer, and moves sliders one step at a time, each
move to a question that nobody asked before. Told apart: the first front after a move (provisional while not all layouts
are searched) and the full one.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from typing import Any

MOVES = {
    "input_len": 1, "tpot_ms": -1, "output_len": 1, "ttft_ms": -1, "price": 1, "cached": 2, "users": 1,
}
"""Sliders and the steps that each move takes."""

WATCH = """([key, steps]) => new Promise((resolve) => {
  const slider = document.getElementById(`f-${key}-slider`), body = document.body, begun = performance.now();
  const field = document.getElementById(`f-${key}`), before = field.value;
  const found = {};
  const watch = new MutationObserver(() => {
    const [kind, asked] = body.dataset.answer.split(" ");
    if (new URLSearchParams(asked).get(key) !== field.value) return;
    requestAnimationFrame(() => {
      found.first ??= performance.now() - begun;
      if (kind === "full") { found.full = performance.now() - begun; watch.disconnect(); resolve(found); }
    });
  });
  watch.observe(body, { attributes: true, attributeFilter: ["data-answer"] });
  for (let moved = 1; moved < 9 && field.value === before; moved += 1) {
    slider.value = String(Number(slider.value) + steps);
    slider.dispatchEvent(new Event("input", { bubbles: true }));
  }
  setTimeout(() => resolve(found), 60000);
})"""


def told(name: str, values: list[float]) -> str:
    """``name  median 212 ms, p95 430 ms (of 40)``."""
    ordered = sorted(values)
    worst = ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))]
    return f"{name:30} median {statistics.median(ordered):6.0f} ms, p95 {worst:6.0f} ms (of {len(ordered)})"


def measure(page: Any, moves: int, only: list[str]) -> dict[str, list[dict[str, float]]]:
    """``moves`` of each slider, a step further each time."""
    found: dict[str, list[dict[str, float]]] = {}
    for key, steps in ((key, MOVES[key]) for key in only):
        for _ in range(moves):
            found.setdefault(key, []).append(page.evaluate(WATCH, [key, steps]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deepseek-v3")
    parser.add_argument("--device", default="h200-sxm")
    parser.add_argument("--world-size", default="32")
    parser.add_argument("--moves", type=int, default=6, help="of each slider")
    parser.add_argument("--only", default=",".join(MOVES), help="sliders, with commas between")
    asked = parser.parse_args()
    from playwright.sync_api import sync_playwright

    words = ["explore", asked.model, "-d", asked.device, "-n", asked.world_size, "--port", "0", "--no-browser"]
    started = time.perf_counter()
    server = subprocess.Popen([sys.executable, "-m", "tensorcast", *words], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().split()[2]
        print(f"server after {time.perf_counter() - started:.1f} s")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
            page = browser.new_page()
            begun = time.perf_counter()
            page.goto(address)
            page.wait_for_selector("#front svg", timeout=120_000)
            print(f"first front {time.perf_counter() - begun:.1f} s after the page was asked for, in a cold server")
            page.wait_for_selector('body[data-answer^="full"]', timeout=120_000)
            print(f"first full answer {time.perf_counter() - begun:.1f} s after that")
            begun = time.perf_counter()
            page.reload()
            page.wait_for_selector("#front svg")
            print(f"page again, warm: {time.perf_counter() - begun:.1f} s")
            page.wait_for_selector('body[data-answer^="full"]')
            page.evaluate(WATCH, ["input_len", 1])
            found = measure(page, asked.moves, asked.only.split(","))
            browser.close()
    finally:
        server.terminate()
        server.wait(20)
    for key, values in found.items():
        print(told(f"{key}: first front", [one["first"] for one in values if "first" in one]))
        print(told(f"{key}: all layouts", [one["full"] for one in values if "full" in one]))
    for kind in ("first", "full"):
        every = [one[kind] for values in found.values() for one in values if kind in one]
        print(told(f"all sliders: {kind}", every))


if __name__ == "__main__":
    main()
