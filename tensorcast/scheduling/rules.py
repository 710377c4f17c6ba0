"""What a server's scheduler goes by: an engine's rules and a deployment's sizes, as plain numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from tensorcast.deploy.deployment import Deployment
from tensorcast.deploy.engine_log import LONG, cache_log
from tensorcast.deploy.layout import attention_dp
from tensorcast.errors import InputError
from tensorcast.profiles.drafting import acceptance
from tensorcast.profiles.memory import Kept
from tensorcast.profiles.scheduler import ExpectedReply, RoomFirst
from tensorcast.serving.capacity import own_chunk


def read_graph_sizes(said: str, name: str = "--graph-sizes") -> tuple[int, ...]:
    """Batches of captured graphs as they are written: ``1, 2, 4``, with or without brackets and commas."""
    if re.fullmatch(r"[\s\d,\[\]()]*", said) is None:
        raise InputError(f"{name} {said!r}: must be whole numbers of sequences, as 1,2,4,8")
    return tuple(map(int, re.findall(r"\d+", said)))


Role = Literal["both", "prefill", "decode"]


@dataclass(frozen=True, kw_only=True)
class Waits:
    """Steps that prompts wait for others while replies are written, as TensorRT-LLM can be told (1.1.0 to 1.3.0,
    _torch/pyexecutor/py_executor.py: ``_balance_adp_requests``, ``_waiting_requests``). None unless asked for.

    ``balance_steps``: at most, until every data-parallel rank has a prompt (``attention_dp_config.timeout_iters``);
    ``batching_steps``: from then on (``batching_wait_iters``). Of a server of one rank, ``batch_wait_steps``: at most
    (``batch_wait_timeout_iters``), until a step would hold ``batch_wait_share`` of the tokens that it may
    (``batch_wait_max_tokens_ratio``).
    """

    balance_steps: int = 0
    batching_steps: int = 0
    batch_wait_steps: int = 0
    batch_wait_share: float = 0.9

    def __post_init__(self) -> None:
        for name in ("balance_steps", "batching_steps", "batch_wait_steps"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} {getattr(self, name)}: must be a number of steps, 0 or more")
        if not 0 <= self.batch_wait_share <= 1:
            raise InputError(f"batch_wait_share {self.batch_wait_share:g}: must be a share from 0 to 1")

    @property
    def asked(self) -> str:
        """What is asked for, in words; empty for nothing."""
        said = {name: getattr(self, name) for name in ("balance_steps", "batching_steps", "batch_wait_steps")}
        return ", ".join(f"{name} {steps}" for name, steps in said.items() if steps)

    def any(self, ranks: int) -> bool:
        """Whether prompts of a server of so many data-parallel ranks wait for others at all."""
        return (self.balance_steps if ranks > 1 else self.batch_wait_steps if ranks else 0) > 0


NO_WAITS = Waits()
"""Prompts are let in as they come."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Of one server; sizes are per data-parallel rank.

    ``role``: whether it reads prompts, writes replies, or both. ``alone``: prompts run in steps without decoding
    sequences. ``chunk_tokens``: new tokens of a step; ``splits``: a prompt may be read in several steps;
    ``prompt_tokens``: new tokens of one step's whole prompts. ``cache_tokens``: tokens that the cache holds, in
    blocks of ``block_tokens``; ``state_tokens``: of how many a sequence's recurrent states take the room.
    ``reserves_reply``: a request is let in only with room for its whole reply. ``tokens_per_step``: tokens that a
    decode step brings to a sequence in the mean, more than 1 with drafts; it checks ``verify``. ``lag``: steps that
    are composed ahead of what is seen. ``look_steps``: decode steps from one look for requests to the next; steps with
    prompts are followed by one. ``waits``: for which others prompts wait. ``first_token_s``: per request
    outside the GPU, before it is seen, and ``prompt_token_s`` per token of its prompt. ``longest``: tokens of the
    longest request that is served. ``asks_again``: who was refused as replies are expected to take the room is asked
    again in each step, not once a sequence has left. ``blocks_found``: from when on others find a prompt's blocks;
    ``waits_for_blocks``: who would find those that are being read waits for them, and others go first.
    ``ranks_wait``: no rank writes in a step in which another reads. ``queue_weight``: as so many more who waits counts
    in the choice of a rank, from ``queue_from_used`` of its cache. ``room_first``: in two pools room of the server that
    writes is taken before the prompt is read. ``graph_sizes``: sequences that decode steps are padded to, where that is
    stated. ``admits_chunks``: a prompt is let in with room for its first chunk, and each later one takes its own.
    ``stages``: of a pipeline, in which as many steps are under way; ``lag`` and ``look_steps`` count its turns.
    """

    role: Role
    ranks: int
    alone: bool
    chunk_tokens: int
    splits: bool
    prompt_tokens: int | None
    most_sequences: int
    cache_tokens: float
    block_tokens: int
    reserves_reply: bool
    expected: ExpectedReply | None
    tokens_per_step: float
    verify: float
    lag: int
    waits: Waits
    first_token_s: float
    prompt_token_s: float
    prefix_cache: bool
    longest: int
    round_robin: bool
    asks_again: bool = False
    blocks_found: str = "prompt"
    waits_for_blocks: bool = False
    ranks_wait: bool = False
    queue_weight: float = 0.0
    queue_from_used: float = 0.0
    room_first: RoomFirst | None = None
    graph_sizes: tuple[int, ...] = ()
    state_tokens: float = 0.0
    admits_chunks: bool = False
    look_steps: int = 1
    stages: int = 1

    @cached_property
    def most_tokens(self) -> float:
        """Prompt and reply of the longest request that a server takes."""
        return min(self.cache_tokens - self.waste, self.longest)

    @cached_property
    def waste(self) -> float:
        """Tokens that a sequence takes the room of beside its own: what it does not fill of its last block, in the
        mean, and its states."""
        return (self.block_tokens - 1) / 2 + self.state_tokens


def rules_of(
    deployment: Deployment, role: Role, *, mtp_acceptance: float | str = 0.8, chunk_tokens: int | None = None,
    max_sequences: int | None = None, look_steps: float = 1.0, waits: Waits = NO_WAITS,
    cache_tokens: float | None = None, longest: int = 1 << 40, graph_sizes: Sequence[int] = (),
) -> Rules:
    """Rules of a server of ``deployment``, whose phase is decode unless it only reads prompts. What is not given is as
    the engine sets it; the cache has the room that its memory settings leave. Raises :class:`InputError` if none."""
    engine, layout = deployment.engine, deployment.layout
    scheduler = engine.scheduler
    if scheduler is None:
        raise InputError(f"--engine {engine.name}: its profile has no scheduler; one with `scheduler:` is needed")
    if waits.asked and not scheduler.prompts_wait:
        raise InputError(f"{waits.asked}: under {engine.name} prompts cannot be told to wait; TensorRT-LLM has that")
    least = min(graph_sizes, default=None)
    stated = ("--prefill-chunk", chunk_tokens), ("--max-sequences", max_sequences), ("--graph-sizes", least)
    for name, value in stated:
        if value is not None and value < 1:
            raise InputError(f"{name} {value}: must be at least 1")
    depth = deployment.options.mtp_depth
    if isinstance(mtp_acceptance, str):
        mtp_acceptance = acceptance(mtp_acceptance, deployment.model.name, deployment.options.speculative_method)
    if not 0 <= mtp_acceptance <= 1:
        raise InputError(f"--mtp-acceptance {mtp_acceptance:g}: must be a chance from 0 to 1")
    log = cache_log(deployment, LONG)
    if cache_tokens is None:
        cache_tokens = float(log.tokens if log.room is None else log.room)
    states = math.inf if log.sequences is None else log.sequences
    kept = engine.cache_rules.kept(deployment.model.config, depth) if engine.cache_rules else Kept()
    windows_apart = kept.window_share is not None and kept.window_share < 1
    if cache_tokens < scheduler.block_tokens or states < 1:
        raise InputError(f"layout {layout}: {deployment.model.name} leaves no room for a cache")
    ranks = int(attention_dp(layout, deployment.raw.facts.num_experts))
    piped = scheduler.micro_batches if layout.pp > 1 else None
    if piped and engine.prefill_alone and scheduler.admits_chunks:
        raise InputError(f"--engine {engine.name}: in stages, prompts that run alone cannot be let in by their chunks")
    return Rules(
        role=role,
        ranks=ranks,
        alone=engine.prefill_alone,
        chunk_tokens=chunk_tokens or own_chunk(deployment),
        splits=scheduler.splits_prompts,
        prompt_tokens=scheduler.prompt_tokens,
        most_sequences=int(min(max_sequences or deployment.unasked_sequences, deployment.most_sequences, states)),
        cache_tokens=cache_tokens,
        block_tokens=scheduler.block_tokens,
        reserves_reply=engine.reserves_reply,
        expected=scheduler.expected_reply.of_ranks(ranks) if scheduler.expected_reply else None,
        tokens_per_step=sum(mtp_acceptance**i for i in range(depth + 1)),
        verify=1.0 + depth,
        lag=max(0, round((engine.arrival_wait_steps if piped is None else piped.wait_turns) - 1)),
        stages=layout.pp,
        look_steps=1 if role == "prefill" else max(1, round(look_steps)),
        waits=waits,
        first_token_s=engine.first_token_s(0),
        prompt_token_s=engine.first_token_s(1) - engine.first_token_s(0),
        prefix_cache=scheduler.prefix_cache,
        longest=longest,
        round_robin=scheduler.rank_choice == "round_robin",
        asks_again=bool(scheduler.expected_reply and scheduler.expected_reply.windows_ask_again and windows_apart),
        blocks_found=scheduler.blocks_found,
        waits_for_blocks=scheduler.waits_for_blocks,
        ranks_wait=scheduler.ranks_wait(depth),
        queue_weight=float(scheduler.queue_weight),
        queue_from_used=float(scheduler.queue_from_used),
        room_first=scheduler.room_first if role == "decode" else None,
        graph_sizes=tuple(sorted({int(size) for size in graph_sizes})),
        state_tokens=log.state_tokens,
        admits_chunks=scheduler.admits_chunks,
    )
