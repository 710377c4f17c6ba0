"""Comparing layouts for a load and its limits: the best, the runner-up, and what cannot be told apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorcast.cost.evidence import LEVELS
from tensorcast.deploy.deployment import Deployment
from tensorcast.deploy.step.asked_rows import Memo, Prices
from tensorcast.deploy.step.price import StepPrice, pick
from tensorcast.deploy.step.step import Asked, prices
from tensorcast.errors import InputError, unknown_name
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.engine import EngineProfile
from tensorcast.profiles.model import ModelProfile
from tensorcast.search.candidate_table import Candidates
from tensorcast.search.notes import COUNTED, in_seconds, notes, nothing_left, warning
from tensorcast.search.search import NO_PACE, NO_ROOM, SearchResult
from tensorcast.search.search_task import Scenario, SearchTask
from tensorcast.search.selection import alike, pareto
from tensorcast.search.space import Variant
from tensorcast.search.workspace import CURRENT
from tensorcast.serving.objective import OBJECTIVES

if TYPE_CHECKING:
    import pandas as pd


class NoLayoutMeets(InputError):
    """The limits leave nothing; the message says which one binds and how close the best came."""

    exit_code = 3

    def __init__(self, message: str, comparison: Comparison) -> None:
        super().__init__(message)
        self.comparison = comparison


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of :func:`compare`. ``kept``: the candidates kept, of ``examined`` in all.

    Kept are, of every mode and layout at every batch, the options that do best, and all of the Pareto front.
    ``pruned``: how many fell away by which rule, of ``layouts`` (rules on layouts and engines), of ``variants``
    (layouts with their options: memory) and of ``candidates`` (variants at a batch: pace). ``warning``: what to know
    before trusting the best, if anything.
    """

    model: ModelProfile
    devices: tuple[DeviceProfile, ...]
    engine: EngineProfile
    """Of the best candidate, of the first task where there is none."""
    objective: str
    targets: tuple[float | None, float | None]
    input_len: int
    output_len: int
    kept: Candidates
    pruned: dict[str, dict[str, int]]
    best: dict[str, Any] | None
    runner_up: dict[str, Any] | None
    notes: tuple[str, ...]
    examined: int = 0
    tasks: tuple[SearchTask, ...] = field(default=(), repr=False)
    behind: dict[str, tuple[Scenario, Variant, Variant]] = field(default_factory=dict, repr=False)
    """Of every candidate: what it serves, and the variants that prefill and decode."""
    warning: str = ""
    question: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Arguments of :func:`tensorcast.api.compare`, or options by flag, as they were given."""
    contenders: Candidates | None = field(default=None, repr=False)
    """The best, and the best of other modes and layouts within the limits."""
    judged: bool = True
    """Whether :attr:`ties` are looked for."""
    _priced: dict[Hashable, tuple[Deployment, StepPrice]] = field(default_factory=dict, repr=False, compare=False)
    """Steps of contenders that :attr:`ties` asked for, by identity of their deployment and sizes."""

    def deployments(self, candidate: str) -> tuple[Deployment, Deployment]:
        """(prefill, decode) of a candidate, made anew. Raises :class:`InputError` for an unknown one."""
        if candidate not in self.behind:
            raise unknown_name("candidate", candidate, self.behind)
        scenario, prefill, decode = self.behind[candidate]
        return (
            scenario.deployment(prefill.layout, "prefill", prefill.prefill),
            scenario.deployment(decode.layout, "decode", decode.decode),
        )

    def step_price(self, deployment: Deployment, batch: float, new: float, past: float) -> StepPrice:
        """A step of a candidate's deployment: as it was priced before, if it was."""
        known = self._priced.get((id(deployment), batch, new, past))
        return deployment.step.price(batch, new, past) if known is None else known[1]

    @cached_property
    def candidates(self) -> pd.DataFrame:
        """One row per candidate kept."""
        return self.kept.frame()

    @cached_property
    def closest(self) -> tuple[dict[str, Any], list[str]]:
        """Where nothing keeps within the limits: the candidate that comes closest, and the limits that bind.

        Binding are those that no candidate keeps, each taken alone (``ttft``, ``tpot``); else the closest one's worst.
        """
        kept, first = self.kept, self.tasks[0]
        late = {name: kept[f"{name}_s"] / limit for name, limit in zip(("ttft", "tpot"), self.targets, strict=True)
                if limit is not None}
        served = {"users": first.users, "requests": first.request_rate and first.request_rate * self.output_len}
        if self.objective == "gpus":
            served = {}
        few = {name: least / kept["concurrency" if name == "users" else "output_tokens_per_s"]
               for name, least in served.items() if least}
        ones = np.ones(len(kept))
        # of those within the times asked for, or closest to them, what serves most; of such the one on fewest GPUs
        worst = [np.max(np.array([*ratios.values(), ones]), axis=0) for ratios in (few, late)]
        (row,) = kept.where(np.lexsort((kept["gpus"], *worst))[:1]).records()
        alone = [name for name, ratio in {**late, **few}.items() if ratio.min() > 1]
        return row, alone or [str(row["limit"]) or "gpus"]

    @cached_property
    def best_of_each(self) -> Candidates:
        """The best candidate of every mode and layout, best first; those within the limits come before the others."""
        keys = ["device", "engine", "mode", "layout", "prefill_layout", *(["gpus"] if self.objective != "gpus" else [])]
        return self.kept.where(self.kept.first_of(keys, OBJECTIVES[self.objective].order(self.kept.columns)))

    @cached_property
    def ties(self) -> list[str]:
        """Candidates that cannot be told apart from the best (:func:`tensorcast.search.selection.alike`)."""
        found = []
        if self.judged and self.best is not None and self.contenders is not None:
            best, *others = self.contenders.records()
            own, *sums = work_by_family(self, [best, *others])
            for row, other in zip(others, sums, strict=True):
                # one pool and two err by themselves: another serving model stands behind each
                ends = [one["output_tokens_high_per_s"] / one["output_tokens_per_s"] - 1 for one in (best, row)]
                if alike(own, other, (ends[0], ends[1]) if row["mode"] != best["mode"] else (0.0, 0.0)):
                    found.append(row["candidate"])
        return found

    @cached_property
    def families(self) -> pd.DataFrame:
        """:attr:`best_of_each` as a frame."""
        return self.best_of_each.frame()


