"""Caches that replies fill, in closed form: against walks told step by step, and against replays of random loads."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tensorcast.deploy.options import Options
from tensorcast.predict.run_columns import read_run
from tensorcast.predict.serve_runs import serve
from tensorcast.predict.steady_limits import steady_limits
from tensorcast.profiles.store import load_device, load_engine, load_model
from tensorcast.scheduling.outcome import Limits
from tensorcast.scheduling.pools import parse_servers
from tensorcast.scheduling.replay import priced_servers
from tensorcast.scheduling.requests import Length, drawn
from tensorcast.serving.full_cache import FullCache, _above, _beyond, _uncovered
from tensorcast.serving.traffic import Traffic

OPTIONS = Options(routing="typical")


@pytest.mark.parametrize(("prompt", "reply"), [(1000.0, 6000.0), (4000.0, 1000.0), (1000.0, 1000.0), (300.0, 900.0)])
def test_a_walk_spends_as_many_ends_above_the_brim(prompt: float, reply: float) -> None:
    """Up by an exponential reply's worth until an end, then down by prompt and reply; begun somewhat below."""
    random, walks, ends = np.random.default_rng(3), 20_000, 400
    at, above = -random.random(walks) * prompt, np.zeros(walks)
    for _ in range(ends):
        grown = random.exponential(reply, walks)
        above += np.clip(at + grown, 0, grown) / reply
        at += grown - prompt - reply
    assert float(_above(np.array(prompt), np.array(reply))) == pytest.approx(above.mean(), rel=0.05)


@pytest.mark.parametrize(("ends", "size"), [(0.01, 1.2), (0.3, 5.0), (2.0, 2.1), (8.0, 1.5)])
def test_what_no_end_makes_room_for(ends: float, size: float) -> None:
    drawn_ends = np.random.default_rng(1).poisson(ends, 400_000)
    lacks = np.maximum(ends - size * drawn_ends, 0).mean() / ends
    assert float(_uncovered(np.array(ends), np.array(size))) == pytest.approx(lacks, abs=0.003)


def test_the_normal_law() -> None:
    z = np.linspace(0, 6, 50)
    assert _beyond(z) == pytest.approx([math.erfc(one / math.sqrt(2)) / 2 for one in z], abs=2e-4)


def test_more_sequences_never_start_over_less() -> None:
    full = FullCache.of(Traffic(1000, 3000, 100.0), 60.0, np.array(2999.0))
    waiting, share = full.at(np.linspace(1, 60, 200))
    assert np.all(np.diff(waiting) >= 0) and np.all(np.diff(share) >= 0)
    assert (waiting[0], share[0]) == pytest.approx((0, 0), abs=1e-6)
    most, whole = full.filled(waiting, share, np.array(1e6))
    assert np.allclose(most, full.most) and np.allclose(whole, full.again)
    assert np.allclose(full.filled(waiting, share, np.array(-1.0)), (waiting, share))
    assert full.brims(np.array([59.0, 60.0])).tolist() == [False, True]


LOADS = [
    ("qwen3-30b-a3b", "h100", "tp1", prompt, reply, share)
    for prompt, reply in ((700, 3000), (2500, 2500), (5000, 600)) for share in (0.5, 1.2, 2.0)
] + [
    ("qwen3-235b-a22b", "h100", "tp8-ep8", 1000, 6000, 2.0), ("qwen3-30b-a3b", "h200", "dp2-ep2", 2000, 5000, 1.4),
    ("qwen3-8b", "h100", "tp1", 380, 1700, 1.2), ("qwen3-8b", "h100", "tp1", 376, 336, 2.0),
]  # fmt: skip
"""Prompts, replies, and users as so many times those that fit in the mean."""


@pytest.mark.parametrize("load", LOADS)
def test_users_who_fill_the_cache_are_served_as_in_a_replay(load: tuple[str, str, str, int, int, float]) -> None:
    """Of a long loop, in the middle, of replies half shorter to half longer: they have lost the beginning."""
    model, device, layout, prompt, reply, share = load
    servers = priced_servers(
        load_model(model), load_device(device), load_engine("vllm"), parse_servers(layout), longest=prompt + 2 * reply,
        options=OPTIONS,
    )  # fmt: skip
    rules = servers.pools[0].rules
    users = max(1, int(share * rules.ranks * rules.cache_tokens / (prompt + reply / 2 + rules.waste)))
    requests = drawn(14 * users, Length(prompt), Length(reply, 0.5), users=users, seed=5)
    found = servers.run(requests)
    ends = np.sort(found.record.last_s)[[int(0.4 * len(requests)), int(0.8 * len(requests))]]
    middle = (found.record.last_s > ends[0]) & (found.record.last_s <= ends[1])
    rate, tpot = requests.output_len[middle].sum() / np.diff(ends)[0], found.times["tpot_s"][middle].mean()
    closed = steady_limits(
        model, device, "vllm", layout, users=users, input_len=prompt, output_len=reply, limits=Limits(), options=OPTIONS
    )
    assert users / closed.times["request_s"] * reply == pytest.approx(rate, rel=0.08)
    assert closed.times["tpot_s"] == pytest.approx(tpot, rel=0.09)


KEPT = [
    ("qwen3-8b", 320, 3860, 1.1), ("qwen3-8b", 1800, 620, 1.6), ("qwen3-30b-a3b", 480, 3400, 1.6),
    ("qwen3-30b-a3b", 3280, 4570, 1.4), ("qwen3-30b-a3b", 1600, 1300, 0.9),
]  # fmt: skip
"""Longest prompts and replies, and users as so many times those whose sequences fit."""


@pytest.mark.parametrize("load", KEPT)
def test_room_is_of_whom_a_moment_finds(load: tuple[str, int, int, float]) -> None:
    """Replies of many lengths under SGLang, which keeps room for all of each: longer ones are there for longer."""
    model, prompt, reply, share = load
    servers = priced_servers(
        load_model(model), load_device("h100"), load_engine("sglang"), parse_servers("tp1"), longest=8192,
        options=OPTIONS,
    )  # fmt: skip
    rules = servers.pools[0].rules
    users = int(share * rules.cache_tokens / (prompt * 2 / 3 + reply * 2 / 3))
    requests = drawn(14 * users, Length(prompt * 2 / 3, 0.5), Length(reply * 2 / 3, 0.5), users=users, seed=5)
    found = servers.run(requests)
    ends = np.sort(found.record.last_s)[[int(0.4 * len(requests)), int(0.8 * len(requests))]]
    middle = (found.record.last_s > ends[0]) & (found.record.last_s <= ends[1])
    rate, tpot = requests.output_len[middle].sum() / np.diff(ends)[0], found.times["tpot_s"][middle].mean()
    run = read_run({
        "model": model, "device": "h100", "engine": "sglang", "isl": prompt, "osl": reply, "concurrency": users,
        "length_ratio": 1 / 3, "routing": "typical",
    })  # fmt: skip
    (closed,) = serve([replace(run, rounds=math.inf)])
    assert closed.output_tokens_per_s == pytest.approx(rate, rel=0.035)
    assert closed.tpot_s == pytest.approx(tpot, rel=0.03)
