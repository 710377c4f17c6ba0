"""A prompt's cache on its way between pools."""

from __future__ import annotations

import numpy as np

from tensorcast.cost.memory import cache_bytes
from tensorcast.deploy.deployment import Deployment
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.memory import Kept
from tensorcast.serving.traffic import Number


def hand_over_s(
    prefill: Deployment, decode_gpus: Number, workers: Number, tokens: int, decode_device: DeviceProfile | None = None
) -> Number:
    """Seconds to hand a prompt's cache over, every prefill rank sending its share on its own link.

    ``decode_gpus``: of one decode worker; ``workers``: of both pools together. Over the innermost tier where both pools
    fit into one of its domains, else over the outermost. A latent cache that all tp ranks hold alike is sent by each to
    its counterpart, as engines do; of layers with windows what these hold, or all where they have no cache of their
    own. ``decode_device``: of the decode workers; no domain has GPUs of two kinds, so that another one than the prefill
    workers' is reached over the slower of both outermost tiers.

    Where processes cannot map each other's memory, it goes as fast as ``hand_over_gbs`` of the options says. NIXL of
    2025 from the package index sent over TCP between processes of a machine (ai-dynamo/nixl#1097); UCX, which it uses,
    states 10 GB/s for copies to the host (vllm-project/vllm#26382) and 7 GB/s for those of sockets
    (ai-dynamo/nixl#791): 4.1 GB/s one after the other.
    """
    device = prefill.device
    inner, outer = device.interconnect[0], device.interconnect[-1]
    rules = prefill.engine.cache_rules
    whole = rules is not None and rules.kept(prefill.model.config, 0).window_share == 1
    kept = Kept(window_share=1.0) if whole else Kept()
    share = float(cache_bytes(prefill.raw, prefill.quantization.kv, 1, tokens, kept=kept)) / prefill.layout.pp
    if prefill.options.hand_over_gbs is not None:
        return share / (1e9 * prefill.options.hand_over_gbs)
    near, far = (float(tier.latency_s) + share / tier.among(2) for tier in (inner, outer))
    if decode_device is not None and decode_device.name != device.name:
        other = decode_device.interconnect[-1]
        near = far = max(far, float(other.latency_s) + share / other.among(2))
    gpus = (prefill.layout.world_size + np.asarray(decode_gpus)) * workers / 2
    seconds: Number = np.where(gpus <= inner.size, near, far)
    return seconds
