"""What public benchmarks launched an engine with, where a record of their runs does not say it.

The table is a profile, ``profiles/records/launches.csv``, made by :mod:`tensorcast.calibrate.engines.launches` from the
benchmarks' launch scripts. A record is found by engine, model, device, precision, lengths and sizes; of several such
launches those of its release, then of its users, come first. Which version of a script made a record is not known: an
option that the remaining ones differ in is the most frequent, and drafted tokens are then not sure.
"""

from __future__ import annotations

import csv
import functools
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from tensorcast.deploy.layout import Layout
from tensorcast.errors import InputError
from tensorcast.profiles.releases import nearest_release
from tensorcast.profiles.store import load_device, load_engine, profile_roots

if TYPE_CHECKING:
    from tensorcast.profiles.device import DeviceProfile
    from tensorcast.profiles.engine import EngineProfile

Value = TypeVar("Value")

POOLS = ("prefill_workers", "prefill_tp", "prefill_dp_attn", "decode_workers", "decode_tp", "decode_dp_attn")
SIZES = ("gpus", "dp_attn", *POOLS)
"""Columns of the table by which launches of one mode are told apart; those of pools are empty where one server does
both, the others where two do."""

LENGTH_RATIO = 0.8
"""Records of InferenceX are of lengths uniform between this share of the stated and the whole (its scripts,
github.com/SemiAnalysisAI/InferenceX, benchmarks/single_node/)."""

FP8_CACHE = (("trtllm", "fp8"),)
"""Engines and precisions of its records with an FP8 cache where no launch is known: TensorRT-LLM's own FP8 checkpoints
ask for it."""

RECEIVE_INTERVAL = {"few": 10, "many": 30, "hopper": 0}
"""SGLang's ``--scheduler-recv-interval`` where no launch is known (dsr1_fp8_h200.sh, dsr1_fp8_b200.sh,
qwen3.5_fp8_b200.sh, qwen3.5_bf16_mi355x.sh)."""

MANY_USERS = 16
"""Users from which those scripts let SGLang look for requests more rarely."""

MTP_ACCEPTANCE = 0.67
"""Chance that a drafted token is accepted in such a record: what explains the median of 15 pairs of public runs of
DeepSeek-V3 and R1 (TensorRT-LLM 1.1.0rc2.post2, H200) that differ by three drafted tokens alone."""


@dataclass(frozen=True, kw_only=True)
class Launched:
    """Options of a record's launch; None: the engine's default. ``mtp_depths``: drafted tokens, fewest first."""

    chunk_tokens: int | None
    kv_dtype: str | None
    state_dtype: str | None
    receive_interval: int | None
    mtp_depths: tuple[int, ...]

    def cells(self) -> dict[str, Any]:
        """Options that are no default, by column."""
        said = {name: value for name, value in vars(self).items() if name != "mtp_depths" and value is not None}
        return said | ({"mtp_depth": self.mtp_depths[0]} if self.mtp_depths != (0,) else {})


def wait_steps(device: str, mode: str, users: float) -> float:
    """Steps that SGLang's receive interval adds to a first token, in a record that says nothing of it: half of it.

    Its stream interval adds none: the first token is sent at once (SGLang 0.5.9 and 0.5.14,
    srt/managers/scheduler_output_processor_mixin.py: ``len(output_ids) % stream_interval == 1``).
    """
    if mode != "aggregated":
        return 0.0
    hopper = _device(device).architecture.lower() == "hopper"
    return RECEIVE_INTERVAL["hopper" if hopper else "many" if users >= MANY_USERS else "few"] / 2


def launched(
    model: str, device: str, engine: str, *, precision: str, lengths: tuple[int, int], users: float, release: str,
    sizes: tuple[str, ...],
) -> Launched | None:
    """How a record was launched, or None where no launch is known.

    ``model``: name of a profile; ``device, engine``: names or aliases. ``sizes``: of :func:`aggregated_sizes` or
    :func:`pool_sizes`.
    """
    try:
        names = _engine(engine).name, model, _device(device).name
    except InputError:  # said where the row is served
        return None
    alike = _launches().get((*names, precision.lower(), *map(str, lengths), *sizes), [])
    for name, said in (("release", release), ("users", f"{users:.0f}")):
        alike = [row for row in alike if said in row[name].split(";")] or alike
    if not alike:
        return None
    return Launched(
        chunk_tokens=_most(alike, "chunk_tokens", int),
        kv_dtype=_most(alike, "kv_dtype", str),
        state_dtype=_most(alike, "state_dtype", str),
        receive_interval=_most(alike, "receive_interval", int),
        mtp_depths=tuple(sorted({int(row["mtp_depth"] or 0) for row in alike})),
    )


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


def rules_of(engine: str, said: str, record: bool) -> tuple[str, str, list[str]]:
    """Of an ``engine`` column and the release ``said`` beside it, or in it after ``==``: the engine, the release whose
    rules hold (empty: the newest) and what is assumed where it is another.

    It is the nearest one that was read. A public ``record`` of a build that is no release, or that names none, is taken
    as the runs that overheads were fitted to.
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
    found = nearest_release(said or usual, profile.releases or (profile.version,)) or usual
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
    """The most frequent value of an option; of equally frequent ones the first of the table."""
    value = Counter(row[option] for row in rows).most_common(1)[0][0]
    return read(value) if value else None
