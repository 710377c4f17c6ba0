"""How an engine puts requests into steps: who is let in, in which order, and what is kept for the next one."""

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field

from tensorcast.profiles.memory import MIB
from tensorcast.profiles.sourced import Frozen, Number


class ExpectedReply(Frozen):
    """A request is let in if the cache has room for what running ones are still expected to write: so large a share of
    what they may write at most, ``first`` at the start and after every pause, falling to ``least`` in ``steps`` decode
    steps. Who was refused so is asked again when a running sequence has left."""

    first: Number = Field(gt=0, le=1)
    least: Number = Field(gt=0, le=1)
    steps: int = Field(ge=1)
    most_tokens: int = Field(ge=1, description="tokens of one reply that are expected at most")
    spare_steps: int = Field(
        ge=0, description="where a sequence starts over: the share is what the others wrote, and would in so many steps"
    )
    fixed_whole: bool = Field(default=False, description="all of a reply whose length is fixed (ignore_eos)")
    rank_factor: Number = Field(
        default=1.0, gt=0, le=1, description="shares are so many times as large where ranks are data-parallel"
    )
    windows_ask_again: bool = Field(
        default=False, description="whether layers with windows have a cache of their own, and each step asks again"
    )

    def of_ranks(self, ranks: int) -> "ExpectedReply":
        """The same of one of so many data-parallel ranks."""
        factor = float(self.rank_factor) if ranks > 1 else 1.0
        return self.model_copy(update={"first": factor * float(self.first), "least": factor * float(self.least)})

    @property
    def falls(self) -> float:
        """By how much the share falls in a decode step, until it is the least."""
        return (self.first - self.least) / self.steps


class RoomFirst(Frozen):
    """In two pools a request takes room of the server that will write before its prompt is read by the other."""

    reserved_tokens: int = Field(ge=0, description="tokens left for each reply that is written or has room")
    few_sequences: int = Field(default=0, ge=0, description="where no more may run than that")
    few_times: int = Field(default=0, ge=0, description="so many times as many more may have room")
    source: str = Field(min_length=3)

    def most(self, sequences: int) -> int:
        """Who may run or have room on a rank that runs ``sequences`` at most."""
        return sequences * (1 + self.few_times * (sequences <= self.few_sequences))


class MicroBatches(Frozen):
    """How batches follow one another where there are pipeline stages: as many are in flight as stages, and each is
    composed when the oldest one is back, of sequences whose tokens are and of prompts, also of the next chunk of one of
    which a batch in flight has the last."""

    wait_turns: Number = Field(
        default=1.0, ge=0, description="turns of a stage that pass before the batch that a new request rides in"
    )
    source: str = Field(min_length=3)


