"""Sizes of a model that rules of layouts, options and engines ask for, and formulas of whole blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelFacts:
    """A model's sizes before it is cut over GPUs; 0 where there is no such thing, or a config alone does not say.

    ``kv_heads``: heads of keys and values; of latent attention as many as of queries.
    ``zero_experts``: experts that hand their input back. ``moe_hidden_size``: width of what experts read.
    ``expert_groups``, ``expert_groups_chosen``: a token picks its experts from so many groups of all.
    ``shared_experts``: every token also passes an expert that is always on; ``fused_experts``: of these, in a rank's
    table, those that run among the routed ones, as choices of every token. ``mtp_modules``: layers of multi-token
    prediction, which draft tokens. ``block``: prompts were traced at multiples of so many tokens.
    ``remarks``: what the reading of its config took for granted or left out, in lines.
    ``compress_ratios``: tokens of a compressed cache entry by layer, 0 where there are none; those of the least ratio
    have indexer keys of ``indexer_width`` numbers beside them.
    ``ends_from``: layers from this one on are needed for the last ``ends_tokens`` tokens of a prompt alone (0: all are
    needed for all), but for what they cache.
    ``handed_on``: vectors of ``hidden_size`` that a pipeline stage hands to the next for a token, on average over all
    places to cut: the state and the residual, or with sums of blocks of layers these and the state.
    """

    hidden_size: int = 0
    vocab_size: int = 0
    layers: int = 0
    heads: int = 0
    kv_heads: int = 0
    num_experts: int = 0
    top_k: int = 0
    zero_experts: int = 0
    moe_hidden_size: int = 0
    moe_intermediate_size: int = 0
    expert_groups: int = 1
    expert_groups_chosen: int = 1
    tied_embedding: bool = False
    shared_experts: bool = False
    fused_experts: int = 0
    mtp_modules: int = 0
    block: int = 1
    remarks: tuple[str, ...] = ()
    compress_ratios: tuple[int, ...] = ()
    indexer_width: int = 0
    handed_on: float = 2.0
    ends_from: int = 0
    ends_tokens: int = 0

    @classmethod
    def stored(cls, values: dict[str, Any]) -> ModelFacts:
        """Facts from JSON, which has lists where they have tuples."""
        fields: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in values.items()}
        return cls(**fields)

    @property
    def copies_per_token(self) -> float:
        """(token, expert) rows of a token on average: its k choices less those of experts that compute nothing."""
        every = self.num_experts + self.zero_experts
        return self.top_k * self.num_experts / every if every else 0.0
