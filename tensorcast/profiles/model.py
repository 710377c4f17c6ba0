"""What a model profile says: a Hugging Face config, published counts to check against, and field names."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from tensorcast.profiles.sourced import Figure, Frozen, Number


class ParamCount(Figure):
    """A published parameter count and the convention behind it."""

    counts_embedding: bool = Field(default=True, description="whether the input embedding is in the figure")
    counts_head: bool = Field(default=True, description="whether the output head is in the figure")
    not_built: Number = Field(
        default=0.0, ge=0, description="parameters in the figure that the text model does not hold (vision encoder)"
    )
    precision: Number = Field(default=0.0, ge=0, description="half a unit of the last published digit, in parameters")


class MoEFields(Frozen):
    """Names of a MoE block's attributes. Only what differs from what the block itself shows."""

    gate: str | None = None
    experts: str | None = None
    shared_experts: str | None = None
    shared_experts_gate: str | None = None
    top_k: str | None = None
    norm_topk_prob: str | None = None
    latent_down: str | None = None
    latent_up: str | None = None


class ModelProfile(Frozen):
    """A model to simulate. ``config`` is the content of its Hugging Face ``config.json``."""

    name: str
    aliases: tuple[str, ...] = ()
    hf_id: str
    description: str
    sources: dict[str, str]
    config: dict[str, Any]
    total_params: ParamCount | None = None
    active_params: ParamCount | None = None
    kv_bytes_per_token: Figure | None = Field(default=None, description="bf16, all layers, from a publication")
    quantization: str | None = Field(default=None, description="overrides what config.json says")
    kv_dtype: Literal["bf16", "fp8"] = "bf16"
    moe: MoEFields = MoEFields()

    @property
    def positions(self) -> int | None:
        """The longest context that the config states; engines refuse longer requests unless told otherwise."""
        inner = self.config.get("text_config")
        longest = (inner if isinstance(inner, dict) else self.config).get("max_position_embeddings")
        return int(longest) if longest else None

    @field_validator("config")
    @classmethod
    def _names_a_type(cls, config: dict[str, Any]) -> dict[str, Any]:
        if "model_type" not in config:
            raise ValueError("config needs model_type, as every Hugging Face config.json has")
        return config
