"""What a model profile says: a Hugging Face config, published counts to check against, and field names."""


from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from tensorcast.profiles.config_values import EXPERTS, EXPERTS_PER_TOKEN, check_values, text_of
from tensorcast.profiles.facts import ModelFacts
from tensorcast.profiles.network.description import Network
from tensorcast.profiles.sourced import Figure, Frozen, Number
from tensorcast.profiles.vision.part import VisionPart

MTP_MODULES = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
"""Fields of configs that hold the number of experts, of those that a token passes, of layers for multi-token
prediction, and the longest sequence."""

UNNAMED_DRAFTS = {"Qwen3NextForCausalLM": 1, "MiMoV2FlashForCausalLM": 1}
"""Layers of multi-token prediction that a class's checkpoints hold and no field of their configs counts, as engines
take them (vLLM 0.33.0, models/mimo_v2_mtp.py, of MiMo the first of three alone, and models/qwen3_next_mtp.py; SGLang
0.5.23, configs/model_config.py)."""


def stated(config: dict[str, Any], names: Iterable[str]) -> int:
    """The first of the fields called ``names`` that the text part of a config gives a number above 0; else 0."""
    values = (text_of(config).get(name) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), 0)


class ParamCount(Figure):
    """A published parameter count and the convention behind it."""

    counts_embedding: bool = Field(default=True, description="whether the input embedding is in the figure")
    counts_head: bool = Field(default=True, description="whether the output head is in the figure")
    not_built: Number = Field(
        default=0.0, ge=0, description="parameters in the figure that the text model does not hold (vision encoder)"
    )
    precision: Number = Field(default=0.0, ge=0, description="half a unit of the last published digit, in parameters")


class MoEFields(Frozen):
    """Names of a MoE block's attributes, and what it does with them; only what the block itself does not show.

    Every name is looked up when the model is built; dots lead into a module (``router.layer``).
    """

    block: str | None = Field(default=None, description="class of the blocks, or the end of their paths (`mlp`)")
    gate: str | None = None
    experts: str | None = None
    shared_experts: str | None = None
    shared_experts_gate: str | None = None
    top_k: str | None = Field(default=None, description="on the block, its gate or its experts, as all that follow")
    norm_topk_prob: str | None = None
    num_experts: str | None = None
    routed_scale: str | None = Field(default=None, description="factor on the routed experts' sum")
    latent_down: str | None = None
    latent_up: str | None = None
    before: tuple[str, ...] = Field(default=(), description="modules on the experts' input, in order")
    after: tuple[str, ...] = Field(default=(), description="modules on the routed experts' sum, in order")
    after_block: tuple[str, ...] = Field(default=(), description="modules on the block's output, in order")
    bias: str | None = Field(default=None, description="vector added to the routed experts' sum")
    matrices: tuple[str, ...] = Field(
        default=(), description="an expert's: (gate, up, down), (gate and up in one, down) or (up, down) without a gate"
    )
    activation: str | None = Field(default=None, description="on an expert, or on the module that stacks them")
    routing: Literal["logits", "pairs", "scores", "states", "hash"] | None = Field(
        default=None,
        description="what the gate gives: logits of all experts; indices and weights; a weight for every expert, zero "
        "where not chosen, for the experts' input; pairs from the block's states; pairs from token ids",
    )
    gate_returns_raw_logits: bool | None = Field(default=None, description="the top-k is taken outside the gate")
    keep_block: bool | None = Field(
        default=None, description="the block's own code runs around the rewritten experts; unsaid: where it must"
    )
    options: dict[str, Any] = Field(default={}, description="of the layer: fields of MoEOptions")


