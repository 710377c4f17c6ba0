"""Options as keyword arguments, for type checkers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict


class DeploymentOptions(TypedDict, total=False):
    """The fields of :class:`tensorcast.deploy.options.Options` as keyword arguments, for type checkers."""

    quant: str | None
    kv_dtype: str | None
    state_dtype: str | None
    routing: str
    fusion: str
    all2all: str
    dispatch: str | None
    combine: str | None
    placement: str
    redundant_experts: int
    experts_backend: str | Mapping[str, str]
    experts_kernels: str
    attention_kernels: str
    shared_expert_tp: bool
    shared_experts_fusion: bool
    external_shared_experts: int
    split_tokens_over_tp: bool
    route_after_dp_transform: bool
    dual_batch_overlap: bool
    mtp_depth: int
    speculative_method: str
    draft_model: str | None
    dcp: int
    pcp: int
    pp_partition: str | None
    chunk_tokens: int
    memory_fraction: float | None
    hand_over_gbs: float | None
    cuda_graphs: str
    compiled: bool
    custom_all_reduce: bool
    allreduce_fusion: str


class SearchedOptions(TypedDict, total=False):
    """Options of a comparison: one value for all candidates, or several of which the best is searched."""

    quant: str | None
    speculative_method: str
    draft_model: str | None
    pp_partition: str | None
    experts_kernels: str
    attention_kernels: str
    state_dtype: str | None
    routing: str
    placement: str
    kv_dtype: Sequence[str] | None
    mtp_depth: Sequence[int] | None
    dcp: Sequence[int] | None
    pcp: Sequence[int] | None
    all2all: Sequence[str] | None
    dispatch: Sequence[str] | None
    combine: Sequence[str] | None
    chunk_tokens: Sequence[int] | None
