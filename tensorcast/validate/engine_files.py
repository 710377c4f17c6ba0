"""The generated block at the end of an engine profile: what was fitted to served runs."""

from __future__ import annotations

from pathlib import Path

import yaml

from tensorcast.profiles import load_engine
from tensorcast.profiles.engine import EngineFit, EngineProfile
from tensorcast.validate.generated import replace_block

MARKER = "# Fitted by `python -m tensorcast.validate.engines`, which replaces all that follows; do not edit.\n"


def read_engine(path: Path) -> EngineProfile:
    """The engine profile at ``path``."""
    return load_engine(path.resolve())


def render(fit: EngineFit) -> str:
    """The block as YAML, one line per device."""
    fields = fit.model_dump(exclude_defaults=True)
    devices = fields.pop("devices", {})
    text = MARKER + yaml.safe_dump({"fitted": fields}, sort_keys=False, width=110, allow_unicode=True)
    if devices:
        text += "  devices:\n"
    for name, one in devices.items():
        one["models"] = list(one["models"])
        line = yaml.safe_dump(one, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True)
        text += f"    {name}: {line}"
    return text


def write_fit(path: Path, fit: EngineFit) -> None:
    """Replace the generated block at the end of an engine profile, or append one; the rest stays byte for byte."""
    replace_block(path, "fitted", MARKER, render(fit))