def compare(tasks: Sequence[SearchTask], results: Sequence[SearchResult], *, ties: bool = True) -> Comparison:
    """Put the answers together: names, Pareto front, the best, the runner-up; notes and ties unless ``ties`` is False.

    Raises :class:`InputError` where nothing fits, :class:`NoLayoutMeets` where nothing keeps within the limits.
    """
    first = tasks[0]
    tables = [one.candidates for one in results if len(one.candidates)]
    pruned: Counter[str] = Counter()
    for one in results:
        pruned += one.pruned
    if not tables:
        raise InputError(nothing_left(tasks, pruned))
    every = Candidates.joined(tables)
    found = replace(every, columns=every.columns | {
        "candidate": np.array([f"{mode[0]}{i}" for i, mode in enumerate(every["mode"])], dtype=object),
        "pareto": pareto(every["tokens_per_s_per_user"], every["tokens_per_s_per_gpu"]),
    })
    by_rule: dict[str, dict[str, int]] = {what: {} for what in COUNTED}  # by what each rule counts, the most first
    for rule, number in pruned.most_common():
        if number:
            by_rule[{NO_ROOM: "variants", NO_PACE: "candidates"}.get(rule, "layouts")][rule] = number
    behind: list[tuple[Scenario, Variant, Variant]] = []
    for task, one in zip(tasks, results, strict=True):
        scenario = {"aggregated": task.scenario, "disaggregated": task.pools_scenario}
        behind += [(scenario[mode], *pair) for mode, pair in zip(one.candidates["mode"], one.variants, strict=True)]
    comparison = Comparison(
        model=first.model,
        devices=tuple({one.device.name: one.device for task in tasks for one in task.pools or (task,)}.values()),
        engine=first.engine, objective=first.objective, targets=(first.ttft_s, first.tpot_s),
        input_len=int(first.load.input_len), output_len=int(first.load.output_len),
        kept=found, pruned=by_rule,
        best=None, runner_up=None, judged=ties, notes=notes(tasks, found) if ties else (),
        examined=sum(one.examined for one in results),
        tasks=tuple(tasks), behind=dict(zip(found["candidate"], behind, strict=True)),
    )  # fmt: skip
    ranked = comparison.best_of_each
    if not ranked["meets"].any():
        raise NoLayoutMeets(_not_met(comparison), comparison)
    ranked = ranked.where(np.flatnonzero(ranked["meets"])[:CONTENDERS])
    apart = np.any([ranked[name] != ranked[name][0] for name in ("device", "engine", "mode", "layout")], axis=0)
    contenders = ranked.where(np.append(0, np.flatnonzero(apart)))
    best, *others = contenders.where(slice(2)).records()
    said = warning(comparison.tasks[0], found, best["ttft_s"], best["tpot_s"])
    engine = next(task.engine for task in tasks if task.engine.name == best["engine"])
    return replace(
        comparison, best=best, runner_up=others[0] if others else None, warning=said, engine=engine,
        contenders=contenders, notes=(*comparison.notes, *_in_vain(comparison, best)),
    )


def _in_vain(comparison: Comparison, best: dict[str, Any]) -> list[str]:
    """That kernels which were asked for change neither the prompts nor the replies of the ``best``."""
    options = comparison.tasks[0].base
    if not comparison.judged or options.experts_kernels == options.attention_kernels == "engine":
        return []
    from tensorcast.deploy.simulate import in_vain_note, kernels_in_vain

    written, read = (kernels_in_vain(one, *sizes) for one, sizes in _steps_of(comparison, best))
    return [in_vain_note(options, name, "on the best") for name in written if name in read]


_Sized = tuple[Deployment, tuple[float, float, float]]
"""A deployment, and batch, new and cached tokens of its step."""


