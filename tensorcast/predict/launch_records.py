"""What public benchmarks launched an engine with, where a record of their runs does not say it.

The table is a profile, ``profiles/records/launches.csv``, made by :mod:`tensorcast.calibrate.engines.launches` from the
benchmarks' launch scripts. A record is found by engine, model, device, precision, lengths and sizes; of several such
launches those of its release or the nearest, then those that cut experts as it does, then those of its users, then
those that draft as it states come first. Which version of a script made a record is not known: drafted tokens may not
be sure, and an option that those differ in that draft least is the most frequent.
"""

from __future__ import annotations

import csv
import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from tensorcast.deploy.layout import Layout
from tensorcast.errors import InputError
from tensorcast.profiles.releases import built_near, nearest_release, release_order
from tensorcast.profiles.store import load_device, load_engine, profile_roots
from tensorcast.serving.traffic import steps_waited

if TYPE_CHECKING:
    from tensorcast.profiles.device import DeviceProfile
    from tensorcast.profiles.engine import EngineProfile, Frontend

Value = TypeVar("Value")

POOLS = ("prefill_workers", "prefill_tp", "prefill_dp_attn", "decode_workers", "decode_tp", "decode_dp_attn")
SIZES = ("gpus", "dp_attn", *POOLS)
"""Columns of the table by which launches of one mode are told apart; those of pools are empty where one server does
both, the others where two do."""

WORDS = ("all2all", "cuda_graphs", "allreduce_fusion", "experts_kernels", "attention_kernels", "draft_overlap")
"""Columns of options that are words of ours."""

WAITS: dict[str, Callable[[str], Any]] = {
    "balance_steps": int, "batching_steps": int, "batch_wait_steps": int, "batch_wait_share": float,
}  # fmt: skip
"""Columns of what prompts wait for, and what they are read as: :class:`tensorcast.scheduling.rules.Waits`."""

WORKERS = ("prefill_workers", "decode_workers")
"""Columns of the numbers of workers."""

USERS_APART = 1.25
"""How many times the users of a launch may be those of a record that it is taken for."""

LENGTH_RATIO = 0.8
"""Records of InferenceX are of lengths uniform between this share of the stated and the whole (its scripts,
github.com/SemiAnalysisAI/InferenceX, benchmarks/single_node/)."""

RECEIVE_INTERVAL = {"few": 10, "many": 30, "hopper": 1}
"""SGLang's ``--scheduler-recv-interval`` where no launch is known (dsr1_fp8_h200.sh, dsr1_fp8_b200.sh,
qwen3.5_fp8_b200.sh, qwen3.5_bf16_mi355x.sh)."""

MANY_USERS = 16
"""Users from which those scripts let SGLang look for requests more rarely."""

MTP_ACCEPTANCE = 0.67
"""Chance that a drafted token is accepted in such a record: what explains the median of 15 pairs of public runs of
DeepSeek-V3 and R1 (TensorRT-LLM 1.1.0rc2.post2, H200) that differ by three drafted tokens alone."""


@dataclass(frozen=True, kw_only=True)
class Launched:
    """Options of a record's launch; None: the engine's default. ``mtp_depths``: drafted tokens, fewest first; ``ep``:
    experts' parallel size, None where launches differ in it or do not say; ``unasked``: none of them asks for a number
    of sequences."""

    ep: int | None
    chunk_tokens: int | None
    kv_dtype: str | None
    state_dtype: str | None
    receive_interval: int | None
    all2all: str | None
    memory_fraction: float | None
    max_num_seqs: int | None
    cuda_graphs: str | None
    allreduce_fusion: str | None
    experts_kernels: str | None
    attention_kernels: str | None
    draft_overlap: str | None
    balance_steps: int | None
    batching_steps: int | None
    batch_wait_steps: int | None
    batch_wait_share: float | None
    unasked: bool
    mtp_depths: tuple[int, ...]

    def cells(self) -> dict[str, Any]:
        """Options that are no default, by column."""
        options = (
            "chunk_tokens", "kv_dtype", "state_dtype", "receive_interval", "memory_fraction", "max_num_seqs", *WORDS,
            *WAITS,
        )  # fmt: skip
        said = {name: value for name in options if (value := getattr(self, name)) is not None}
        return said | ({"mtp_depth": self.mtp_depths[0]} if self.mtp_depths != (0,) else {})


def wait_steps(device: str, mode: str, users: float) -> float:
    """Steps that SGLang's receive interval adds to a first token, in a record that says nothing of it: half of those
    from one look to the next.

    Its stream interval adds none: the first token is sent at once (SGLang 0.5.9 and 0.5.14,
    srt/managers/scheduler_output_processor_mixin.py: ``len(output_ids) % stream_interval == 1``).
    """
    if mode != "aggregated":
        return 0.0
    hopper = _device(device).architecture.lower() == "hopper"
    return steps_waited(RECEIVE_INTERVAL["hopper" if hopper else "many" if users >= MANY_USERS else "few"])


