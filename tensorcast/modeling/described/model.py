"""A described network as a causal language model: embedding, layers, head, and what runs between the layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tensorcast.modeling.attention import every_token
from tensorcast.modeling.described.attention import FullAttention, LatentAttention, RMSNorm, Rotary, rotary
from tensorcast.modeling.described.config import DescribedConfig
from tensorcast.modeling.described.csa2 import Pass, SharedEntryAttention
from tensorcast.modeling.described.ffn import Mlp, Moe, activation
from tensorcast.modeling.described.recurrent import DeltaAttention
from tensorcast.modeling.described.streams import Ngrams, StreamMix, collapsed, expanded

ATTENTION: dict[str, type[nn.Module]] = {
    "attention": FullAttention, "mla": LatentAttention, "csa2": SharedEntryAttention, "kda": DeltaAttention,
}  # fmt: skip
FFN: dict[str, type[nn.Module]] = {"mlp": Mlp, "moe": Moe}


class ResidualAttention(nn.Module):
    """A softmax over the sums of blocks of layers and the sum since, by the score of each: a part's input.

    One kernel in engines (vLLM 0.33.0, models/kimi_k3/nvidia/ops/attn_res.py), so it is made of sums alone.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = RMSNorm(hidden)
        self.query = nn.Parameter(torch.zeros(hidden))

    def forward(self, blocks: Tensor, since: Tensor) -> Tensor:
        """``blocks [B,S,n,H]``, ``since [B,S,H]`` -> ``[B,S,H]``."""
        if not blocks.shape[2]:
            return since
        sources = torch.cat((blocks, since.unsqueeze(2)), dim=2)
        weights = (self.norm(sources) * self.query).float().sum(-1, keepdim=True).softmax(2)
        return (weights * sources.float()).sum(2).to(since.dtype)


class Layer(nn.Module):
    """Attention and a feed-forward part, each on a norm of the stream."""

    def __init__(self, config: DescribedConfig, index: int) -> None:
        super().__init__()
        hidden, (attention, ffn) = config.hidden_size, (config.attention[index], config.ffn[index])
        takes = {**ffn.takes, "activation": activation(ffn.takes["activation"])}
        self.self_attn = ATTENTION[attention.kind](config, index, **attention.takes)
        self.mlp = FFN[ffn.kind](hidden, **takes)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(hidden), RMSNorm(hidden)
        post = bool(config.post_norms)
        self.attention_norm, self.ffn_norm = (RMSNorm(hidden) if post else nn.Identity() for _ in range(2))
        self.opens = bool(config.block_size) and index % config.block_size == 0
        if config.block_size:
            self.self_attention_res, self.mlp_res = ResidualAttention(hidden), ResidualAttention(hidden)

    def forward(self, since: Tensor, blocks: Tensor | None, position: Rotary | None, cache: Any) -> Any:
        """The stream ``[B,S,H]``, or with sums of blocks ``[B,S,n,H]`` the sum since the last -> both, one layer on."""
        read = since if blocks is None else self.self_attention_res(blocks, since)
        added = self.attention_norm(self.self_attn(self.input_layernorm(read), position, cache))
        if blocks is not None and self.opens:
            blocks, since = torch.cat((blocks, since.unsqueeze(2)), dim=2), added
        else:
            since = since + added
        read = since if blocks is None else self.mlp_res(blocks, since)
        return since + self.ffn_norm(self.mlp(self.post_attention_layernorm(read))), blocks


