"""What is asked of a deployment: requests with their arrivals, lengths and shared prefixes, read or drawn."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from tensorcast.errors import InputError
from tensorcast.serving.traffic import Array

Lengths = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Requests ``[N]`` in the order of their arrival.

    ``arrival_s``: seconds from the start, never falling. ``input_len``, ``output_len``: tokens of prompt and reply, 1
    at least. ``blocks``: ids of the prompt's blocks of ``block_tokens`` tokens each, with ``reply_blocks`` of its
    reply's behind them; prompts whose first ids agree begin alike. ``users``: most requests in flight; whoever comes
    beyond waits outside of the server, as clients of a benchmark do, and its clock starts when it is sent. With all
    arrivals at 0 that is a closed loop. ``after``: the earlier request whose reply a request waits for, -1 for none;
    it is sent ``think_s`` seconds after that, and not before its arrival. ``fixed``: replies run to the length that is
    asked for (``ignore_eos``), as clients of benchmarks have them; else they end by themselves. ``kept_len``: tokens of
    each prompt that the servers had read before the first of these was sent, and keep as far as they have room.
    """

    arrival_s: Array
    input_len: Lengths
    output_len: Lengths
    blocks: tuple[tuple[int, ...], ...] | None = field(default=None, repr=False)
    block_tokens: int = 512
    reply_blocks: bool = False
    users: int | None = None
    after: Lengths | None = None
    think_s: Array | None = None
    fixed: bool = True
    kept_len: Lengths | None = None

    def __post_init__(self) -> None:
        if not len(self.arrival_s):
            raise InputError("requests: there are none")
        for name in ("input_len", "output_len"):
            least = int(getattr(self, name).min())
            if least < 1:
                raise InputError(f"{name} = {least} of request {int(getattr(self, name).argmin())}: at least 1 token")
        if not np.all(np.isfinite(self.arrival_s)) or self.arrival_s[0] < 0 or np.any(np.diff(self.arrival_s) < 0):
            raise InputError("arrival_s: must be at least 0, finite, and never fall from request to request")
        if self.users is not None and self.users < 1:
            raise InputError(f"users = {self.users}: at least 1 request in flight")
        if self.after is not None and np.any(self.after >= np.arange(len(self))):
            raise InputError("after: a request can wait for an earlier one alone")
        if self.kept_len is not None and self.blocks is None:
            raise InputError("kept_len: is of prompts whose blocks are known")

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def rate(self) -> float:
        """Requests per second between the first arrival and the last; endless where all come at once."""
        seconds = float(self.arrival_s[-1] - self.arrival_s[0])
        return (len(self) - 1) / seconds if seconds > 0 else np.inf

    def scaled(self, *, rate: float = 1.0, input_len: float = 1.0, output_len: float = 1.0) -> Requests:
        """Requests that come ``rate`` times as fast, prompts and replies so many times as long; blocks stay as they
        are, cut where a prompt no longer reaches them."""
        for name, factor in (("rate", rate), ("input_len", input_len), ("output_len", output_len)):
            if not 0 < factor < np.inf:
                raise InputError(f"scale of {name} = {factor}: must be more than 0")
        longer = {
            name: np.maximum(np.rint(getattr(self, name) * factor).astype(np.int64), 1)
            for name, factor in (("input_len", input_len), ("output_len", output_len))
        }
        return replace(self, arrival_s=self.arrival_s / rate, **longer)

    def first(self, count: int) -> Requests:
        """The first ``count`` of them."""
        if count < 1:
            raise InputError(f"requests = {count}: at least 1")
        blocks = None if self.blocks is None else self.blocks[:count]
        names = ("arrival_s", "input_len", "output_len", "after", "think_s", "kept_len")
        arrays = {name: getattr(self, name)[:count] for name in names if getattr(self, name) is not None}
        return replace(self, **arrays, blocks=blocks)


@dataclass(frozen=True)
class Length:
    """Lengths to draw, tokens: all ``mean``; ``uniform`` between ``(1 - spread)`` and ``(1 + spread)`` times that; or
    ``lognormal`` with ``spread`` as standard deviation of the logarithm, ``mean`` their mean."""

    mean: float
    spread: float = 0.0
    law: str = "uniform"

    def __post_init__(self) -> None:
        if not 1 <= self.mean < np.inf:
            raise InputError(f"length {self.mean:g}: at least 1 token")
        if self.law not in ("uniform", "lognormal"):
            raise InputError(f"length law {self.law!r}: must be uniform or lognormal")
        if not 0 <= self.spread < (1 if self.law == "uniform" else np.inf):
            raise InputError(f"spread {self.spread:g}: must be at least 0, and less than 1 for uniform lengths")

    def draw(self, count: int, random: np.random.Generator) -> Lengths:
        """``count`` whole lengths, at least 1."""
        if self.law == "uniform":
            low, high = self.mean * (1 - self.spread), self.mean * (1 + self.spread)
            found = random.uniform(low, high, count)
        else:
            found = self.mean * np.exp(random.normal(-self.spread**2 / 2, self.spread, count))
        return np.maximum(np.rint(found), 1).astype(np.int64)


