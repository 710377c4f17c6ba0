"""Constants of engines' steps, from runs of several networks that agree only so far.

A table of runs has ``base_s`` (the time per token as predicted without the constants), ``layer_slope`` and
``prompt_slope`` (what a unit of each adds), ``tpot_error`` (relative median error of ``base_s``, its kernels'),
``measured_tpot_s``, ``engine, device, network``, ``even`` and ``same`` (a number per measured run).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

FEWEST = 8
"""Runs below which nothing is fitted."""

DRAWN = 4.0
"""As how many networks the median of all engines' counts beside an engine's own. 2 to 8 serve networks that nothing
was fitted to alike."""


BELIEVED = 0.5
"""Share of the factor told by times per token that is taken. Those hardly change with it, as seconds per layer make up
for it; first tokens, which it is for as well, come nearest with about half."""


class Beside(NamedTuple):
    """What steps take beside their kernels: seconds per layer, and by how much more than 1 those with prompts are
    slower under load."""

    layer_s: float
    slower: float


class Own(NamedTuple):
    """A network's own constants, and how many seconds per layer its kernels err by as stated (a median): the constant
    makes up for those, too."""

    layer_s: float
    slower: float
    kernels_s: float = 0.0


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
            kernels_s = float((some["tpot_error"] * some["base_s"] / some["layer_slope"]).median())
            found[str(engine), str(device), int(str(network))] = Own(*fitted, kernels_s)
    return found


def drawn(own: dict[Group, Own], engine: str) -> Beside:
    """An engine's constants: the median of its networks', drawn towards that of all engines' networks, which counts as
    :data:`DRAWN` of them. A few networks say little about the next one, and where prompts take a small part of all
    runs, their own factor is anything."""
    if not own:
        return Beside(0.0, 0.0)
    told = {key: (one.layer_s, BELIEVED * one.slower) for key, one in own.items()}
    every = np.median(np.array(list(told.values())), axis=0)
    here = np.array([one for (name, _, _), one in told.items() if name == engine]).reshape(-1, 2)
    if not len(here):
        return Beside(*every)
    return Beside(*((len(here) * np.median(here, axis=0) + DRAWN * every) / (len(here) + DRAWN)))


def without(own: dict[Group, Own], *, network: int | None = None, device: str | None = None) -> dict[Group, Own]:
    """``own`` but for those of a network, or on a device."""
    return {key: one for key, one in own.items() if key[2] != network and key[1] != device}


def distances(own: dict[Group, Own]) -> Beside:
    """How far networks' own constants are from those drawn from other networks: medians, of the factor relative. Of
    seconds per layer what errors of kernels, which every price states as well, do not explain."""
    if not own:
        return Beside(0.0, 0.0)
    given = [drawn(without(own, network=key[2]), key[0]) for key in own]
    pairs = list(zip(own.values(), given, strict=True))
    layer = [np.sqrt(max((one.layer_s - g.layer_s) ** 2 - one.kernels_s**2, 0.0)) for one, g in pairs]
    slower = [abs(one.slower - g.slower) / (1 + g.slower) for one, g in pairs]
    return Beside(float(np.median(layer)), float(np.median(slower)))


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
