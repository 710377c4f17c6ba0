"""Constants of engines' steps, from runs of several networks that agree only so far.

A table of runs has ``base_s`` (the time per token as predicted without the constants), ``layer_slope`` and
``prompt_slope`` (what a unit of each adds), ``tpot_error`` (relative median error of ``base_s``, its kernels'),
``measured_tpot_s``, ``engine, device, network``, ``even`` and ``same`` (a number per measured run).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from tensorcast.cost.evidence import NORMAL_90

FEWEST = 8
"""Runs below which nothing is fitted."""

DRAWN = 4.0
"""As how many networks the median of all engines' counts beside an engine's own. 2 to 8 serve networks that nothing
was fitted to alike."""

APART = 0.15
"""How far networks' factors on steps with prompts lie apart: of one whose kernels' errors move it by as much, half is
believed."""


class Beside(NamedTuple):
    """What steps take beside their kernels: seconds per layer, and by how much more than 1 those with prompts are
    slower under load."""

    layer_s: float
    slower: float


class Own(NamedTuple):
    """A network's own constants, and by how much each moves for errors of its kernels as large as stated (medians): the
    constants make up for those, too."""

    layer_s: float
    slower: float
    moves: Beside = Beside(0.0, 0.0)

    @property
    def believed(self) -> float:
        """How much the factor counts, from 0 to 1: where prompts take a small part of all runs, it is anything."""
        return APART**2 / (APART**2 + self.moves.slower**2)


Group = tuple[str, str, int]
"""Engine, device, network."""


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


def least_off_by_two(base: Any, slope: Any, other: Any, measured: Any, weight: Any) -> tuple[float, float]:
    """As :func:`least_off`, of two constants, 0 or more, that add ``slope`` and ``other`` times themselves."""
    base, slope, other, measured, weight = (np.asarray(a, dtype=float) for a in (base, slope, other, measured, weight))

    def best(second: float) -> tuple[float, float]:
        """The first constant that goes with the ``second``, and how far off both leave the runs."""
        added = base + other * second
        constant = least_off(added, slope, measured, weight)
        return constant, float(np.sum(weight * np.abs((added + slope * constant) / measured - 1)))

    moves = other > 1e-9 * np.max(other, initial=0.0)
    low, high = 0.0, float(np.max(measured[moves] / other[moves], initial=0.0))
    for _ in range(60):  # the sum is convex in both, so its least over the first is convex, too
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if best(left)[1] <= best(right)[1]:
            high = right
        else:
            low = left
    second = (low + high) / 2 if best((low + high) / 2)[1] < best(0.0)[1] else 0.0
    return best(second)[0], second


def least_off_by_size(base: Any, slope: Any, size: Any, measured: Any, weight: Any) -> tuple[float, float]:
    """As :func:`least_off`, a constant and what comes to it per ``size``, both 0 or more."""
    return least_off_by_two(base, slope, np.asarray(slope) * np.asarray(size), measured, weight)


def once(rows: pd.DataFrame) -> pd.Series[float]:
    """Weights by which a run counts once, however often it is recorded."""
    return 1.0 / rows.groupby("same")["even"].transform("size")


def evenly(rows: pd.DataFrame) -> pd.Series[float]:
    """Weights by which a network counts once, however many of its runs were measured: constants are for the next
    network as well, and one that is most of a table would have them serve it alone."""
    counted = once(rows)
    return counted / counted.groupby(rows["network"]).transform("sum")


def own_fits(rows: pd.DataFrame) -> dict[Group, Own]:
    """Each network's own constants under an engine on a device, where enough runs say them."""
    found = {}
    for (engine, device, network), some in rows.groupby(["engine", "device", "network"]):
        if len(some) >= FEWEST:
            fitted = least_off_by_two(
                some["base_s"], some["layer_slope"], some["prompt_slope"], some["measured_tpot_s"], once(some)
            )
            off_s = some["tpot_error"] * some["base_s"]
            moves = Beside(*(_moved(off_s, some[name], some) for name in ("layer_slope", "prompt_slope")))
            found[str(engine), str(device), int(str(network))] = Own(*fitted, moves)
    return found