class StreamLayer(nn.Module):
    """Attention and a feed-forward part, between which a token's streams are mixed.

    ``ends``: the tokens of a prompt's end that the layer is needed for, 0: for all. The first such layer is traced as
    engines run it: what it caches is made of all tokens, and the layer itself then runs on ends.
    """

    def __init__(self, config: DescribedConfig, index: int) -> None:
        super().__init__()
        hidden, (attention, ffn) = config.hidden_size, (config.attention[index], config.ffn[index])
        takes = {**ffn.takes, "activation": activation(ffn.takes["activation"])}
        self.self_attn = SharedEntryAttention(config, index, **attention.takes)
        self.mlp = FFN[ffn.kind](hidden, **takes)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(hidden), RMSNorm(hidden)
        self.attention_mix, self.mlp_mix = (StreamMix(hidden, config.streams, config.rounds) for _ in range(2))
        tables = config.tables.get(index)
        self.ngrams = None if tables is None else Ngrams(hidden, config.streams, **tables)
        self.ends = config.ends_tokens if index >= config.ends_from else 0
        self.first_of_ends = bool(self.ends) and index == config.ends_from

    def forward(self, streams: Tensor, read: Tensor, shared: Pass) -> tuple[Tensor, Tensor]:
        """Streams ``[B,S,n,H]`` and the weights ``[B,S,n]`` of their sum that is read -> both, one layer on."""
        if self.ngrams is not None:
            streams = self.ngrams(streams, self.ngrams.places(shared.tokens, shared.cache))
        apart = self.first_of_ends and streams.is_meta and streams.shape[1] > 1
        if apart:
            with every_token():
                self.attention_mix(streams)
                hidden = self.input_layernorm(collapsed(streams, read))
                self.self_attn.q_a_proj(hidden)  # one kernel makes them together
                self.self_attn.window_keys(hidden, shared)
                if self.self_attn.compressor is not None:
                    self.self_attn.make_entries(hidden, shared)
        then, shares, among = self.attention_mix(streams)
        hidden = self.input_layernorm(collapsed(streams, read))
        added = self.self_attn(hidden, shared, writes=not apart)
        streams = expanded(added, streams, shares, among)
        read, shares, among = self.mlp_mix(streams)
        added = self.mlp(self.post_attention_layernorm(collapsed(streams, then)))
        return expanded(added, streams, shares, among), read


class Decoder(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, config: DescribedConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        kind = StreamLayer if config.streams else Layer
        self.layers = nn.ModuleList(kind(config, i) for i in range(config.num_hidden_layers))
        self.output_res = ResidualAttention(config.hidden_size) if config.block_size else None
        self.norm = RMSNorm(config.hidden_size)
        self.rotary_dim = max(map(_rotary_dim, config.attention), default=0)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None, cache: Any) -> Tensor:
        """``[B,S]`` token ids -> ``[B,S,H]``."""
        since = self.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        position = rotary(position_ids, self.rotary_dim) if self.rotary_dim else None
        if self.config.streams:
            assert position is not None
            return self.norm(self._in_streams(since, Pass(input_ids, position_ids, position, cache)))
        blocks = None if self.output_res is None else since.new_empty((*since.shape[:2], 0, since.shape[2]))
        for layer in self.layers:
            since, blocks = layer(since, blocks, position, cache)
        return self.norm(since if self.output_res is None else self.output_res(blocks, since))

    def _in_streams(self, since: Tensor, shared: Pass) -> Tensor:
        streams = since.unsqueeze(2).repeat(1, 1, self.config.streams, 1)
        read = torch.zeros_like(streams[..., 0], dtype=torch.float32)
        read[..., 0] = 1.0  # all are the same yet
        for layer in self.layers:
            streams, read = layer(streams, read, shared)
        return collapsed(streams, read)


def _rotary_dim(part: Any) -> int:
    if part.kind == "mla":
        return int(part.takes["qk_rope_head_dim"]) if part.takes["rotary"] else 0
    return int(part.takes.get("rotary_dim", 0))


class DescribedLM(nn.Module):
    """The language model that a profile describes, called as transformers' are."""

    _no_split_modules = ("Layer", "StreamLayer")

    def __init__(self, config: DescribedConfig, attention: str = "sdpa") -> None:
        super().__init__()
        config._attn_implementation = attention
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def set_attn_implementation(self, name: str) -> None:
        """Attention by the function that transformers knows by this name."""
        self.config._attn_implementation = name

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, past_key_values: Any = None,
        use_cache: bool = True, logits_to_keep: int = 0,
    ) -> Tensor:  # fmt: skip
        """``[B,S]`` token ids -> logits of the last ``logits_to_keep`` positions (0: of all)."""
        hidden = self.model(input_ids, position_ids, past_key_values)
        return self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
