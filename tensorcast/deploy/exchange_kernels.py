"""Engines' own exchange kernels beside DeepEP's first two: what they do, where they run, how they are priced.

No public table has their times, so each is priced as the kernels that move the same bytes in the same way, and said to
be: constants of those, measured or not. What is read of each: vLLM 0.33.0, ``config/parallel.py`` (All2AllBackend) and
``model_executor/layers/fused_moe/prepare_finalize/``; SGLang 0.5.23, ``arg_groups/fields/exec_.py`` (moe_a2a_backend).
"""

from __future__ import annotations

from typing import NamedTuple

from tensorcast.deploy.layout import Layout
from tensorcast.profiles.device import DeviceProfile


class ExchangeKernels(NamedTuple):
    """``like``: the exchange that moves the same bytes. ``vendors`` of devices; ``one_domain``: over the innermost
    links alone. ``why``: what makes it like that. ``inside``: tokens travel inside the experts' own kernel, which takes
    the longer of both; ``balances``: by copies of experts that it fetches for every step, so that each rank has as many
    rows; ``copies``: of experts on a rank beside all of the model's, which each holds (None: it holds its own)."""

    like: str
    vendors: tuple[str, ...]
    one_domain: bool
    why: str
    inside: bool = False
    balances: bool = False
    copies: int | None = None


DEEPEP = ("high_throughput", "low_latency", "by_phase")
"""DeepEP's modes, ``by_phase`` one of each."""

EXCHANGE_KERNELS = {
    "deepep_v2": ExchangeKernels(
        "high_throughput", ("NVIDIA",), False, "one copy of a token per node, forwarded inside, as DeepEP's first"
    ),
    "nixl_ep": ExchangeKernels(
        "low_latency", ("NVIDIA",), False, "every copy written to its expert's rank, in DeepEP's low-latency layout"
    ),
    "mori_high_throughput": ExchangeKernels(
        "high_throughput", ("AMD",), False, "MoRI's InterNodeV1: one copy per node, forwarded inside"
    ),
    "mori_low_latency": ExchangeKernels(
        "low_latency", ("AMD",), False, "MoRI's InterNodeV1LL: every copy written to its expert's rank"
    ),
    "flashinfer_nvlink_one_sided": ExchangeKernels(
        "high_throughput", ("NVIDIA",), True, "a token is put once on each rank that has an expert of it, over NVLink"
    ),
    "flashinfer_nvlink_two_sided": ExchangeKernels(
        "direct", ("NVIDIA",), True, "copies sent and received pairwise over NVLink"
    ),
    "mega_moe": ExchangeKernels(
        "low_latency", ("NVIDIA",), True, "tokens travel inside the experts' kernel, which takes the longer of both",
        inside=True,
    ),
    "moonep": ExchangeKernels(
        "high_throughput", ("NVIDIA",), True,
        "rows spread evenly by copies of experts, whose fetching is not counted; every rank holds all experts",
        balances=True, copies=4,
    ),
}  # fmt: skip
"""By our word, which is vLLM's; SGLang's are in its launch table.

Mega-MoE: DeepGEMM's kernel, timed as a whole in aiconfigurator-core 0.12.0 (SGLang 0.5.10 to 0.5.16 on B200, GB200 and
GB300, 4 to 32 ranks). Of 512 tokens a rank and more, the longer of exchange and experts is 18 % off in the median,
their sum 79 %; of fewer 21 and 14 % (``benchmarks/mega_moe.py``). MoonEP: vLLM 0.33.0,
``prepare_finalize/moonep.py``, which calls itself a proof of concept.
"""


def inside_experts(kind: str) -> bool:
    """Whether tokens travel inside the experts' own kernel."""
    return kind in EXCHANGE_KERNELS and EXCHANGE_KERNELS[kind].inside


def priced_as(kind: str) -> str:
    """The exchange whose bytes and constants stand for ``kind``."""
    return EXCHANGE_KERNELS[kind].like if kind in EXCHANGE_KERNELS else kind


def broken_exchange(kind: str, layout: Layout, device: DeviceProfile) -> str:
    """Why ``kind`` cannot run on a device in a layout; empty if it can."""
    kernels = EXCHANGE_KERNELS.get(kind)
    if kernels is None:
        return ""
    if device.vendor not in kernels.vendors:
        return f"--all2all {kind}: {' and '.join(kernels.vendors)} GPUs only, not {device.name} ({device.vendor})"
    domain = device.interconnect[0].size
    if kernels.one_domain and layout.stage_ranks > domain:
        return f"--all2all {kind}: over NVLink, which joins {domain} of the {layout.stage_ranks} ranks on {device.name}"
    return ""


def exchange_note(kind: str) -> str:
    """How ``kind`` is priced, in a line; empty where it is by constants of its own."""
    kernels = EXCHANGE_KERNELS.get(kind)
    if kernels is None:
        return ""
    return f"{kind} is priced as {kernels.like} exchange ({kernels.why}): no times of its own are known"
