"""The table of candidates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tensorcast.cost.evidence import EVIDENCE, NORMAL_90
from tensorcast.deploy.plan.plan import choose_all2all
from tensorcast.search.candidate_arrays import Points
from tensorcast.search.search_task import SearchTask
from tensorcast.search.selection import LIMITS, rated
from tensorcast.search.space import family
from tensorcast.search.variant_prices import VariantPrices
from tensorcast.serving.entries import Entries
from tensorcast.serving.traffic import Array, Rows
from tensorcast.trace.cache import whole_model

if TYPE_CHECKING:
    import pandas as pd


COLUMNS = tuple(
    "candidate mode device engine layout family tp dp ep etp pp replicas world_size gpus prefill_layout"
    " prefill_workers decode_workers batch concurrency all2all dispatch combine kv_dtype placement redundant_experts"
    " external_shared_experts shared_expert_tp dual_batch_overlap mtp_depth dcp pcp chunk_tokens ttft_s ttft_low_s"
    " ttft_high_s ttft_chance tpot_s tpot_low_s tpot_high_s tpot_chance request_s output_tokens_per_s"
    " output_tokens_low_per_s output_tokens_high_per_s tokens_per_s_per_gpu tokens_per_s_per_user decode_step_s"
    " prefill_step_s exposed_comm_s hidden_comm_s memory_bytes weights_bytes kv_cache_bytes activations_bytes"
    " capacity_bytes largest_batch share_measured share_calibrated share_datasheet meets limit pareto"
    " cost_per_million_tokens usd_per_hour idle_gpus lower_bound".split()
)
"""Columns of :attr:`Comparison.candidates`; units in the names. ``*_low, *_high``: ends of 80 % intervals.
``*_chance``: of keeping that limit, not a number where there is none. ``idle_gpus``: those of the size asked for that a
candidate leaves; they cost as much (of two devices: none). ``lower_bound``: of what ranks the candidates."""

WORDS = frozenset(
    "candidate mode device engine layout family prefill_layout all2all dispatch combine kv_dtype placement"
    " limit".split()
)
"""Columns of text."""


@dataclass(frozen=True)
class Decoding(Entries):
    """What decodes candidates: a member of a fleet each, at a batch of sequences with so many cached tokens."""

    fleet: NDArray[np.object_]
    member: Rows
    batch: Array
    past: Array


@dataclass(frozen=True)
class Candidates(Entries):
    """Candidates as columns of one length, :data:`COLUMNS`; a frame is made of them only where one is read, and their
    memory told."""

    columns: dict[str, NDArray[Any]]
    decoding: Decoding | None = None
    """What those of :data:`MEMORY` are told of, where they are not among the columns."""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.columns[name] if name in self.columns else self.every[name]

    def __reduce__(self) -> tuple[type[Candidates], tuple[dict[str, NDArray[Any]]]]:
        return Candidates, (self.every,)  # fleets stay in their process

    @cached_property
    def every(self) -> dict[str, NDArray[Any]]:
        """All columns, memory among them, and what was put beside them."""
        by = self.decoding
        if by is None:
            return self.columns
        found = {name: np.full(len(self), np.nan) for name in MEMORY}
        alike: dict[tuple[int, float], list[int]] = {}
        for i, (fleet, past) in enumerate(zip(by.fleet, by.past.tolist(), strict=True)):
            alike.setdefault((id(fleet), past), []).append(i)
        for (_, past), mine in alike.items():
            fleet = by.fleet[mine[0]]
            batches, at = np.unique(by.batch[mine], return_inverse=True)
            memory = fleet.memory(batches[None, :], 1, int(past))
            for name, part in MEMORY.items():
                whole = np.broadcast_to(getattr(memory, part), (fleet.size, len(batches)))
                found[name][mine] = whole[by.member[mine], at]
        found = self.columns | found
        return {name: found[name] for name in dict.fromkeys((*COLUMNS, *found))}

    def first_of(self, names: Sequence[str], order: Rows | None = None) -> Rows:
        """Where every combination of the values of some columns first stands, candidates in this ``order`` (default: as
        they stand)."""
        columns = [self.columns[name] for name in names]
        first: dict[tuple[object, ...], int] = {}
        for i, key in enumerate(zip(*((c if order is None else c[order]).tolist() for c in columns), strict=True)):
            first.setdefault(key, i)
        found = np.array(list(first.values()), dtype=int)
        return found if order is None else order[found]

    def records(self) -> list[dict[str, Any]]:
        """Rows as plain values by column."""
        values = [column.tolist() for column in self.every.values()]
        return [dict(zip(self.every, row, strict=True)) for row in zip(*values, strict=True)]

    def frame(self) -> pd.DataFrame:
        import pandas as pd

        # where some have none, None says so: pandas would make it a number
        first = self.columns["prefill_layout"]
        own = {"prefill_layout": pd.Series(first, dtype=object)} if None in first else {}
        return pd.DataFrame(self.every | own)


MEMORY = {
    "memory_bytes": "total", "weights_bytes": "weights", "kv_cache_bytes": "kv_cache",
    "activations_bytes": "activations",
}
"""Columns of bytes on the fullest GPU, which are told where they are read."""

NONE = Candidates(dict.fromkeys(COLUMNS, np.zeros(0)))


def candidates_of(task: SearchTask, prices: VariantPrices, mode: str, points: Points) -> Candidates:
    """Points as candidates, which are named, and whose front is drawn, once all tasks are searched."""
    c, of_variant = rated(task, prices, mode, points, intervals=True), points.variant
    told = _told(task, prices)
    limits = [name for name in LIMITS if f"{name}_share" in c]
    shares = np.array([c[f"{name}_share"] for name in limits])
    over = shares.max(axis=0) > 1
    pools, decoding, named = mode == "disaggregated", task, told["layout"][of_variant]
    reading: Rows = c["prefill"].astype(int) if pools else of_variant
    reads = _told(task, prices.readers or prices)
    prefill = reads["layout"][reading]
    if task.pools:  # as replay reads them
        first, decoding = task.pools
        named, prefill = named + f"@{decoding.device.name}", prefill + f"@{first.device.name}"
    nothing = np.full(len(of_variant), np.nan)
    columns: dict[str, Any] = {
        "candidate": "",
        "mode": mode,
        "device": " > ".join([one.device.name for one in task.pools or (task,)]),
        "engine": task.engine.name,
        **{name: values[of_variant] for name, values in told.items()},
        "layout": named,
        "pcp": reads["pcp"][reading],
        **{name: c[name].astype(int) for name in ("replicas", "world_size", "gpus")},
        "prefill_layout": prefill if pools else None,
        "prefill_workers": c["prefill_workers"] if pools else nothing,
        "decode_workers": c["decode_workers"] if pools else nothing,
        "batch": c["batch"],
        "concurrency": c["concurrency"],
        "chunk_tokens": nothing if pools else c["chunk_tokens"],
        **{
            f"{what}{end}_{unit}": c[f"{what}_{unit}"] * c[f"factor_{what}_{unit}"] ** sign
            for what, unit in (("ttft", "s"), ("tpot", "s"), ("output_tokens", "per_s"))
            for end, sign in (("", 0.0), ("_low", -1.0), ("_high", 1.0))
        },
        **{
            f"{what}_chance": [0.5 + 0.5 * math.erf(z) for z in margin.tolist()] if limit is not None else nothing
            for what, limit in (("ttft", task.ttft_s), ("tpot", task.tpot_s))
            for sigmas in [NORMAL_90 * np.log((limit or 1.0) / c[f"{what}_s"]) / np.log(c[f"factor_{what}_s"])]
            for margin in [sigmas / math.sqrt(2)]
        },
        "request_s": c["request_s"],
        "tokens_per_s_per_gpu": c["tokens_per_s_per_gpu"],
        "tokens_per_s_per_user": 1.0 / c["tpot_s"],
        **{name: c[name] for name in ("decode_step_s", "prefill_step_s", "exposed_comm_s", "hidden_comm_s")},
        "capacity_bytes": float(decoding.device.memory_bytes),
        "largest_batch": c["largest_batch"],
        **{f"share_{kind}": c[f"share_{kind}"] for kind in EVIDENCE},
        "meets": ~over,
        "limit": np.where(over, np.array(limits)[shares.argmax(axis=0)], ""),
        "pareto": False,
        **{name: c[name] for name in ("cost_per_million_tokens", "usd_per_hour", "lower_bound")},
        "idle_gpus": 0 if task.objective == "gpus" or task.pools else
        np.maximum(task.paid_gpus - c["gpus"], 0).astype(int),
    }
    held = {
        name: np.asarray(columns[name], dtype=object if name in WORDS else None)
        for name in COLUMNS if name not in MEMORY
    }
    fleets = np.empty(len(prices.fleets), dtype=object)
    fleets[:] = [fleet.in_pools() for fleet in prices.fleets] if pools else prices.fleets
    past = np.full(len(of_variant), float(int(prices.scenario.load.context) - 1))  # each reply half done
    behind = Decoding(fleets[prices.fleet_of[of_variant]], prices.member_of[of_variant], c["batch"], past)
    return Candidates({
        name: values if values.ndim else np.broadcast_to(values, len(of_variant)) for name, values in held.items()
    }, behind)


def _told(task: SearchTask, prices: VariantPrices) -> dict[str, NDArray[Any]]:
    """Columns that hang on the variant alone, an entry for each."""
    if not prices.told:
        experts = bool(whole_model(task.model, "decode", task.base.quant).facts.num_experts)
        every = prices.variants
        few = {v.layout for v in every}
        called, families = {one: str(one) for one in few}, {one: family(one, experts) for one in few}
        columns: dict[str, list[Any]] = {
            "layout": [called[v.layout] for v in every], "family": [families[v.layout] for v in every],
            **{name: [getattr(v.layout, name) for v in every] for name in ("tp", "dp", "ep", "pp")},
            "etp": [v.layout.etp if experts else 1 for v in every],
            "pcp": [v.prefill.pcp for v in every],
            "all2all": [choose_all2all(v.decode.all2all, v.layout, task.engine, "decode") for v in every],
            "dispatch": [v.decode.dispatch or "" for v in every],
            "combine": [v.decode.combine or "" for v in every],
            "kv_dtype": [v.decode.kv_dtype or prices.own_kv_dtype for v in every],
            **{
                name: [getattr(v.decode, name) for v in every]
                for name in (
                    "placement", "redundant_experts", "external_shared_experts", "shared_expert_tp",
                    "dual_batch_overlap", "mtp_depth", "dcp",
                )
            },
        }  # fmt: skip
        prices.told |= {name: np.array(said, dtype=object if name in WORDS else None) for name, said in columns.items()}
    return prices.told
