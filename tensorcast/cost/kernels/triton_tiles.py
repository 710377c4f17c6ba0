"""Tiles of the Triton experts that an engine runs: tuned ones for the sizes that it ships files for, else its defaults.

A kernel at its default tiles runs at another level than a tuned one. Which tiles a file holds is not said here, only
that there is one: the level of tuned kernels is learnt.
"""

from __future__ import annotations

import os
from functools import lru_cache

import numpy as np

from tensorcast.cost.kernels.vocabulary import SOURCES, Columns
from tensorcast.cost.work import Array
from tensorcast.errors import InputError
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.kernels import TritonTiles
from tensorcast.profiles.store import USER_DIRECTORY, load_engine

TRITON = float(SOURCES.index("triton") + 1)
"""The library whose kernels have these tiles."""

TILES = ("tuned", "block_rows", "block_columns", "block_depth", "pad_block", "tiles_block", "tokens_per_held")
"""Features of :func:`triton_tiles`; ``NONE`` where they say nothing."""

NONE = -99.0

WIDTH = float(1 << 24)
"""More than an expert is wide: experts held and their width make one number."""


@lru_cache(maxsize=16)
def _tiles_of(engine: str, _user: str | None) -> TritonTiles | None:
    try:
        profile = load_engine(engine)
    except InputError:  # devices are priced under names that are no engine's, too
        return None
    if profile.calibrated is not None:  # what is learnt are levels of the kernels that were measured
        profile = load_engine(f"{engine}=={profile.calibrated.kernels}")
    experts = profile.experts
    return experts.triton if experts is not None else None


def triton_tiles(c: Columns, features: Columns, dtype: str, device: DeviceProfile, engine: str) -> Columns:
    """:data:`TILES` of grouped GEMMs, if the engine has Triton experts: whether their tiles are tuned; the default tile
    (log2 of its sides), the share of its rows that are used and log2 of the tiles per processor, where they are not;
    log2 of the tokens per expert that a rank holds. ``features``: of the same calls, with the busiest rank's load.
    """
    known = _tiles_of(engine, os.environ.get(USER_DIRECTORY))
    if known is None:
        return {}
    size, default = len(c["tokens"]), known.default.get(dtype)
    if default is None:
        return {name: np.full(size, NONE) for name in TILES}
    held, inter = np.round(c["experts"] / c["moe_ep"]), np.round(c["inter"] / c["moe_tp"])
    sizes = known.tuned.get(device.name, {}).get(dtype, {})
    codes = [experts * WIDTH + width for experts, widths in sizes.items() for width in widths]
    tuned = np.isin(held * WIDTH + inter, codes)
    # the first tile whose limits hold, per call
    fits = [
        (c["tokens"] <= (tile.tokens or np.inf)) & (c["tokens"] <= (tile.tokens_per_expert or np.inf) * held)
        for tile in default
    ]
    rows, columns, depth = (np.select(fits, [float(tile.block[side]) for tile in default]) for side in range(3))
    filled, hit, small, large = (
        np.exp2(features[name]) for name in ("log_rows", "log_hit", "log_tiles_64", "log_tiles_128")
    )
    tiles = np.select([rows == 64, rows == 128], [small, large], hit * np.ceil(filled / hit / rows))
    each = np.ceil(inter * (1.0 + c["gated"]) / columns) / device.processors
    blocks = {
        "block_rows": np.log2(rows), "block_columns": np.log2(columns), "block_depth": np.log2(depth),
        "pad_block": filled / (tiles * rows), "tiles_block": np.log2(np.maximum(tiles * each, 1e-12)),
    }
    return {
        "tuned": tuned.astype(float), "tokens_per_held": np.log2(np.maximum(c["tokens"] / held, 1e-12)),
        **{name: np.where(tuned, NONE, values) for name, values in blocks.items()},
    }


def of_library(features: Columns, source: Array | None) -> Columns:
    """Features of calls whose library is known: another one's kernels have none of Triton's tiles."""
    if source is None:
        return features
    other = ~np.isin(source, (0.0, TRITON))
    hidden = {name: np.where(other, NONE, features[name]) for name in TILES if name in features}
    return {**features, **hidden, "source": source}
