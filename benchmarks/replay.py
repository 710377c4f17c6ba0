"""Replaying requests: CPU seconds per layout and number of requests, and the memory that they take.

``OMP_NUM_THREADS=1 python benchmarks/replay.py [--most N] [--trace FILE]``: DeepSeek-V3 on 32 H200, random requests
(Poisson, prompts of 500 to 3,500 tokens, replies of 100 to 300) at the rate that the layout takes, in numbers up to
``--most``, each in a process of its own; or the requests of a trace. Target: a million requests in 600 s and 2 GB.
"""

from __future__ import annotations

import argparse
import resource
import time
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tensorcast.profiles.store import load_device, load_engine, load_model
from tensorcast.scheduling.pools import parse_servers
from tensorcast.scheduling.replay import priced_servers
from tensorcast.scheduling.requests import Length, Requests, drawn
from tensorcast.scheduling.trace_files import read_trace

LAYOUTS = {"4 x tp8-ep8": 12.0, "2 x dp16-ep16": 25.0, "2 x tp8-ep8 > dp16-ep16": 8.0}
"""Layouts, and requests per second that they take without a queue that grows for ever."""

COUNTS = (4_000, 20_000, 100_000, 1_000_000)


def asked(count: int, rate: float) -> Requests:
    return drawn(count, Length(2000, 0.75), Length(200, 0.5), rate=rate)


def replayed(layout: str, count: int, trace: Path | None) -> tuple[int, float, float, float, float]:
    """Requests, CPU seconds to price the tables and to replay, seconds replayed, and peak memory in bytes."""
    requests = asked(count, LAYOUTS[layout]) if trace is None else read_trace(trace).requests
    started = time.process_time()
    priced = priced_servers(
        load_model("deepseek-v3"), load_device("h200"), load_engine("vllm"), parse_servers(layout),
        longest=int((requests.input_len + requests.output_len).max()),
    )
    ready = time.process_time()
    found = priced.run(requests)
    done = time.process_time()
    peak = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return len(requests), ready - started, done - ready, found.seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=100_000, help="requests of the largest replay")
    parser.add_argument("--trace", type=Path, help="a trace instead of random requests")
    options = parser.parse_args()
    table = Table("layout", *("requests", "pricing s", "replay s", "requests per CPU s", "peak MB"), box=None)
    for layout in LAYOUTS:
        for count in COUNTS if options.trace is None else COUNTS[:1]:
            if count > options.most:
                continue
            with get_context("spawn").Pool(1) as alone:
                many, pricing_s, replay_s, _, peak = alone.apply(replayed, (layout, count, options.trace))
            row = f"{many:,}", f"{pricing_s:.2f}", f"{replay_s:.2f}", f"{many / replay_s:,.0f}", f"{peak / 1e6:.0f}"
            table.add_row(layout, *row)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