def drawn(
    count: int, input_len: Length, output_len: Length, *, rate: float | None = None, burstiness: float = 1.0,
    users: int | None = None, ramp_s: float = 0.0, seed: int = 0,
) -> Requests:
    """``count`` requests of drawn lengths.

    ``rate``: requests per second in the mean, gaps from a gamma law of shape ``burstiness`` (1: Poisson; less: in
    bursts; endless: evenly spaced, as ``vllm bench serve --burstiness`` has it); without it all come at once.
    ``ramp_s``: seconds in which the rate climbs from 0. ``users``: most in flight.
    """
    if count < 1:
        raise InputError(f"requests = {count}: at least 1")
    if rate is not None and not 0 < rate < np.inf:
        raise InputError(f"rate = {rate}: must be more than 0 requests per second")
    if not burstiness > 0:
        raise InputError(f"burstiness = {burstiness}: must be more than 0")
    if ramp_s < 0:
        raise InputError(f"ramp = {ramp_s}: must be at least 0 seconds")
    for name, value, unsaid in (("burstiness", burstiness, 1.0), ("ramp", ramp_s, 0.0)):
        if rate is None and value != unsaid:
            raise InputError(f"{name} = {value:g}: is of requests that come at a rate, and none is given")
    random = np.random.default_rng(seed)
    prompts, replies = input_len.draw(count, random), output_len.draw(count, random)
    arrival_s = np.zeros(count)
    if rate is not None:
        even = np.ones(count) if burstiness == np.inf else random.gamma(burstiness, 1 / burstiness, count)
        arrival_s = _ramped(np.cumsum(even) - even[0], rate, ramp_s)
    return Requests(arrival_s=arrival_s, input_len=prompts, output_len=replies, users=users)


def lengths_of(source: Requests, requests: Requests, seed: int = 0) -> Requests:
    """``requests`` with prompts and replies as long as those of random ones of ``source``, both of the same one."""
    chosen = np.random.default_rng(seed).integers(len(source), size=len(requests))
    return replace(
        requests, input_len=source.input_len[chosen], output_len=source.output_len[chosen], fixed=source.fixed
    )


def _ramped(work: Array, rate: float, ramp_s: float) -> Array:
    """Seconds at which so much ``work`` (requests expected so far) has come, where the rate climbs for ``ramp_s``."""
    whole = rate * ramp_s / 2  # requests of the ramp
    climbing = np.sqrt(2 * np.minimum(work, whole) * ramp_s / rate)
    seconds: Array = np.where(work < whole, climbing, ramp_s + (work - whole) / rate)
    return seconds


def sessions(
    count: int, turns: int, input_len: Length, output_len: Length, *, rate: float | None = None, think_s: float = 0.0,
    shared_len: int = 0, users: int | None = None, burstiness: float = 1.0, ramp_s: float = 0.0, seed: int = 0,
    block_tokens: int = 64,
) -> Requests:
    """``count`` conversations of ``turns`` turns: each prompt repeats all that was said before and adds ``input_len``.

    Conversations begin as requests of :func:`drawn` come; the next turn is asked ``think_s`` (exponential, mean) after
    the reply before it. All begin with the same ``shared_len`` tokens (a system prompt).
    """
    if turns < 1:
        raise InputError(f"turns = {turns}: at least 1")
    for name, value in (("think time", think_s), ("shared tokens", shared_len)):
        if not 0 <= value < np.inf:
            raise InputError(f"{name} = {value:g}: must be at least 0")
    begin = drawn(
        count, Length(1), Length(1), rate=rate, burstiness=burstiness, users=users, ramp_s=ramp_s, seed=seed
    ).arrival_s
    random = np.random.default_rng((seed, turns))
    thinks = random.exponential(think_s, (count, turns)) if think_s else np.zeros((count, turns))
    asked, said = (law.draw(count * turns, random).reshape(count, turns) for law in (input_len, output_len))
    # a prompt holds the system prompt, all asked so far, and all replies but its own
    whole = shared_len + np.cumsum(asked, axis=1) + np.cumsum(said, axis=1)
    common, last = shared_len // block_tokens, whole[:, -1] // block_tokens
    starts = common + np.concatenate([[0], np.cumsum(last - common)[:-1]])
    blocks = []
    for start, lengths in zip(starts.tolist(), (whole // block_tokens).tolist(), strict=True):
        own = (*range(common), *range(start, start + lengths[-1] - common))
        blocks += [own[:length] for length in lengths]
    after = np.arange(count * turns).reshape(count, turns) - 1
    after[:, 0] = -1
    return Requests(
        arrival_s=np.repeat(begin, turns), input_len=(whole - said).ravel(), output_len=said.ravel(),
        blocks=tuple(blocks), block_tokens=block_tokens, reply_blocks=True, users=users, after=after.ravel(),
        think_s=thinks.ravel(),
    )
