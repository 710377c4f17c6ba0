"""tensorcast: what a Mixture-of-Experts model will cost on a cluster, before you rent it."""

import importlib
import sys
from typing import Any

from tensorcast.api import compare, device_profile, explain, predict_kernels, simulate
from tensorcast.errors import InputError
from tensorcast.version import __version__

__all__ = ["InputError", "__version__", "compare", "device_profile", "explain", "predict_kernels", "simulate"]


def __getattr__(name: str) -> Any:
    """``tensorcast.ops`` on first use: it registers the ops with torch, which importing this package does not load."""
    if name != "ops":
        raise AttributeError(f"module 'tensorcast' has no attribute {name!r}")
    return importlib.import_module("tensorcast.ops")


if "torch" in sys.modules:  # then it costs little, and torch.ops.tensor_cast is there at once
    importlib.import_module("tensorcast.ops")
