"""What an engine sets by device and layout unless told: memory it leaves free, tokens per step, prefill graphs."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from pydantic import Field

from tensorcast.profiles.config_values import is_one_of, text_of
from tensorcast.profiles.sourced import Frozen, Number

MIB = float(1 << 20)

MemoryCovers = Literal[
    "everything",  # the share holds weights, cache, activations and graphs (vLLM)
    "weights_and_cache",  # the rest of the device is for activations and graphs (SGLang)
    "cache",  # a share of what weights, activations and graphs leave (TensorRT-LLM)
]


VISION_DEPTHS = ("num_hidden_layers", "depth", "vt_num_hidden_layers")
VISION_WIDTHS = ("hidden_size", "vt_hidden_size")


class VisionReserve(Frozen):
    """What a model that also sees leaves of an engine's share: ``factor``, less ``slope`` for each tower of 24 layers
    of width 1024 that its own is larger than one; ``least`` and ``most`` bound that second factor."""

    factor: Number = Field(gt=0)
    slope: Number = Field(ge=0)
    least: Number = Field(gt=0)
    most: Number = Field(gt=0)
    not_architectures: tuple[str, ...] = Field(default=(), description="classes that see only if told to")
    unread: tuple[str, ...] = Field(default=(), description="classes whose tower it takes for one of the usual size")
    source: str = Field(min_length=3)

    def share(self, config: dict[str, Any]) -> float:
        """What the share is multiplied by; 1 for a model of text alone."""
        vision, names = config.get("vision_config"), set(config.get("architectures") or ())
        if vision is None or set(self.not_architectures) & names:
            return 1.0
        if set(self.unread) & names:
            vision = {}
        depth, width = (
            next((vision[name] for name in spelled if name in vision), usual)
            for spelled, usual in ((VISION_DEPTHS, 24), (VISION_WIDTHS, 1024))
        )
        towers = depth * width**2 / (24 * 1024**2)
        less = 1.0 - float(self.slope) * (towers - 1.0)
        return float(self.factor) * min(max(less, float(self.least)), float(self.most))


class Reserve(Frozen):
    """What an engine leaves free for activations and captured graphs: a sum of terms in MiB, at least ``floor_mib``."""

    constant_mib: Number = Field(ge=0)
    token_mib: Number = Field(ge=0, description="per token of a server's step, as the engine sets it")
    rank_mib: Number = Field(default=0.0, ge=0, description="per rank of the server")
    sequence_mib: Number = Field(default=0.0, ge=0, description="per sequence of the largest captured decode step")
    dp_sequence_mib: Number = Field(default=0.0, ge=0, description="the same times dp, under data-parallel attention")
    many_sequences: int = Field(default=0, ge=0, description="captured steps beyond it take `dp_many_mib` more")
    dp_many_mib: Number = Field(default=0.0, ge=0, description="per sequence, times dp")
    prefill_graph_mib: Number = Field(default=0.0, ge=0, description="per captured size of a prefill step")
    latent_prefill_graphs_mib: Number = Field(default=0.0, ge=0, description="instead, for all, if attention is MLA")
    least_tokens: int = Field(default=0, ge=0, description="tokens that are counted at least")
    exchange_mib: Number = Field(default=0.0, ge=0, description="more of servers that decode with DeepEP")
    exchange_prefill_graphs_mib: Number = Field(default=0.0, ge=0, description="more where prefill graphs hold it")
    by_role: bool = Field(
        default=False, description="whether a server counts the terms of what it runs alone: its phase, its graphs"
    )
    pooled: bool = Field(default=False, description="whether this is such a server's")
    floor_mib: Number = Field(default=0.0, ge=0)
    floor_above_mib: Number = Field(default=0.0, ge=0, description="device memory above which the floor holds")
    vision: VisionReserve | None = Field(default=None, description="more, of models that also see")
    source: str = Field(min_length=3)

    def fixed_bytes(
        self, capacity: float, tokens: Any, ranks: Any, prefill_graphs: int, latent: bool, *, phase: str = "",
        exchange: bool = False, grown: Any = 0.0,
    ) -> Any:
        """Terms that the batch does not change. ``prefill_graphs``: sizes of prefill steps that are captured.

        ``phase``: what a pooled server runs; ``exchange``: whether experts' tokens travel by DeepEP; ``grown``: bytes
        that the batch takes beside, if it is known.
        """
        decodes = self.pooled and phase == "decode"
        graphs = self.latent_prefill_graphs_mib if latent else self.prefill_graph_mib * prefill_graphs
        graphs += self.exchange_prefill_graphs_mib * exchange
        counted = self.least_tokens if decodes else np.maximum(tokens, self.least_tokens)
        fixed = self.constant_mib + self.token_mib * counted + self.rank_mib * ranks
        fixed = fixed + graphs * (prefill_graphs > 0 and not decodes) + grown / MIB
        buffers = self.exchange_mib * (exchange and (decodes or not self.pooled))
        return MIB * (np.maximum(fixed, self.floor_mib if capacity > self.floor_above_mib * MIB else 0.0) + buffers)

    def without_graphs(self) -> "Reserve":
        """Of a server that captures no decode steps."""
        return self.model_copy(update={"sequence_mib": 0.0, "exchange_mib": 0.0}) if self.by_role else self

    def graph_bytes(self, sequences: Any, dp: Any, verify: Any = 1.0, *, spare: Any = 0.0) -> Any:
        """Terms of decode steps of up to ``sequences`` per data-parallel rank; ``dp`` is of attention.

        A pooled server counts the tokens that its sequences decode at once (``verify`` each), too. ``spare``: bytes of
        its floor that its other terms do not fill.
        """
        many = np.asarray(sequences) > self.many_sequences
        per_dp = np.where(np.asarray(dp) > 1, self.dp_sequence_mib + self.dp_many_mib * many, 0.0)
        grown = MIB * sequences * (self.sequence_mib + per_dp * dp)
        if not self.pooled:
            return grown
        tokens = np.maximum(sequences * dp * verify - self.least_tokens, 0.0)
        return np.maximum(grown + MIB * self.token_mib * tokens - spare, 0.0)

    def spare_bytes(self, capacity: float, ranks: Any) -> Any:
        """What the floor of a pooled server that decodes has beyond the terms that its batch does not change."""
        fixed = self.constant_mib + self.token_mib * self.least_tokens + self.rank_mib * ranks
        return MIB * np.maximum((self.floor_mib if capacity > self.floor_above_mib * MIB else 0.0) - fixed, 0.0)


class StepTokens(Frozen):
    """Tokens that an engine takes per step unasked, where that is not ``max_tokens_per_step``."""

    from_mib: dict[int, int] = Field(default={}, description="device memory in MiB -> tokens from there on")
    devices: dict[str, int] = Field(default={}, description="word in the device's name -> tokens")
    exchanges: dict[str, int] = Field(default={}, description="exchange between experts -> tokens at most")
    buffered: dict[str, int] = Field(default={}, description="exchange -> tokens that a rank's buffers hold unasked")
    over_dp: bool = Field(default=False, description="of a server: data-parallel attention divides them over its ranks")
    source: str = Field(min_length=3)


class ProfiledStep(Frozen):
    """The largest step, which an engine runs as it starts, before it gives what is left to the cache."""

    sequences: dict[int, int] = Field(description="device memory in MiB -> sequences that are sampled from there on")
    logit_bytes: Number = Field(ge=0, description="of each logit while it is sampled from, all copies")
    latent_tokens: int = Field(default=0, ge=0, description="of MLA, whose keys and values it makes room for at once")
    source: str = Field(min_length=3)


class Kept(NamedTuple):
    """What a running sequence takes of a cache: slots of each of its states, and for each token of layers that see all
    so much of a token of layers with a window; None: what a window holds. ``states_apart``: size of the pool of states
    per size of the other, where an engine has two."""

    state_slots: float = 1.0
    window_share: float | None = None
    states_apart: float = 0.0


class CacheRules(Frozen):
    """How many states a running sequence has, and how large the cache of layers with windows is made."""

    state_slots: int = Field(default=1, ge=1, description="its own state and copies for prompts that begin alike")
    more_slots: int = Field(default=0, ge=0, description="slots more in the classes `buffered`")
    pipeline_slots: int = Field(default=0, ge=0, description="the same in a pipeline, whose schedule does not overlap")
    buffered: tuple[str, ...] = Field(default=(), description="classes whose schedule overlaps while copies are kept")
    serial_step_s: Number = Field(
        default=0.0, ge=0, description="what a step of others with states takes longer then, planned no step ahead"
    )
    verified_slots: int = Field(default=0, ge=0, description="slots more where tokens are drafted")
    draft_slots: int = Field(default=0, ge=0, description="slots more for each drafted token")
    states_apart: Number = Field(default=0.0, ge=0, description="size of a pool of states per size of that of tokens")
    drafts_apart: bool = Field(
        default=True, description="also where it drafts: else its pool is made for the requests that it is told"
    )
    window_share: Number | None = Field(
        default=None, gt=0, le=1, description="of layers with windows: tokens per token of the others; none: the window"
    )
    windowed: tuple[str, ...] = Field(default=(), description="the classes that have such a share; others keep all")
    own_shares: dict[str, Number] = Field(default={}, description="class -> its share; 0: the window")
    pools: bool = Field(default=True, description="also on servers of one phase, in disaggregated serving")
    pooled_windows: bool = Field(default=False, description="on those what is said of windows alone")
    source: str = Field(min_length=3)

    def in_pools(self) -> "CacheRules | None":
        """Of a server of one phase; none: its windows hold what they see, and a sequence has one state, in a pool that
        is made for the requests that it is told (--max-running-requests)."""
        if self.pools or not self.pooled_windows:
            return self if self.pools else None
        return CacheRules(
            window_share=self.window_share, windowed=self.windowed, own_shares=self.own_shares, source=self.source
        )

    def without_copies(self) -> "CacheRules":
        """Of a server that keeps no prompts' beginnings, nor copies of their states."""
        return self.model_copy(update={"state_slots": 1, "more_slots": 0, "drafts_apart": False})

    def serial_s(self, config: dict[str, Any]) -> float:
        """What each step takes longer of a model with this ``config``, which has states, unless in a pipeline."""
        overlaps = self.state_slots == 1 or bool({*self.buffered} & {*(config.get("architectures") or ())})
        return 0.0 if overlaps else float(self.serial_step_s)

    def kept(self, config: dict[str, Any], depth: int, stages: int = 1) -> Kept:
        """Of a model with this ``config`` that drafts ``depth`` tokens, in a pipeline of ``stages``."""
        classes = set(config.get("architectures") or ())
        more = self.more_slots if stages == 1 else self.pipeline_slots
        slots = self.state_slots + more * bool(classes & set(self.buffered))
        slots += (self.verified_slots + self.draft_slots * depth) if depth else 0
        share = self.window_share
        if share is not None:
            usual = float(share) if classes & set(self.windowed) else 1.0
            share = next((float(own) for name, own in self.own_shares.items() if name in classes), usual) or None
        return Kept(slots, share, float(self.states_apart) if self.drafts_apart or not depth else 0.0)


