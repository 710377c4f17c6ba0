"""Facts as data: models, devices and engines, each a YAML file checked into a frozen object.

Importing this package is cheap: the schemas (and pydantic with them) load when a profile is read or a class is named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensorcast.profiles.store import (
    USER_DIRECTORY,
    list_devices,
    list_engines,
    list_models,
    load_device,
    load_engine,
    load_model,
    profile_roots,
)

if TYPE_CHECKING:
    from tensorcast.profiles.device import DeviceProfile
    from tensorcast.profiles.engine import EngineProfile
    from tensorcast.profiles.model import ModelProfile

__all__ = [
    "USER_DIRECTORY",
    "DeviceProfile",
    "EngineProfile",
    "ModelProfile",
    "list_devices",
    "list_engines",
    "list_models",
    "load_device",
    "load_engine",
    "load_model",
    "profile_roots",
]

_HOME = {"DeviceProfile": "device", "EngineProfile": "engine", "ModelProfile": "model"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
