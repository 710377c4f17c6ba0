"""A layout in plain words: what is cut, what is whole, how many servers; its code name comes second."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensorcast.deploy.layout import Layout
from tensorcast.report.units import count, plural


def layout_words(layout: Layout, experts: bool = True) -> str:
    """``attention whole on every GPU, experts spread over 8``; ``experts``: the model has some."""
    if layout.world_size == 1:
        return "all on one GPU"
    tp, ep, etp = layout.tp, layout.ep, layout.etp
    what = "attention" if experts else "every layer"
    if tp == 1:
        first = f"{what} whole on every GPU"
    else:
        first = f"{what} cut over {count(tp)} GPUs"
        if layout.dp > 1:
            first += f" in each of {count(layout.dp)} groups"
    parts = [first]
    if experts and layout.stage_ranks > 1:
        if ep == 1:
            same = layout.dp == 1 and tp > 1
            parts = [f"attention and experts cut over {count(tp)} GPUs"] if same else [
                first, f"every expert cut over {count(etp)}"
            ]
        else:
            parts.append(f"experts spread over {count(ep)}" + (f", each cut over {count(etp)}" if etp > 1 else ""))
    if layout.pp > 1:
        parts.append(f"layers in {count(layout.pp)} stages")
    return ", ".join(parts)


def deployment_words(row: Mapping[str, Any], prefill: Layout, decode: Layout, experts: bool = True) -> str:
    """A candidate's servers: ``2 prefill servers of 8 GPUs each (...) and 1 decode server of 16 GPUs (...)``."""
    if row["mode"] != "disaggregated":
        said = layout_words(decode, experts)
        if row["replicas"] == 1:
            return f"One server of {plural(decode.world_size, 'GPU')}: {said}" if decode.world_size > 1 else "One GPU"
        if decode.world_size == 1:
            return f"{count(row['replicas'])} servers of one GPU each"
        return f"{count(row['replicas'])} servers of {count(decode.world_size)} GPUs each: {said}"
    pools = []
    for role, layout in (("prefill", prefill), ("decode", decode)):
        servers = row["replicas"] * row[f"{role}_workers"]
        each = " each" if servers > 1 else ""
        size = plural(layout.world_size, "GPU")
        inside = f" ({layout_words(layout, experts)})" if layout.world_size > 1 else ""
        pools.append(f"{plural(servers, f'{role} server')} of {size}{each}{inside}")
    return " and ".join(pools)
