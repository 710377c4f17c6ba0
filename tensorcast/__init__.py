"""tensorcast: what a Mixture-of-Experts model will cost on a cluster, before you rent it."""

import importlib
import sys
from typing import Any

from tensorcast.api import (
    compare,
    compare_apart,
    compare_encoders,
    device_profile,
    experts,
    explain,
    explain_limits,
    predict_kernels,
    replay,
    replay_sweep,
    simulate,
    simulate_apart,
    simulate_encoder,
)
from tensorcast.errors import InputError
from tensorcast.version import __version__

__all__ = [
    "InputError", "__version__", "compare", "compare_apart", "compare_encoders", "device_profile", "experts", "explain",
    "explain_limits", "predict_kernels", "replay", "replay_sweep", "simulate", "simulate_apart", "simulate_encoder",
]


def __getattr__(name: str) -> Any:
    """``tensorcast.ops`` on first use, also where torch is not loaded yet; :class:`Workspace`, which takes numpy."""
    if name == "Workspace":
        return importlib.import_module("tensorcast.search.workspace").Workspace
    if name != "ops":
        raise AttributeError(f"module 'tensorcast' has no attribute {name!r}")
    return importlib.import_module("tensorcast.ops")


class _WithTorch:
    """A finder of modules that registers the ops as soon as torch is imported, which this package leaves to others."""

    looking = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """torch as the other finders find it, its loader followed by ours. Some only ask whether it is there."""
        if name != "torch" or self.looking:
            return None
        import importlib.util

        self.looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.looking = False
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            importlib.import_module("tensorcast.ops")

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if sys.modules.get("torch") is not None:  # None: an import that is switched off
    importlib.import_module("tensorcast.ops")
else:
    sys.meta_path.insert(0, _WithTorch())