class ModelProfile(Frozen):
    """A model to simulate. ``config`` is the content of its Hugging Face ``config.json``."""

    name: str
    aliases: tuple[str, ...] = ()
    hf_id: str = Field(default_factory=lambda said: said.get("name", ""), description="on the Hub; else the name")
    description: str = ""
    sources: dict[str, str] = Field(default={})
    model: str | None = Field(
        default=None, description="Python class instead of transformers': package.module:Class or file.py:Class, the "
        "file beside the profile; its arguments are config",
    )
    sharded: tuple[str, ...] = Field(default=(), description="arguments of that class that tensor parallelism divides")
    network: Network | None = Field(
        default=None, description="the network itself, of a type that transformers has no class of"
    )
    config: dict[str, Any]
    total_params: ParamCount | None = None
    active_params: ParamCount | None = None
    kv_bytes_per_token: Figure | None = Field(default=None, description="bf16, all layers, from a publication")
    quantization: str | None = Field(default=None, description="overrides what config.json says")
    kv_dtype: Literal["bf16", "fp8"] = "bf16"
    traffic: str = Field(
        default="typical", description="law by which tokens fall on experts; another where served runs tell so"
    )
    moe: MoEFields = Field(default_factory=MoEFields)
    vision: VisionPart | None = Field(default=None, description="its tower and how images are cut, beside config")

    @field_validator("config")
    @classmethod
    def _names_a_type(cls, config: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "model_type" not in config and not info.data.get("model"):
            raise ValueError("config needs model_type, as every Hugging Face config.json has")
        if not info.data.get("model"):  # a class of one's own has arguments of its own
            check_values(config)
        return config

    @field_validator("model")
    @classmethod
    def _names_a_class(cls, model: str | None) -> str | None:
        where, _, name = (model or "").rpartition(":")
        if model is not None and not (where and name.isidentifier()):
            raise ValueError("must be package.module:Class or file.py:Class")
        return model

    @property
    def num_experts(self) -> int:
        """Routed experts of a MoE layer; 0: a dense model."""
        return stated(self.config, EXPERTS)

    @property
    def experts_per_token(self) -> int:
        return stated(self.config, EXPERTS_PER_TOKEN)

    @property
    def mtp_modules(self) -> int:
        """Layers of multi-token prediction, which can draft tokens."""
        classes = self.config.get("architectures") or ()
        if "dspark_block_size" in text_of(self.config):  # its layers draft blocks of tokens, in another way
            return 0
        return stated(self.config, MTP_MODULES) or max((UNNAMED_DRAFTS.get(name, 0) for name in classes), default=0)

    @property
    def stated_facts(self) -> ModelFacts:
        """What rules of layouts and engines ask, from the config alone; a traced table's facts know more."""
        heads = stated(self.config, ("num_attention_heads",))
        latent = text_of(self.config).get("kv_lora_rank")
        own = 0 if latent else stated(self.config, ("num_key_value_heads", "kv_n_heads", "num_attention_groups"))
        return ModelFacts(
            heads=heads,
            kv_heads=own or heads,
            layers=stated(self.config, ("num_hidden_layers",)),
            num_experts=self.num_experts,
            top_k=self.experts_per_token,
            moe_intermediate_size=stated(self.config, ("moe_intermediate_size", "intermediate_size")),
            mtp_modules=self.mtp_modules,
        )

    @property
    def max_positions(self) -> int | None:
        """Tokens of the longest sequence, of prompt and reply together; None where the config does not say.

        RoPE scaling extends it as serving engines read it: YaRN to ``factor`` times the original length, linear and
        dynamic scaling to ``factor`` times the stated one; of other kinds the stated length is the extended one.
        """
        longest = stated(self.config, LENGTHS) or None
        scaling = text_of(self.config).get("rope_scaling") or text_of(self.config).get("rope_parameters")
        rope = scaling if isinstance(scaling, dict) else {}
        factor, kind = rope.get("factor"), rope.get("rope_type", rope.get("type"))
        if longest is None or not isinstance(factor, int | float) or kind not in ("yarn", "linear", "dynamic"):
            return longest
        original = rope.get("original_max_position_embeddings") if kind == "yarn" else None
        return max(longest, int((original or longest) * factor))

    def too_long(self, tokens: int) -> str:
        """What is wrong with sequences of ``tokens`` tokens, which an engine refuses to serve; empty if nothing."""
        longest = self.max_positions
        if longest is None or tokens <= longest:
            return ""
        return (
            f"{tokens} tokens, but {self.name} has {longest} positions (max_position_embeddings); engines go beyond "
            "them only with rope_scaling in its config"
        )
