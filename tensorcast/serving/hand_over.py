"""A prompt's cache on its way between pools."""

from __future__ import annotations

from typing import Any

import numpy as np

from tensorcast.cost.memory import cache_bytes
from tensorcast.deploy.deployment import Deployment


def transfer_s(prefill: Deployment, decode: Deployment, tokens: int, workers: int) -> float:
    """Seconds to hand a prompt's cache over, every prefill rank sending its share on its own link.

    Over the innermost tier where both pools fit into one of its domains, else over the outermost. A latent cache that
    all tp ranks hold alike is sent by each to its counterpart, as engines do.
    """
    return float(hand_over_s(prefill, (prefill.layout.world_size + decode.layout.world_size) * workers / 2, tokens))


def hand_over_s(prefill: Deployment, gpus: Any, tokens: int) -> Any:
    """:func:`transfer_s` where both pools hold ``gpus`` in all; an array gives an array."""
    inner, outer = prefill.device.interconnect[0], prefill.device.interconnect[-1]
    share = float(cache_bytes(prefill.raw, prefill.quantization.kv, 1, tokens)) / prefill.layout.pp
    near, far = (float(tier.latency_s) + share / float(tier.bandwidth_bytes_per_s) for tier in (inner, outer))
    return np.where(np.asarray(gpus) <= inner.size, near, far)
