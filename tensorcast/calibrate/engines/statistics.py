"""Constants of an engine, in general and by device, from runs of several networks that agree only so far.

A table of runs has ``base_s`` (the time per token as predicted without the constant), ``slope`` (what a unit of it
adds), ``measured_tpot_s``, ``engine, device, network``, ``even`` and ``same`` (a number per measured run).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd


class Weights(NamedTuple):
    """As how many networks the published value counts beside an engine's, and the engine's beside a device's."""

    published: float
    general: float


WEIGHTS = tuple(Weights(p, g) for p in (math.inf, 32.0, 16.0, 8.0, 4.0) for g in (math.inf, 8.0, 4.0, 2.0, 1.0))
"""What is tried, the heaviest first."""


def least_off(base: Any, slope: Any, measured: Any, weight: Any) -> float:
    """The constant, 0 or more, of which ``slope`` times added to ``base`` come closest to ``measured``.

    Least weighted sum of |predicted / measured - 1| over ``[N]`` runs, which is a weighted median.
    """
    base, slope, measured, weight = (np.asarray(a, dtype=float) for a in (base, slope, measured, weight))
    moves = slope > 1e-3 * slope.max(initial=0.0)  # of a full house, the first token waits for others' replies
    if not moves.any():
        return 0.0
    meets, pull = (measured - base)[moves] / slope[moves], (weight * slope / measured)[moves]
    order = np.argsort(meets)
    below = np.cumsum(pull[order])
    return max(float(meets[order][np.searchsorted(below, below[-1] / 2)]), 0.0)


def least_off_by_size(base: Any, slope: Any, size: Any, measured: Any, weight: Any) -> tuple[float, float]:
    """As :func:`least_off`, a constant and what comes to it per ``size``, both 0 or more."""
    base, slope, size, measured, weight = (np.asarray(a, dtype=float) for a in (base, slope, size, measured, weight))

    def best(each: float) -> tuple[float, float]:
        """The constant that goes with ``each``, and how far off both leave the runs."""
        added = base + slope * each * size
        constant = least_off(added, slope, measured, weight)
        return constant, float(np.sum(weight * np.abs((added + slope * constant) / measured - 1)))

    low, high = 0.0, float(np.max(measured / size))
    for _ in range(60):  # the sum is convex in both, so its least over the constant is convex, too
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if best(left)[1] <= best(right)[1]:
            high = right
        else:
            low = left
    each = (low + high) / 2 if best((low + high) / 2)[1] < best(0.0)[1] else 0.0
    return best(each)[0], each


def once(rows: pd.DataFrame) -> pd.Series[float]:
    """Weights by which a run counts once, however often it is recorded."""
    return 1.0 / rows.groupby("same")["even"].transform("size")


def alike(rows: pd.DataFrame) -> pd.Series[float]:
    """:func:`once`, and every network on every device of an engine the same."""
    one = once(rows)
    return one / one.groupby([rows["engine"], rows["device"], rows["network"]]).transform("sum")


@dataclass(frozen=True)
class Constant:
    """A constant in general and by device; ``own``: by (device, network), each from its runs alone."""

    general: float
    devices: dict[str, float]
    own: dict[tuple[str, int], float]

    def at(self, device: str) -> float:
        return self.devices.get(device, self.general)

    def on(self, devices: pd.Series[str]) -> pd.Series[float]:
        return devices.map(self.at).astype(float)

    def added(self, rows: pd.DataFrame) -> pd.Series[float]:
        """Times per token of ``rows`` with the constant in them."""
        return rows["base_s"] + self.on(rows["device"]) * rows["slope"]