class StatePages(Frozen):
    """Pages of what is not compressed yet: tokens of a page, and how many of the last ones are kept."""

    tokens: int = Field(ge=1)
    window: int = Field(ge=1)


class PackedPages(Frozen):
    """A cache whose layers keep an entry for several tokens, in blocks that hold a page of every layer side by side.
    Groups of layers that keep other tokens each take blocks of their own, and whole ones."""

    block_tokens: int = Field(ge=1, description="tokens of a block of compressed entries")
    window_tokens: int = Field(ge=1, description="of a block of a window's entries")
    state_pages: dict[int, StatePages] = Field(description="tokens of an entry -> pages of those that have none yet")
    aligned_bytes: dict[Literal["fp8", "bf16"], int] = Field(description="a page's size is a multiple of it")
    whole_blocks: bool = Field(description="whether the log counts blocks; else their bytes")
    source: str = Field(min_length=3)


StateDtype = Literal["float32", "bfloat16", "float16"]
STATE_DTYPES: tuple[str, ...] = get_args(StateDtype)


class CacheDtype(Frozen):
    """What the engine keeps some networks' caches in unless it is asked for another dtype."""

    dtype: Literal["bf16", "fp8"]
    architectures: tuple[str, ...]
    devices: tuple[str, ...] = Field(default=(), description="architectures in lower case; all if none")
    indexed: bool = Field(default=False, description="only where an indexer chooses what attention reads")


