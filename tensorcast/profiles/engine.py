"""What an engine profile says: how a serving engine runs a traced step."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field

from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.memory import MemoryCovers, PrefillGraphs, Reserve, StepTokens
from tensorcast.profiles.sourced import Figure, Frozen, Number

Fusion = Literal[
    "merged_gemm",  # linears that read the same activation run as one GEMM (QKV, gate+up)
    "pointwise",  # runs of elementwise and row-wise ops become one kernel
    "allreduce_norm",  # all-reduce, residual add and RMSNorm in one kernel
    "norm_quant",  # RMSNorm writes the quantised activation
    "activation_quant",  # SwiGLU writes the quantised activation
]


class AllreduceNorm(Frozen):
    """Limits of the kernel that all-reduces and normalises: device architectures, tokens, bytes by group size."""

    architectures: tuple[str, ...]
    max_tokens: int | None = None
    max_bytes: dict[str, dict[int, int]] = Field(default={}, description="architecture -> ranks -> largest tensor")
    source: str = Field(min_length=3)

    def limit_bytes(self, architecture: str, ranks: int, token_bytes: float) -> float:
        """Largest all-reduce that is fused on this device in a group of ``ranks``; 0 where none is."""
        if architecture.lower() not in self.architectures:
            return 0.0
        largest = math.inf if self.max_tokens is None else self.max_tokens * token_bytes
        if self.max_bytes:
            largest = min(largest, self.max_bytes.get(architecture.lower(), {}).get(ranks, 0))
        return largest


class EngineProfile(Frozen):
    """vLLM, SGLang, TensorRT-LLM: which fusions they have and what a step costs beside its kernels."""

    name: str
    aliases: tuple[str, ...] = ()
    version: str
    description: str
    sources: dict[str, str]
    fusions: tuple[Fusion, ...]
    graph_captured_phases: tuple[Literal["prefill", "decode"], ...] = Field(
        description="phases whose kernels are replayed from a captured graph"
    )
    eager_exchanges: tuple[str, ...] = Field(
        default=(), description="exchanges between experts that cannot be captured: all of their steps run eagerly"
    )
    graph_launch_gap_s: Figure = Field(description="gap between two kernels inside a captured graph")
    eager_launch_gap_s: Figure = Field(description="least time between two kernels launched one by one")
    step_overhead_s: Figure = Field(description="scheduling, sampling and input preparation per step")
    request_overhead_s: Figure | None = Field(default=None, description="the same, per sequence in the batch")
    memory_fraction: Figure = Field(description="share of device memory that the engine takes, without a `reserve`")
    memory_covers: MemoryCovers = Field(default="everything", description="what that share holds")
    reserve: Reserve | None = Field(default=None, description="what it leaves free instead of a fixed share")
    reserved_bytes: Figure = Field(description="context, workspace and captured graphs, outside weights and KV cache")
    max_tokens_per_step: int = Field(ge=1, description="default chunked-prefill budget in tokens")
    step_tokens: StepTokens | None = Field(default=None, description="where that default is another")
    prefill_graphs: PrefillGraphs | None = Field(default=None, description="prefill steps that are captured in pieces")
    all2all: dict[Literal["prefill", "decode"], str] = Field(description="default MoE exchange per phase, dp > 1")
    experts_backend: dict[Literal["prefill", "decode"], str] = Field(
        default={}, description="how expert matmuls run per phase (grouped_mm if not said), unless the exchange decides"
    )
    pads_hidden: bool = Field(default=True, description="experts' hidden size is padded as their kernels want (MXFP4)")
    masked_gemm: Literal["skips", "pads"] = Field(
        default="skips", description="whether a masked grouped GEMM leaves out tiles without rows or computes capacity"
    )
    allreduce_norm: AllreduceNorm | None = Field(default=None, description="where it runs; else everywhere")
    shared_expert_stream_tokens: Figure | None = Field(
        default=None, description="most tokens of a captured step whose shared expert runs on a stream of its own"
    )
    prefill_alone: bool = Field(default=False, description="whether prompts run in steps without decoding sequences")
    reserves_reply: bool = Field(
        default=False, description="whether a request is admitted only if its cache has room for the whole reply"
    )
    arrival_wait_steps: Number = Field(
        default=1.0, ge=0, description="steps that pass before the step that a new request rides in, in a closed loop"
    )
    first_token_overhead_s: Figure | None = Field(
        default=None,
        description="per request, outside the GPU and before its first token: HTTP, tokenising, admission, streaming",
    )
    hand_over_overhead_s: Figure | None = Field(
        default=None,
        description="disaggregated: per request beside the bytes: routing, two workers meeting, transfer set up",
    )

    def tokens_per_step(self, device: DeviceProfile | None = None, dp: int = 1, exchange: str = "") -> int:
        """Default chunked-prefill budget of a data-parallel rank on ``device``."""
        found, rule = self.max_tokens_per_step, self.step_tokens
        if rule is None:
            return found
        if device is not None:
            found = rule.of_server(device, found)
        if rule.over_dp:
            found = max(1, found // dp)
        return min(found, rule.exchanges.get(exchange, found))

    def prefill_graph_tokens(self, device: DeviceProfile, dp: int, pp: int, config: dict[str, Any]) -> int:
        """Tokens of the largest prefill step that is captured in pieces; 0: none is."""
        if self.prefill_graphs is None:
            return 0
        return self.prefill_graphs.largest(device, dp, pp, config, self.tokens_per_step(device, dp))