def fit_constant(rows: pd.DataFrame, published: float, weights: Weights) -> Constant:
    """From runs of one engine: drawn towards ``published``, and of a device towards the engine's."""

    def fit(some: pd.DataFrame) -> float:
        return least_off(some["base_s"], some["slope"], some["measured_tpot_s"], alike(some))

    def drawn(some: pd.DataFrame, towards: float, count: float) -> float:
        networks = some["network"].nunique()
        return towards if math.isinf(count) else (networks * fit(some) + count * towards) / (networks + count)

    general = drawn(rows, published, weights.published) if len(rows) else published
    devices = {str(name): drawn(some, general, weights.general) for name, some in rows.groupby("device")}
    own = {
        (str(name), network): fit(some)
        for name, here in rows.groupby("device")
        for network, some in ((n, here[here["network"] == n]) for n in here["network"].unique())
    }
    return Constant(general, devices, own)


def choose(rows: pd.DataFrame, published: float) -> Weights:
    """The weights with which every network of ``rows``, fitted to without its own runs, is closest in the mean."""
    networks = list(rows["network"].unique())
    if len(networks) < 2:
        return WEIGHTS[0]

    def off(weights: Weights) -> float:
        found = []
        for network in networks:
            fit = fit_constant(rows[rows["network"] != network], published, weights)
            some = rows[rows["network"] == network]
            error = (fit.added(some) / some["measured_tpot_s"] - 1).abs()
            found += list(error.groupby(some["device"]).median())
        return float(np.mean(found))

    return min(WEIGHTS, key=off)


def fit_drawn(rows: pd.DataFrame, published: float) -> Constant:
    """:func:`fit_constant` with the weights that :func:`choose` finds."""
    return fit_constant(rows, published, choose(rows, published))


@dataclass(frozen=True)
class Slower:
    """By how much more than 1 steps with prompts are slower under load on a device; ``without``: of each network the
    same, fitted without its runs; ``off``: distances of networks' own from that, as parts of the factor."""

    more: float
    without: dict[int, float]
    off: tuple[float, ...]


def fit_slower(rows: pd.DataFrame) -> Slower:
    """From runs of all engines on one device; ``slope``: what a step twice as slow would add."""

    def fitted(some: pd.DataFrame, weights: Weights | None = None) -> float:
        return fit_constant(some, 0.0, weights or choose(some, 0.0)).at(str(rows["device"].iloc[0]))

    networks = sorted(set(rows["network"]))
    without = {n: fitted(rows[rows["network"] != n]) for n in networks}
    own = {n: fitted(rows[rows["network"] == n], Weights(0.0, 0.0)) for n in networks}
    return Slower(fitted(rows), without, tuple(abs(own[n] - w) / (1 + w) for n, w in without.items()))


@dataclass(frozen=True)
class Unseen:
    """Networks, each fitted to without its own runs: median error of their times per token as published and as fitted.

    ``off``: median distance of a network's own overhead per step from the one that it is given.
    """

    before: float | None
    after: float | None
    off: float


def unseen(rows: pd.DataFrame, published_s: float, slower: dict[str, Slower]) -> Unseen:
    """Of one engine's ``rows``, of which ``small`` are fitted to and ``scored`` ones scored; ``slower``: by device."""
    small, scored = rows[rows["small"]], rows[rows["scored"]]
    own, off = fit_constant(small, published_s, WEIGHTS[0]).own, []
    after = pd.Series(0.0, index=scored.index)
    for network, some in scored.groupby("network"):
        given = fit_drawn(small[small["network"] != network], published_s)
        known = {name: one.without.get(int(str(network)), one.more) for name, one in slower.items()}
        more = some["device"].map(known).fillna(0.0)
        after[some.index] = given.added(some) + more * some["prompt_slope"]
        off += [abs(s - given.at(name)) for (name, one), s in own.items() if one == network]
    if scored["network"].nunique() < 2:
        return Unseen(None, None, float(np.median(off)))
    before = median_error(scored["tpot_s"], scored)
    return Unseen(round(before, 3), round(median_error(after, scored), 3), float(np.median(off)))


def median_error(predicted: pd.Series[float], rows: pd.DataFrame, name: str = "tpot_s") -> float:
    """Median of |predicted / measured - 1|."""
    return float((predicted / rows[f"measured_{name}"] - 1).abs().median())