def _moved(off_s: pd.Series[float], slope: pd.Series[float], runs: pd.DataFrame) -> float:
    """What makes up for ``off_s``, by the weights of :func:`least_off`."""
    some = slope > 1e-9 * slope.max()
    weights = (once(runs) * slope / runs["measured_tpot_s"])[some]
    return median((off_s / slope)[some], weights) if some.any() else np.inf


def few_groups(groups: float) -> float:
    """How many times as wide an interval of 80 % is for one more of so many ``groups`` whose spread these alone tell:
    Student's over the normal law's (Abramowitz and Stegun, 26.7.5), beside the error of their middle."""
    free, z = groups - 1, NORMAL_90
    student = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return float(student / z * np.sqrt(1 + 1 / groups))


def median(values: Any, weights: Any, share: float = 0.5) -> float:
    """The least of ``values`` that half the weight, or another ``share`` of it, does not exceed."""
    values, weights = np.asarray(values, dtype=float), np.asarray(weights, dtype=float)
    order = np.argsort(values)
    below = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(below, share * below[-1])])


def drawn(own: dict[Group, Own], engine: str) -> Beside:
    """An engine's constants: the median of its networks', drawn towards that of all engines' networks, which counts as
    :data:`DRAWN` of them. A few networks say little about the next one. Factors count as far as they are believed."""
    if not own:
        return Beside(0.0, 0.0)
    here = [one for (name, _, _), one in own.items() if name == engine]
    every, own_ = (_medians(some) for some in (list(own.values()), here))
    counts = Beside(len(here), sum(one.believed for one in here))
    return Beside(*(
        (count * mine + DRAWN * all_) / (count + DRAWN) for count, mine, all_ in zip(counts, own_, every, strict=True)
    ))


def _medians(some: Sequence[Own]) -> Beside:
    if not some:
        return Beside(0.0, 0.0)
    layer_s = float(np.median([one.layer_s for one in some]))
    return Beside(layer_s, median([one.slower for one in some], [one.believed for one in some]))


def without(own: dict[Group, Own], *, network: int | None = None, device: str | None = None) -> dict[Group, Own]:
    """``own`` but for those of a network, or on a device."""
    return {key: one for key, one in own.items() if key[2] != network and key[1] != device}


def distances(own: dict[Group, Own]) -> Beside:
    """How far networks' own constants are from those drawn from other networks, but for what errors of kernels, which
    every price states as well, explain: medians, of the factor relative."""
    if not own:
        return Beside(0.0, 0.0)
    given = [drawn(without(own, network=key[2]), key[0]) for key in own]
    pairs = list(zip(own.values(), given, strict=True))
    layer = [_beyond(one.layer_s - g.layer_s, one.moves.layer_s) for one, g in pairs]
    slower = [_beyond(one.slower - g.slower, one.moves.slower) / (1 + g.slower) for one, g in pairs]
    return Beside(float(np.median(layer)), median(slower, [one.believed for one, _ in pairs]))


def _beyond(distance: float, error: float) -> float:
    """What independent causes beside an ``error`` leave of a ``distance``."""
    return float(np.sqrt(max(distance**2 - error**2, 0.0)))


def added(rows: pd.DataFrame, beside: Beside) -> pd.Series[float]:
    """Times per token of ``rows`` with these constants in them."""
    return rows["base_s"] + beside.layer_s * rows["layer_slope"] + beside.slower * rows["prompt_slope"]


def unseen(rows: pd.DataFrame, own: dict[Group, Own]) -> pd.Series[float]:
    """Times per token of one engine's ``rows``, each network's by constants that nothing of it was fitted to."""
    after = pd.Series(0.0, index=rows.index)
    for network, some in rows.groupby("network"):
        after[some.index] = added(some, drawn(without(own, network=int(str(network))), str(some["engine"].iloc[0])))
    return after


def median_error(predicted: pd.Series[float], rows: pd.DataFrame, name: str = "tpot_s") -> float:
    """Median of |predicted / measured - 1|."""
    return float((predicted / rows[f"measured_{name}"] - 1).abs().median())