def unasked_cache(rules: Sequence[CacheDtype], config: dict[str, Any], architecture: str, stored: str) -> str:
    """The dtype of a cache that nobody asked for: the first of an engine's ``rules`` that holds for a network on
    devices of an ``architecture``, else what the checkpoint says, ``stored``."""
    for one in rules:
        here = architecture.lower() in (one.devices or (architecture.lower(),))
        if here and is_one_of(one.architectures, config) and (not one.indexed or "index_topk" in text_of(config)):
            return one.dtype
    return stored


class StateRule(Frozen):
    """What an engine keeps recurrent states in (not those of short convolutions, which are as activations)."""

    unasked: StateDtype
    keys: tuple[str, ...] = Field(default=(), description="of a model's config that say it, first come first")
    readers: tuple[str, ...] = Field(default=(), description="the classes whose config is asked; none: all")
    own: dict[str, StateDtype] = Field(default={}, description="class -> its own where no key says it")
    source: str = Field(min_length=3)

    def dtype(self, config: dict[str, Any]) -> str:
        """Of a model with this ``config``; a value that the engine does not know is as if not said."""
        classes, text = set(config.get("architectures") or ()), text_of(config)
        if not self.readers or classes & set(self.readers):
            said = (part[key] for key in self.keys for part in (text, config) if key in part)
            for dtype in said:
                if dtype in STATE_DTYPES:
                    return str(dtype)
        return next((own for name, own in self.own.items() if name in classes), self.unasked)


