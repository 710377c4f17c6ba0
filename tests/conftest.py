"""What every test stands on: a cache of this run's own, no network, repeatable property tests."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest
from hypothesis import settings

OURS = pytest.StashKey[str]()

LONGEST = (
    "test_notebooks", "test_validate_loop", "test_predict", "test_moe_layer", "test_moe_compile", "test_sharding",
    "test_custom", "test_expert_rows", "test_kernel_sample",
)
"""Files that take a minute or so, first in the queue: a worker that drew one last would leave the others idle."""


def pytest_configure(config: pytest.Config) -> None:
    """One trace cache for the whole run, made before the workers start (they inherit the environment)."""
    settings.register_profile("tensorcast", deadline=None, derandomize="CI" in os.environ)
    settings.load_profile("tensorcast")
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    config.stash[OURS] = tempfile.mkdtemp(prefix="tensorcast-tests-")
    os.environ["TENSORCAST_CACHE"] = config.stash[OURS]
    os.environ.pop("TENSORCAST_PROFILES", None)
    os.environ["HF_HUB_OFFLINE"] = "1"  # a model that is not built from its config is a defect, not a download
    os.environ["MPLBACKEND"] = "Agg"
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers fill the cores; threads on top of them only wait


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, the others in their order."""
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave nothing behind."""
    if OURS in config.stash:
        shutil.rmtree(config.stash[OURS], ignore_errors=True)