class Scheduler(Frozen):
    """Rules of a scheduler that no other field of an engine profile tells."""

    most_sequences: dict[int, int] = Field(description="device memory in MiB -> sequences of a step, from there on")
    drafting_sequences: int | None = Field(
        default=None, ge=1, description="the same of a server whose steps draft, over all its data-parallel ranks"
    )
    own_sequences: dict[str, int] = Field(
        default={}, description="class of a network -> the same of a server that runs it, drafts or not"
    )
    block_tokens: int = Field(ge=1, description="tokens of a block of the cache")
    held_steps: int = Field(default=1, ge=1, description="steps whose new tokens a window may keep beside its own")
    splits_prompts: bool = Field(default=True, description="whether a prompt may be read in several steps")
    admits_chunks: bool = Field(default=False, description="whether room for a prompt's first chunk lets it in")
    prompt_tokens: int | None = Field(default=None, ge=1, description="new tokens of a step's prompts that end in it")
    expected_reply: ExpectedReply | None = None
    prefix_cache: bool = Field(default=True, description="whether blocks of prompts are kept for those that follow")
    blocks_found: Literal["scheduled", "chunk", "prompt"] = Field(
        default="prompt", description="when they are: as the step that reads them is composed, is done, or their prompt"
    )
    waits_for_blocks: bool = Field(
        default=False, description="whether who begins as a prompt that is being read waits for its blocks"
    )
    rank_choice: Literal["round_robin", "least_requests"] = Field(
        default="least_requests", description="which data-parallel rank a request goes to"
    )
    queue_weight: Number = Field(
        default=0.0, ge=0, description="as many requests more one that waits counts there where they are told apart so"
    )
    queue_from_used: Number = Field(
        default=0.0, ge=0, lt=1, description="share of its cache from which on, by what is used beyond; 0: always"
    )
    room_first: RoomFirst | None = None
    drafting_ranks_wait: bool = Field(
        default=False, description="where steps draft, data-parallel ranks write nothing while others read"
    )
    prompts_wait: bool = Field(default=False, description="whether prompts can be told to wait for others")
    micro_batches: MicroBatches | None = Field(default=None, description="with pipeline stages; none: as without")
    source: str = Field(min_length=3)

    def ranks_wait(self, drafts: Any) -> Any:
        """Whether data-parallel ranks write nothing while others read, with so many ``drafts`` per step (or arrays)."""
        return (drafts > 0) & self.drafting_ranks_wait

    def sequences(
        self, memory_bytes: float, ranks: int = 1, *, drafts: bool = False, classes: Iterable[str] = ()
    ) -> int:
        """Sequences of a step per data-parallel rank, of so many, on a device of so much memory, unasked; of a network
        of these ``classes``."""
        fitting = [count for size, count in self.most_sequences.items() if memory_bytes >= size * MIB]
        most = max(fitting, default=min(self.most_sequences.values()))
        own = next((self.own_sequences[one] for one in classes if one in self.own_sequences), None)
        told = self.drafting_sequences if own is None and drafts else own
        return most if told is None else max(1, told // ranks)


class PromptEnds(Frozen):
    """Prefill steps that run the layers which a model needs for the ends of prompts alone on these: not where ranks
    slice tokens. Where ``exchanges`` are named, data-parallel ranks do so with these alone, if each has all heads."""

    graphs_from: int = Field(default=0, ge=0, description="tokens of a step in a graph from which on it does")
    exchanges: tuple[str, ...] = Field(default=(), description="none: with any")
    source: str = Field(min_length=3)

    def above(self, graph_tokens: float, *, tp: int, dp: int, exchange: str, sliced: bool) -> float | None:
        """Tokens of the largest step that runs whole, where graphs have up to ``graph_tokens``; None: all do."""
        if sliced or (dp > 1 and self.exchanges and (tp > 1 or exchange not in self.exchanges)):
            return None
        return float(min(graph_tokens, max(self.graphs_from - 1, 0)))


class SerialDrafts(Frozen):
    """Drafts for which the engine's scheduler works no step ahead: the GPU waits while the host accepts tokens, hands
    them on and plans the next step."""

    methods: tuple[str, ...] = Field(min_length=1, description="what drafts so unasked")
    overlapping: tuple[str, ...] = Field(default=(), description="model classes whose drafts overlap all the same")
    step_s: Number = Field(ge=0, description="what a step takes longer")
    sequence_s: Number = Field(ge=0, description="the same, per sequence in the batch")
    source: str = Field(min_length=3)


class SerialPipeline(Frozen):
    """A scheduler that works no step ahead where there are pipeline stages: once in a round of its micro-batches the
    first stage waits while the host reads what the last one sampled and plans the next step."""

    step_s: Number = Field(ge=0, description="what a round takes longer")
    drafts_wait: bool = Field(default=False, description="a step that checks drafts is launched after the oldest one's "
                              "tokens are read, so that a stage runs one micro-batch less in a round")  # fmt: skip
    drafts_in_pools: bool = Field(default=True, description="whether servers of replies alone draft in a pipeline")
    source: str = Field(min_length=3)
