"""Growing the small boosted trees that a kernel model stores. Needs catboost."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tensorcast.cost.kernels.monotone import FREE
from tensorcast.cost.kernels.trees import Trees, leaf_steps
from tensorcast.errors import InputError

BORDERS = 100
"""Most borders per feature."""

CLIP = 2.0
"""|log ratio| to the kernel's median ratio beyond which a row pulls no harder."""


def grow(
    features: Mapping[str, np.ndarray], target: np.ndarray, trees: int, depth: int, rate: float,
    *, weights: np.ndarray | None = None, monotone: bool = False,
) -> Trees:
    """Oblivious trees that minimise the mean absolute error of ``target``: what a few slow repeats cannot bend.

    ``monotone``: they never fall as a feature grows, but for those of :data:`FREE`.
    """
    try:
        import catboost
    except ImportError:
        raise InputError("fitting kernel residuals needs catboost: pip install 'tensorcast[calibrate]'") from None
    names = tuple(sorted(name for name, values in features.items() if np.ptp(values) > 0))
    centre = float(np.median(target)) if len(target) else 0.0
    if not names:
        return no_trees(centre)
    held: dict[str, Any] = {}
    if monotone:
        held = {"monotone_constraints": [int(name not in FREE) for name in names], "leaf_estimation_method": "Gradient"}
    model = catboost.CatBoostRegressor(
        iterations=trees, depth=depth, learning_rate=rate, loss_function="MAE", border_count=BORDERS, thread_count=1,
        l2_leaf_reg=1.0, random_strength=0.0, bootstrap_type="No", random_seed=0, verbose=0, allow_writing_files=False,
        **held,
    )
    matrix = np.stack([features[name] for name in names], axis=1).astype(np.float32)
    model.fit(matrix, np.clip(target - centre, -CLIP, CLIP), sample_weight=weights)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trees.json"
        model.save_model(str(path), format="json")
        return _compact(names, json.loads(path.read_text(encoding="utf-8")), depth, centre)


def no_trees(bias: float) -> Trees:
    return Trees(
        names=(), borders=(), feature=np.zeros((0, 1), np.uint8), border=np.zeros((0, 1), np.uint8),
        leaves=np.zeros((0, 2), np.float32), bias=bias,
    )


def _compact(names: tuple[str, ...], grown: dict[str, Any], depth: int, centre: float) -> Trees:
    """Only the features and borders that a tree asks for; leaves rounded as they are stored."""
    asked: dict[int, set[float]] = {}
    for tree in grown["oblivious_trees"]:
        for split in tree["splits"] or ():
            asked.setdefault(split["float_feature_index"], set()).add(float(np.float32(split["border"])))
    order = sorted(asked)
    borders = {i: np.array(sorted(asked[i]), dtype=np.float32) for i in order}
    count = len(grown["oblivious_trees"])
    feature = np.zeros((count, depth), dtype=np.uint8)
    border = np.full((count, depth), 255, dtype=np.uint8)  # a question that all answer with no
    leaves = np.zeros((count, 1 << depth), dtype=np.float32)
    for t, tree in enumerate(grown["oblivious_trees"]):
        for level, split in enumerate(tree["splits"] or ()):
            at = split["float_feature_index"]
            feature[t, level] = order.index(at)
            border[t, level] = np.searchsorted(borders[at], np.float32(split["border"]))
        leaves[t, : len(tree["leaf_values"])] = tree["leaf_values"]
    factor, bias = grown["scale_and_bias"][0], grown["scale_and_bias"][1]
    leaves *= factor
    step = leaf_steps(leaves)[:, None]
    return Trees(
        names=tuple(names[i] for i in order), borders=tuple(borders[i] for i in order), feature=feature, border=border,
        leaves=(np.round(leaves / step) * step).astype(np.float32), bias=centre + float(np.ravel(bias)[0]),
    )
