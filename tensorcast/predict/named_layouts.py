"""A deployment's one name, read as the columns of a row."""

from __future__ import annotations

from tensorcast.deploy.layout import Layout
from tensorcast.errors import InputError
from tensorcast.scheduling.pools import parse_servers


def layout_cells(text: str) -> dict[str, str]:
    """Columns of a deployment by its one name, such as ``2 x tp4 > tp8-ep8``: those of a row that says its sizes."""
    if text.strip()[:1] in (">", "+") or text.strip()[-1:] in (">", "+"):
        raise InputError(f"layout {text!r}: of pools both are named, prefill > decode, as in 2 x tp8 > dp8-ep8")
    servers = parse_servers(text)
    if any(one.device for one in servers):
        raise InputError(f"layout {text!r}: a row is of one device, its own; leave out what is behind @")
    if len(servers) == 1:
        return {"mode": "aggregated", "replicas": str(servers[0].count), **_sizes("", servers[0].layout)}
    found = {"mode": "disaggregated"}
    for prefix, one in zip(("prefill_", "decode_"), servers, strict=True):
        found |= {f"{prefix}workers": str(one.count), **_sizes(prefix, one.layout)}
    return found


def _sizes(prefix: str, layout: Layout) -> dict[str, str]:
    return {f"{prefix}{name}": str(getattr(layout, name)) for name in ("tp", "dp", "ep", "pp")}
