"""The share of a device that an engine takes unasked."""

from __future__ import annotations

from typing import Any

import numpy as np

from tensorcast.cost.work import Size
from tensorcast.deploy.exchange_kernels import DEEPEP
from tensorcast.deploy.layout import Layout, attention_dp
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.engine import EngineProfile
from tensorcast.profiles.memory import Served, is_latent


def memory_share(
    engine: EngineProfile, device: DeviceProfile, layout: Layout, experts: bool, config: dict[str, Any], *,
    phase: str = "", served: Served = Served(), tokens: Size | None = None, grown: Size = 0.0,
) -> Size:
    """Share of the device that ``engine`` takes in ``layout``, before decode steps are captured.

    ``phase``: what it runs, if it is one of a pool. ``tokens`` of a server's step: as it takes unasked where not given,
    of several the captured steps are those; ``grown``: bytes of its captured decode steps, where they are known.
    """
    if engine.reserve is None:
        return float(engine.memory_fraction)
    capacity, dp = float(device.memory_bytes), attention_dp(layout, experts)
    graphs = engine.prefill_graphs
    captured = engine.prefill_graph_tokens(
        device, int(np.max(dp)), int(np.max(layout.pp)), config, served,
        most=tokens if isinstance(tokens, int) else None, set_aside=True,
    )
    sizes = graphs.count(captured, served.exchange) if graphs is not None and captured else 0
    counted = engine.tokens_per_step(device) if tokens is None else tokens
    left = engine.reserve.fixed_bytes(
        capacity, counted, layout.tp * dp * layout.pp, sizes, is_latent(config), phase=phase, grown=grown,
        exchange=served.exchange in DEEPEP,
    )
    share, seen = 1.0 - left / capacity, engine.reserve.vision
    if seen is None or "vision_config" not in config or (engine.reserve.pooled and phase == "decode"):
        return share
    # a share that is printed has three digits before what sees takes of it
    return (share if tokens is None else np.round(share, 3)) * seen.share(config)
