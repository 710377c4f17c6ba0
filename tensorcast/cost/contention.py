"""Kernels that run at the same time: how long both take, and how much they slow each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tensorcast.cost.work import Size


@dataclass(frozen=True)
class Contention:
    """How many times longer computation and communication take while the other one runs."""

    compute: float
    communication: float


CONTENTION = {
    # Kernels on 20-24 of 132 SMs. In DeepSeek's published trace of a step under dual-batch overlap (profile-data,
    # H800, EP64) GEMMs run at 0.70-0.79 of their stand-alone rate, dispatch at 25.3 and combine at 35.6 GB/s where
    # DeepEP alone reaches about 50.
    "high_throughput": Contention(1.34, 1.7),
    # No SMs between send and receive (DeepEP's hook): what remains is shared memory bandwidth, an assumption.
    "low_latency": Contention(1.08, 1.1),
}


def beside(compute_s: Size, communication_s: Size, contention: Contention) -> Size:
    """Seconds until both are done: slowed while both run, the rest of the longer one at full speed."""
    compute, communication = compute_s * contention.compute, communication_s * contention.communication
    both = np.minimum(compute, communication)
    rest = (compute - both) / contention.compute + (communication - both) / contention.communication
    return both + rest