def _steps_of(comparison: Comparison, row: dict[str, Any]) -> tuple[_Sized, _Sized]:
    """A candidate's steps: of its replies, half done, and of one prompt."""
    load = comparison.behind[row["candidate"]][0].load
    prefill, decode = comparison.deployments(row["candidate"])
    prompt = 1.0, float(load.input_len - load.prefix_cached), float(load.prefix_cached)
    return (decode, (float(row["batch"]), 1.0, float(load.context))), (prefill, prompt)


CONTENDERS = 12
"""Layouts that are compared with the best kernel by kernel."""

UNSURE = LEVELS.index("datasheet")
"""Level of prices that rest on datasheets alone."""


def work_by_family(
    comparison: Comparison, rows: Sequence[dict[str, Any]]
) -> list[dict[str, tuple[float, float]]]:
    """What the objective adds up for each candidate, by kernel family and beside them: (amount, relative median error).

    GPU seconds per output token; for the objective ``latency`` seconds of a request. What rests on measurements and
    what on datasheets alone err apart.
    """
    kept, new = CURRENT.get().contenders, dict[tuple[Hashable, ...], _Sized]()
    both: list[list[tuple[Hashable, ...]]] = []  # steps of each candidate: of replies, and of one prompt
    for row in rows:
        steps = _steps_of(comparison, row)
        # deployments are known by identity, and kept with what was found of them
        both.append([(id(one), *at) for one, at in steps])
        new |= {key: step for key, step in zip(both[-1], steps, strict=True) if key not in kept}
    common: dict[tuple[int, int], dict[Hashable, Prices]] = {}  # rows that no layout changes are priced once for all
    asked = list[Asked]()
    for one, at in new.values():
        plain = common.setdefault((id(one.device), id(one.engine)), {})
        asked.append((replace(one.step, memo=Memo(plain=plain, load=(id(one),), members=(one,))), *at))
    for key, price in zip(new, prices(asked), strict=True):
        # those on datasheets apart, and what passes beside kernels
        spent = {"engine": (max(float(price.overhead_s), 1e-30), float(price.overhead_error_s))}
        for part in price.parts:
            for p, calls in zip(part.prices, part.calls, strict=True):
                # one batch: numbers, or arrays of one entry where drafts are priced beside it
                seconds = np.asarray(pick(p.seconds, part.at) * (calls * part.times)).item()
                name = f"{p.family} {pick(p.level, part.at) == UNSURE}"
                before, off = spent.get(name, (0.0, 0.0))
                spent[name] = before + seconds, off + seconds * float(np.max(pick(p.error, part.at)))
        kept[key] = new[key], spent
        comparison._priced[key] = new[key][0], price
    sums = list[dict[str, tuple[float, float]]]()
    for row, keys in zip(rows, both, strict=True):
        decoded = row["tpot_s"] * (comparison.output_len - 1) / row["request_s"]
        whole = row["request_s"] if comparison.objective == "latency" else row["gpus"] / row["output_tokens_per_s"]
        found: dict[str, tuple[float, float]] = {}
        for key, share in zip(keys, (decoded, 1 - decoded), strict=True):
            parts = kept[key][1]
            total = sum(seconds for seconds, _ in parts.values()) or 1.0
            for name, (seconds, off) in parts.items():
                before, mean = found.get(name, (0.0, 0.0))
                amount = before + whole * share * seconds / total
                found[name] = amount, (before * mean + whole * share * off / total) / max(amount, 1e-30)
        sums.append(found)
    return sums


def _not_met(comparison: Comparison) -> str:
    """Which limit binds and how close the best came."""
    row, binding = comparison.closest
    ttft, tpot = comparison.targets
    asked, first = {"TTFT": ttft, "TPOT": tpot}, comparison.tasks[0]
    where = f"{row['gpus']} {row['device']} as {row['layout']} ({row['mode']}, batch {row['batch']:g} per rank)"
    said = [f"{name} <= {in_seconds(limit)}" for name, limit in asked.items() if limit is not None]
    if first.confidence is not None and said:
        said[-1] += f" with a chance of {100 * first.confidence:g} % each"
    most = max(task.gpus for task in comparison.tasks)
    least = {"requests/s": first.request_rate, "users at once": first.users}
    said += [f"{number:g} {name} on {most} GPUs" for name, number in least.items() if number is not None]
    if first.budget is not None:
        said.append(f"{first.budget:g} USD per hour")
    names = " and ".join({"gpus": "GPUs"}.get(name, name if name in BESIDE else name.upper()) for name in binding)
    verb = f"the limit on {names} binds" if len(binding) == 1 else f"the limits on {names} bind"
    served = f", serves {row['concurrency']:.0f} users and {row['output_tokens_per_s'] / comparison.output_len:.3g} " \
             "requests/s," if any(name in BESIDE for name in binding) else ","
    return (
        f"no layout meets {' and '.join(said) or 'the number of GPUs'}: {verb}; the closest, {where}{served} has a "
        f"TTFT of {in_seconds(row['ttft_s'])} and a TPOT of {in_seconds(row['tpot_s'])}"
    )


BESIDE = ("users", "requests", "budget")
"""Limits that are no times."""