def frontend(device: str) -> Frontend:
    """What took requests to the pools of a record that says nothing of it: all launches of SGLang's and TensorRT-LLM's
    pools on NVIDIA devices are behind Dynamo (``dynamo-sglang``, ``dynamo-trt``), on AMD's behind SGLang's router."""
    return "dynamo" if _device(device).vendor == "NVIDIA" else "own"


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What a record says that its launch is found by, beside sizes. ``model``: name of a profile; ``device, engine``:
    names or aliases; ``lengths``: of prompt and reply, as stated; ``users``: requests in flight; ``depth``: drafted
    tokens, if stated."""

    model: str
    device: str
    engine: str
    precision: str
    lengths: tuple[int, int]
    users: float
    release: str
    depth: int | None = None

    def key(self) -> tuple[str, ...] | None:
        """The table's key, less mode and sizes; None where engine or device are not known (said where it is served)."""
        try:
            names = _engine(self.engine).name, self.model, _device(self.device).name
        except InputError:
            return None
        return (*names, self.precision.lower(), *map(str, self.lengths))


def launched(of: Recorded, sizes: tuple[str, ...], ep: int) -> Launched | None:
    """How a record was launched, or None where no launch is known. ``sizes``: of :func:`aggregated_sizes` or
    :func:`pool_sizes`; ``ep``: experts' parallel size, of the decode pool."""
    alike = _of_release(_launches().get((*(of.key() or ()), *sizes), []), of.release)
    alike = [row for row in alike if row["ep"] == str(ep)] or alike
    as_many = [row for row in alike if f"{of.users:.0f}" in row["users"].split(";")]
    alike = as_many or alike
    alike = [row for row in alike if of.depth in (None, _depth(row))] or alike
    if not alike:
        return None
    cuts, drafting = {row["ep"] for row in alike}, [row for row in alike if row["mtp_depth"] not in ("", "0")]
    depths = sorted({_depth(row) for row in alike})
    alike = [row for row in alike if _depth(row) == depths[0]]  # as which it is priced
    return Launched(
        ep=int(cuts.pop()) if len(cuts) == 1 and "" not in cuts else None,
        chunk_tokens=_most(alike, "chunk_tokens", int),
        kv_dtype=_most(alike, "kv_dtype", str),
        state_dtype=_most(alike, "state_dtype", str),
        receive_interval=_most(alike, "receive_interval", int),
        all2all=_most(alike, "all2all", str),
        memory_fraction=_most(alike, "memory_fraction", float),
        max_num_seqs=_most(alike, "max_num_seqs", int) if as_many else None,  # scripts set it by their users
        cuda_graphs=_most(alike, "cuda_graphs", str),
        allreduce_fusion=_most(alike, "allreduce_fusion", str),
        experts_kernels=_most(alike, "experts_kernels", str),
        attention_kernels=_most(alike, "attention_kernels", str),
        draft_overlap=_most(drafting, "draft_overlap", str) if drafting else None,
        **{name: _most(alike, name, read) for name, read in WAITS.items()},
        unasked=not any(row["max_num_seqs"] for row in alike),
        mtp_depths=tuple(depths),
    )


def _depth(row: dict[str, str]) -> int:
    """Tokens that a launch drafts."""
    return int(row["mtp_depth"] or 0)


def _of_release(rows: list[dict[str, str]], release: str) -> list[dict[str, str]]:
    """Those of a release; where none is of it, those of the nearest one that launches are known of, if any is."""
    known = {one for row in rows for one in row["release"].split(";") if release_order(one)}
    if release not in known and known:
        release = nearest_release(release, known) or release
    return [row for row in rows if release in row["release"].split(";")] or rows


