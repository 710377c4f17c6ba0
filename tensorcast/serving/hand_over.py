"""A prompt's cache on its way between pools."""

from __future__ import annotations

import numpy as np

from tensorcast.cost.memory import cache_bytes
from tensorcast.deploy.deployment import Deployment
from tensorcast.serving.traffic import Number


def hand_over_s(prefill: Deployment, decode_gpus: Number, workers: Number, tokens: int) -> Number:
    """Seconds to hand a prompt's cache over, every prefill rank sending its share on its own link.

    ``decode_gpus``: of one decode worker; ``workers``: of both pools together. Over the innermost tier where both pools
    fit into one of its domains, else over the outermost. A latent cache that all tp ranks hold alike is sent by each to
    its counterpart, as engines do.
    """
    inner, outer = prefill.device.interconnect[0], prefill.device.interconnect[-1]
    share = float(cache_bytes(prefill.raw, prefill.quantization.kv, 1, tokens)) / prefill.layout.pp
    near, far = (float(tier.latency_s) + share / float(tier.bandwidth_bytes_per_s) for tier in (inner, outer))
    gpus = (prefill.layout.world_size + np.asarray(decode_gpus)) * workers / 2
    seconds: Number = np.where(gpus <= inner.size, near, far)
    return seconds
