"""Values to try on each axis."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tensorcast.deploy.layout import ALL2ALL
from tensorcast.deploy.plan.plan import COMBINES
from tensorcast.errors import InputError, unknown_name
from tensorcast.modeling.quantization import KV_DTYPES, SCHEMES

EXCHANGES: dict[str, dict[str, str]] = {
    "auto": {"prefill": "auto", "decode": "auto"},
    "deepep": {"prefill": "high_throughput", "decode": "low_latency"},
    **{kind: {"prefill": kind, "decode": kind} for kind in ALL2ALL if kind != "auto"},
}
"""How tokens reach experts, by phase; ``deepep`` is DeepEP with the mode that suits the phase."""

LARGEST_BATCH = 1 << 13
"""Sequences per data-parallel rank beyond which no engine is asked to go: several times their own defaults."""


@dataclass(frozen=True)
class Axes:
    """Values to try on each axis beside the layout; one value means that the axis is not searched.

    The default searches what leaves the model's numbers alone. The KV cache's dtype changes them, and what drafted
    tokens bring hangs on an acceptance rate: both are tried where asked for (:data:`FULL`).
    """

    exchange: tuple[str, ...] = ("allgather_reducescatter", "deepep")
    dispatch: tuple[str | None, ...] = (None, "bf16")
    combine: tuple[str | None, ...] = (None,)
    kv_dtype: tuple[str | None, ...] = (None,)
    shared_expert_tp: tuple[bool, ...] = (True, False)
    external_shared_experts: tuple[bool, ...] = (False, True)
    redundant_experts: tuple[bool, ...] = (False, True)
    dual_batch_overlap: tuple[bool, ...] = (False, True)
    mtp_depth: tuple[int, ...] = (0,)
    dcp: tuple[int, ...] = (1,)
    pcp: tuple[int, ...] = (1,)
    chunk_tokens: tuple[int, ...] = (2048, 8192, 16384)

    def __post_init__(self) -> None:
        for name in self.exchange:
            if name not in EXCHANGES:
                raise unknown_name("--all2all", name, EXCHANGES)
        for name, known in (("kv_dtype", KV_DTYPES), ("dispatch", SCHEMES), ("combine", COMBINES)):
            for value in getattr(self, name):
                if value is not None and value not in known:
                    raise unknown_name(f"--{name.replace('_', '-')}", value, known)
        leasts = (
            ("mtp_depth", "--mtp", 0), ("dcp", "--dcp", 1), ("pcp", "--pcp", 1), ("chunk_tokens", "--chunk-tokens", 1),
        )
        for name, flag, least in leasts:
            if wrong := [value for value in getattr(self, name) if value < least]:
                raise InputError(f"{flag} {wrong[0]}: must be at least {least}")
        kinds = {kind for name in self.exchange for kind in EXCHANGES[name].values()}
        if "logfmt10" in self.combine and "low_latency" not in kinds:
            raise InputError("--combine logfmt10: only the low_latency exchange has it; use --all2all low_latency")

    def for_one_exchange(self) -> Axes:
        """The same for servers that have one exchange for both phases: each of DeepEP's modes alone.

        Pools may still differ: any variant's prefill goes with any other's decode.
        """
        kinds = [kind for name in self.exchange for kind in EXCHANGES[name].values()]
        chunks = self.chunk_tokens
        if "low_latency" in kinds and chunks == Axes.chunk_tokens:
            chunks = (LOW_LATENCY_CHUNK, *chunks)
        return replace(self, exchange=tuple(dict.fromkeys(kinds)), chunk_tokens=chunks)


LOW_LATENCY_CHUNK = 256
"""Chunk of a prompt that goes through low-latency buffers, which grow with it: vLLM's own default where prompts have to
(vllm/engine/arg_utils.py)."""

FULL = Axes(kv_dtype=("bf16", "fp8"), mtp_depth=(0, 1, 2))
"""Every axis."""