class Unused(Frozen):
    """Model classes on architectures of devices."""

    architectures: tuple[str, ...]
    devices: tuple[str, ...]


class PrefillGraphs(Frozen):
    """Which prefill steps are replayed from captured graphs, between pieces of which attention runs eagerly."""

    max_tokens: int | None = Field(default=None, description="of a step; none: as many as a step may have")
    device_max_tokens: dict[str, int] = Field(default={}, description="architecture of devices -> tokens")
    class_max_tokens: dict[str, int] = Field(default={}, description="model class -> tokens, before all others")
    latent_max_tokens: int | None = Field(default=None, description="the same where attention is MLA")
    ranges: tuple[tuple[int, int | None, int], ...] = Field(description="first, last (none: the most), step of sizes")
    pools: bool = Field(default=True, description="also on servers of one phase, in disaggregated serving")
    drafting: bool = Field(default=True, description="also on servers that draft tokens")
    one_replica: bool = Field(default=False, description="not under data-parallel attention")
    one_stage: bool = Field(default=False, description="not with pipeline stages")
    text_only: bool = Field(default=False, description="not in models that also see or hear")
    seeing: tuple[str, ...] = Field(default=(), description="but in these model classes")
    vendors: tuple[str, ...] = ()
    not_architectures: tuple[str, ...] = Field(default=(), description="model classes that are never captured")
    exchanges: tuple[str, ...] | None = Field(
        default=None, description="with these exchanges between experts alone, and with none; not given: with any"
    )
    exchange_max_tokens: dict[str, int] = Field(default={}, description="exchange -> tokens of the largest")
    exchange_multiple: int = Field(default=1, ge=1, description="of which such an exchange's sizes are multiples")
    whole_steps: bool = Field(default=False, description="not where steps are halved (dual-batch overlap)")
    whole_contexts: bool = Field(default=False, description="not under decode context parallelism")
    whole_prompts: bool = Field(default=False, description="not under prefill context parallelism")
    placed_experts: bool = Field(default=False, description="not where experts are moved by their load")
    within_context: bool = Field(default=False, description="up to the length of sequences that a server is told")
    unused: Unused | None = Field(default=None, description="where they are left, their memory set aside all the same")
    source: str = Field(min_length=3)

    def count(self, largest: int, exchange: str = "") -> int:
        """How many sizes up to ``largest`` are captured."""
        multiple = 1
        if exchange in self.exchange_max_tokens:
            largest, multiple = self.exchange_max_tokens[exchange], self.exchange_multiple
        sizes = (range(first, min(last or largest, largest) + 1, step) for first, last, step in self.ranges)
        return len({-(-size // multiple) for of in sizes for size in of})

    def largest(self, most: int, device: str, classes: set[str], served: "Served", *, latent: bool) -> int:
        """Tokens of the largest captured step, of steps of ``most``, on a device's architecture, for a model of these
        ``classes``."""
        if self.within_context and served.context is not None:
            most = min(most, served.context)
        if served.exchange in self.exchange_max_tokens:
            return min(self.exchange_max_tokens[served.exchange], most)
        usual = self.device_max_tokens.get(device, self.max_tokens)
        own = [tokens for name, tokens in self.class_max_tokens.items() if name in classes]
        limit = own[0] if own else self.latent_max_tokens if self.latent_max_tokens and latent else usual
        return min(limit or most, most)

    def left(self, device: str, classes: set[str]) -> bool:
        """Whether a device's architecture runs them without for a model of these ``classes``."""
        rule = self.unused
        return rule is not None and device in rule.devices and bool(classes & set(rule.architectures))

    def run_with(self, served: "Served") -> bool:
        """Whether a server that is started so captures prompts."""
        return not (
            (self.whole_steps and served.halved) or (self.whole_contexts and served.dcp > 1)
            or (self.whole_prompts and served.pcp > 1) or (self.placed_experts and served.balanced)
            or (self.exchanges is not None and served.exchange not in ("", "none", *self.exchanges))
        )  # fmt: skip


class Served(NamedTuple):
    """What a server is started with that decides about its graphs: the exchange between experts, halved steps, context
    parallelism, experts moved by their load, the most tokens of a sequence (None: not told)."""

    exchange: str = ""
    halved: bool = False
    dcp: int = 1
    pcp: int = 1
    balanced: bool = False
    context: int | None = None


def is_latent(config: dict[str, Any]) -> bool:
    """Whether attention keeps a latent instead of keys and values (MLA), from the model's config."""
    return bool(text_of(config).get("kv_lora_rank"))