def launched_pools(
    of: Recorded, pools: tuple[Layout, Layout]
) -> tuple[tuple[int, int], tuple[Layout, Layout]] | None:
    """Workers and layouts of the launch that a record is of, where it states the GPUs of a worker alone; None where
    none is known of as many users, or nearly. Of several those that draft least, then the most frequent.

    ``pools``: prefill and decode, of which such a record says ranks, not whether attention is data-parallel, and one
    experts' parallel size for both, of prompts' where they differ: three runs of DeepSeek-R1 under SGLang, equal to the
    last digit, state both sizes in one record and prompts' alone in another.
    """
    key, (reads, writes) = of.key(), (str(pool.ep) for pool in pools)
    ranks = [str(pool.tp * pool.dp) for pool in pools]
    alike = [
        row for known, rows in _launches().items() if known[:6] == key and known[6] == "disagg" for row in rows
        if [row["prefill_tp"], row["decode_tp"]] == ranks and (row["ep"] in ("", writes) or row["prefill_ep"] == reads)
        and "0" not in (row["prefill_workers"], row["decode_workers"])
    ]  # fmt: skip
    apart = [min(max(of.users / float(n), float(n) / of.users) for n in row["users"].split(";")) for row in alike]
    nearest = min(apart, default=math.inf)
    if nearest > USERS_APART:
        return None
    alike = _of_release([row for row, far in zip(alike, apart, strict=True) if far == nearest], of.release)
    alike = [row for row in alike if row["ep"] in ("", writes)] or alike
    depth = min(map(_depth, alike))
    found = Counter(
        tuple(row[name] for name in (*WORKERS, "prefill_dp_attn", "decode_dp_attn", "prefill_ep", "ep"))
        for row in alike if _depth(row) == depth
    ).most_common(1)[0][0]  # fmt: skip
    spread = [
        replace(pool, ep=int(ep or pool.ep), **({"tp": 1, "dp": pool.tp * pool.dp} if parallel == "1" else {}))
        for pool, parallel, ep in zip(pools, found[2:4], found[4:], strict=True)
    ]
    return (int(found[0]), int(found[1])), (spread[0], spread[1])


def aggregated_sizes(layout: Layout) -> tuple[str, ...]:
    """Sizes of one server as launches are told apart by them: its GPUs, and whether attention is data-parallel."""
    return ("agg", str(layout.tp * layout.dp), str(int(layout.dp > 1)), *[""] * len(POOLS))


def pool_sizes(prefill: Layout, decode: Layout, workers: tuple[int, int]) -> tuple[str, ...]:
    """Sizes of pools: workers, ranks of one, and whether its attention is data-parallel."""
    pools = zip(workers, (prefill, decode), strict=True)
    return ("disagg", "", "", *(str(n) for count, pool in pools for n in (count, pool.tp * pool.dp, int(pool.dp > 1))))


@functools.lru_cache
def _device(name: str) -> DeviceProfile:
    return load_device(name.replace("_", "-"))


@functools.lru_cache
def _engine(name: str) -> EngineProfile:
    return load_engine(name)


def counted_twice(tp: int, dp: int, etp: int, ep: int) -> tuple[int, int, int, int] | None:
    """Sizes as launched, where a benchmark's record multiplied them: tp, dp, etp, ep; None where it did not.

    InferenceX (github.com/SemiAnalysisAI/InferenceX, benchmarks/single_node/) launches with ``--tp N --ep N`` on N
    GPUs: experts whole, attention over tp, or over dp. Collections of its results write that as N*N ranks, such as
    tp 64 = moe_tp 8 * ep 8 on one server of 8 GPUs; the same runs, equal to the last digit, are also there as tp 8
    and ep 8.
    """
    if etp == ep > 1 and tp * dp == ep * ep and 1 in (tp, dp):
        return (ep, 1, 1, ep) if dp == 1 else (1, ep, 1, ep)
    if tp == dp > 1 and ep == tp * dp:
        return tp, 1, 1, tp
    return None


def rules_of(engine: str, said: str, record: bool) -> tuple[str, str, list[str]]:
    """Of an ``engine`` column and the release ``said`` beside it, or in it after ``==``: the engine, the release whose
    rules hold (empty: the newest) and what is assumed where it is another.

    It is the nearest one that was read, of a build that names a day the nearest to that. A public ``record`` of another
    build that is no release, or that names none, is taken as the runs that overheads were fitted to.
    """
    name, _, asked = engine.partition("==")
    said = asked or said
    if not said and not record:
        return name, "", []
    try:
        profile = _engine(name)
    except InputError:  # said where the row is served
        return name, said, []
    usual = profile.calibrated.steps if record and profile.calibrated is not None else profile.version
    known = profile.releases or (profile.version,)
    found = nearest_release(said or usual, known) or built_near(said, profile.days) or usual
    return name, found, [f"rules of {profile.name} {found}"] if said and found != said else []


@functools.lru_cache
def _launches() -> dict[tuple[str, ...], list[dict[str, str]]]:
    found: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    path = next(path for root in profile_roots() if (path := root / "records" / "launches.csv").is_file())
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(line for line in file if not line.startswith("#")):
            for model in row["model"].split(";"):
                key = row["engine"], model, row["device"], row["precision"], row["isl"], row["osl"], row["mode"]
                found[(*key, *(row[name] for name in SIZES))].append(row)
    return dict(found)


def _most(rows: list[dict[str, str]], option: str, read: Callable[[str], Value]) -> Value | None:
    """The most frequent value of an option; of equally frequent ones the first of the table that is said: scripts are
    added options more often than they lose any, and records are of their last runs."""
    counts = Counter(row[option] for row in rows)
    value = max(counts, key=lambda one: (counts[one], one != ""))
    return read(value) if value else None
