"""A network in the field's own words: for models whose class transformers does not have.

Every size is a number or the name of a field of the model's ``config.json`` (dots lead into its objects, ``*`` stands
between factors), so that one description reads all releases of a type. What a name leads to that the file does not say
is as if the line were not there.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tensorcast.profiles.sourced import Frozen

Size = Annotated[int, Field(ge=0)] | str
Flag = bool | str


class Layers(Frozen):
    """Layers that a part stands in, counted from 0; one of the ways to say so."""

    below: Size | None = Field(default=None, description="all layers before this one")
    since: Size | None = Field(default=None, description="this one and all behind it; of a list of layers its last")
    listed: str | None = Field(default=None, description="field that lists the layers' numbers, or says one")
    counted_from: int = Field(default=0, description="number that such a list gives the first layer")
    every: Size | None = Field(default=None, description="each layer whose number is `at`, divided by this one")
    at: Size = 0
    types: str | None = Field(default=None, description="field with a word for every layer")
    word: str | int | None = Field(default=None, description="the layers' word there")

    @model_validator(mode="after")
    def _one_way(self) -> "Layers":
        said = [name for name in ("below", "since", "listed", "every", "types") if getattr(self, name) is not None]
        if len(said) != 1:
            known = "below, since, listed, every, types"
            raise ValueError(f"says {' and '.join(said) or 'nothing'}: must say one of {known}")
        if (self.types is None) != (self.word is None):
            raise ValueError("types and word: must be said together")
        return self


class Part(Frozen):
    """A kind of attention or of feed-forward part, and its layers; without them: those that no part before has."""

    layers: Layers | None = None


class FullAttention(Part):
    """Softmax attention with keys and values of heads, over all tokens or a window of them."""

    kind: Literal["attention"]
    num_heads: Size
    num_kv_heads: Size
    head_dim: Size
    window: Size = Field(default=0, description="tokens that a query sees; 0: all before it")
    q_lora_rank: Size = Field(default=0, description="width of a normed latent that queries are made of; 0: none")
    rotary_dim: Size = Field(default=0, description="numbers of a head that carry its position")
    qk_norm: Flag = Field(default=False, description="queries and keys are normed, head by head")
    output_gate: Flag = Field(default=False, description="a gate on every number that attention gives")
    head_gate: Flag = Field(default=False, description="a gate on every head")
    sinks: Flag = Field(default=False, description="a learned share of each head's softmax goes to no token")
    bias: Flag = False


class LatentAttention(Part):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): a latent is cached in the place of heads."""

    kind: Literal["mla"]
    num_heads: Size
    q_lora_rank: Size = 0
    kv_lora_rank: Size
    qk_nope_head_dim: Size
    qk_rope_head_dim: Size
    v_head_dim: Size
    rotary: Flag = Field(default=True, description="false: its positional part carries no position")
    output_gate: Flag = False


class SharedEntryAttention(Part):
    """Compressed sparse attention whose layers share entries (CSA2, DeepSeek-V4.1-Flash): one vector is key and value
    of all heads. A query sees a window of them, and entries of `ratio` tokens each that an indexer picks."""

    kind: Literal["csa2"]
    num_heads: Size
    head_dim: Size
    q_lora_rank: Size
    rotary_dim: Size
    window: Size
    o_groups: Size = Field(description="groups of heads, each of which is narrowed by itself")
    o_lora_rank: Size = Field(description="to so many numbers, before all make the output")
    ratio: Size = Field(default=0, description="tokens of an entry; 0: the window is all")
    entries: Layers | None = Field(default=None, description="layers that make entries, for all up to the next of them")
    indexers: Layers | None = Field(default=None, description="layers that pick entries, the same")
    index_heads: Size = 0
    index_head_dim: Size = 0
    index_topk: Size = Field(default=0, description="entries of a query")
    candidates: Layers | None = Field(
        default=None, description="the first picks blocks of entries, indexers behind it choose among these"
    )
    candidate_blocks: Size = 0
    candidate_block_size: Size = 0


class DeltaAttention(Part):
    """Kimi delta attention (arXiv 2510.26692): a delta rule whose state decays channel by channel."""

    kind: Literal["kda"]
    num_heads: Size
    head_dim: Size
    conv_kernel: Size
    full_rank_gate: Flag = Field(default=False, description="false: the output's gate goes through head_dim numbers")


Activation = Literal["silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "situ"]


class Mlp(Part):
    """A feed-forward part that every token passes."""

    kind: Literal["mlp"]
    intermediate_size: Size
    activation: Activation = "silu"


class Moe(Part):
    """Routed experts, gated each, and what runs beside and around them."""

    kind: Literal["moe"]
    num_experts: Size
    num_experts_per_tok: Size
    moe_intermediate_size: Size
    activation: Activation = "silu"
    scoring: Literal["softmax", "sigmoid", "sqrtsoftplus"] = "softmax"
    correction_bias: Flag = Field(default=False, description="a bias that the choice of experts sees, not their weight")
    norm_topk_prob: Flag = False
    n_group: Size = 0
    topk_group: Size = 0
    shared_expert_intermediate_size: Size = Field(default=0, description="of all shared experts together; 0: none")
    shared_expert_gate: Flag = False
    latent_size: Size = Field(default=0, description="width of a stream of the routed experts' own; 0: the model's")
    latent_norm: Flag = Field(default=False, description="of what they give, before it widens again")
    latent_quantized: Flag = Field(default=True, description="false: the projections around are bf16 in any checkpoint")


class AttentionResidual(Frozen):
    """Attention residuals (arXiv 2603.15031): each part reads a softmax over sums of blocks of layers before it."""

    kind: Literal["attention"]
    block_size: Size = Field(description="layers of a block; 0: plain sums")


class HyperConnections(Frozen):
    """Residual streams (manifold-constrained hyper-connections, arXiv 2512.24880), mixed around each part; a part reads
    the sum of them that the part before weighed, so that one product makes all weights (DeepSeek-V4.1-Flash)."""

    kind: Literal["hyper_connections"]
    streams: Size
    rounds: Size = Field(description="in which shares of streams in one another are made to add up")


class NgramTables(Frozen):
    """Tables of rows that hashes of the last tokens name, read into the streams of some layers (Engram, arXiv
    2601.07372): a row for each length of n-gram from two on and each head."""

    layers: Layers
    rows: str = Field(description="field that lists the rows of each layer's table")
    longest: Size = Field(description="tokens of the longest n-gram")
    heads: Size
    width: Size = Field(description="numbers of a row")


class PromptEnds(Frozen):
    """Layers that a reply needs the last tokens of its prompt from alone, but for the entries that they make."""

    layers: Layers
    tokens: Size


class Network(Frozen):
    """A decoder-only language model: an embedding, layers of attention and a feed-forward part, a head."""

    source: str = Field(min_length=3, description="what was read: release and file")
    hidden_size: Size
    vocab_size: Size
    num_layers: Size
    tie_word_embeddings: Flag = False
    post_norms: Flag = Field(default=False, description="what a part gives is normed, too, before it is added")
    residual: Annotated[AttentionResidual | HyperConnections, Field(discriminator="kind")] | None = None
    tables: NgramTables | None = None
    ends: PromptEnds | None = None
    attention: tuple[
        Annotated[
            FullAttention | LatentAttention | SharedEntryAttention | DeltaAttention, Field(discriminator="kind")
        ], ...
    ]
    ffn: tuple[Annotated[Mlp | Moe, Field(discriminator="kind")], ...]
