"""Which candidates a report shows, what they are called, and where the time of their steps goes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorcast.cost.work import Mask
from tensorcast.deploy.step.breakdown import KERNEL_GROUPS, breakdown, kernel_group
from tensorcast.report import units
from tensorcast.search.candidate_arrays import among, each_once
from tensorcast.serving.objective import OBJECTIVES

if TYPE_CHECKING:
    from tensorcast.deploy.deployment import Deployment
    from tensorcast.deploy.step.price import StepPrice
    from tensorcast.search.candidate_table import Candidates
    from tensorcast.search.compare import Comparison

MOST_SHOWN = 8
"""Layouts in a figure that has one bar per layout: more are no longer read."""

PARTS = (*KERNEL_GROUPS[:-1], "launches and engine", "waiting")
"""Where a step's time goes. ``waiting``: pipeline stages for each other, overlapped kernels for shared resources."""


LIMITS = {"ttft_s": "TTFT", "tpot_s": "TPOT"}
"""Names of the limits by their columns, in the order of ``Comparison.targets``."""

WRITTEN: dict[str, Callable[[float], str]] = {
    "tokens_per_s_per_gpu": units.rate, "tokens_per_s_per_user": units.rate, "request_s": units.seconds,
    "ttft_s": units.seconds, "tpot_s": units.seconds, "cost_per_million_tokens": units.digits, "gpus": units.count,
    "output_tokens_per_s": units.rate, "concurrency": units.count,
}
"""How a column's values are written."""


@dataclass(frozen=True)
class StepParts:
    """A step's seconds by :data:`PARTS`, which add up to ``seconds``, and the communication hidden behind them."""

    seconds: float
    parts: dict[str, float]
    hidden_s: float


@dataclass(frozen=True)
class Choice:
    """One candidate with its name in figures and the deployments behind it."""

    row: dict[str, Any]
    label: str
    prefill: Deployment
    decode: Deployment


class View:
    """A comparison as a report reads it: its candidates ranked, the best candidate of each layout, their deployments.

    ``kept``: its candidates with this price; ``order``: where they stand, best first. ``limits``: in seconds, by
    column. ``cached_tokens``: in a sequence's cache halfway through its answer.
    """

    def __init__(self, comparison: Comparison, price: float | None = None) -> None:
        self.comparison = comparison
        self.objective = OBJECTIVES[comparison.objective]
        self.write = WRITTEN[self.objective.column]
        self.kept = comparison.kept
        self.best, self.runner_up = comparison.best, comparison.runner_up
        if price is not None:
            per_second = self.kept["gpus"] * price / 3600.0
            cost = 1e6 * per_second / self.kept["output_tokens_per_s"]
            own = {"cost_per_million_tokens": cost, "usd_per_hour": 3600.0 * per_second}
            if self.objective.name == "cost":
                own["lower_bound"] = cost / self.kept["cost_per_million_tokens"] * self.kept["lower_bound"]
            self.kept = replace(self.kept, columns=self.kept.columns | own)
            self.best, self.runner_up = self.record(self.best), self.record(self.runner_up)
        self.order = self.objective.order(self.kept.columns)
        self.price = price
        self.limits = dict(zip(LIMITS, comparison.targets, strict=True))
        self.cached_tokens = comparison.input_len + comparison.output_len // 2
        self.several_devices, self.several_engines = (len({*self.kept[name]}) > 1 for name in ("device", "engine"))
        # pools take as many GPUs as match, so their number alone does not say that several clusters were asked about
        self.several_sizes = len({*self.kept["gpus"][self.kept["mode"] == "aggregated"]}) > 1
        self.layout_columns = [
            "mode", "device", "engine", "layout", "prefill_layout", *(["gpus"] if self.several_sizes else [])
        ]

    def record(self, row: dict[str, Any] | None) -> dict[str, Any] | None:
        """``row`` of the comparison as this view has it, with its own price."""
        if row is None:
            return None
        return next(iter(self.kept.where(self.kept["candidate"] == row["candidate"]).records()), dict(row))

    @cached_property
    def ranked(self) -> Candidates:
        """All candidates, best first."""
        return self.kept.where(self.order)

    @cached_property
    def per_layout(self) -> Candidates:
        """The best candidate of each layout, best first; the comparison's own best and runner-up stand for theirs."""
        order = self.order
        for row in (self.runner_up, self.best):
            if row is not None:
                others = self.kept["candidate"][order] != row["candidate"]
                order = order[np.argsort(others, kind="stable")]
        return self.kept.where(self.kept.first_of(self.layout_columns, order))

    def name(self, row: Any) -> str:
        """What tells a candidate's layout from all others here: ``tp8-dp4-ep32``, ``2 x tp4-dp1 on h200-sxm``."""
        parts = [(row["replicas"], row["layout"])]
        if row["mode"] == "disaggregated":
            workers = [row["replicas"] * row[f"{phase}_workers"] for phase in ("prefill", "decode")]
            parts = list(zip(workers, (row["prefill_layout"], row["layout"]), strict=True))
        layout = " > ".join(f"{units.count(copies)} x {one}" if copies > 1 else one for copies, one in parts)
        place = []
        if self.several_sizes:
            place.append(units.count(row["gpus"]))
        if self.several_devices and " > " not in row["device"]:  # pools say theirs
            place.append(row["device"])
        name = f"{layout} on {' '.join(place)}" if place else layout
        return f"{name} under {row['engine']}" if self.several_engines else name

    def of_layout(self, row: dict[str, Any]) -> Mask:
        """Which candidates are of the layout that ``row`` is one of."""
        found: Mask = np.all([self.kept[column] == row[column] for column in self.layout_columns], axis=0)
        return found

    @cached_property
    def shown(self) -> list[Choice]:
        """Layouts to draw, best first, with their deployments: the best two, then the best of each form and family.

        At most :data:`MOST_SHOWN`; what is left is filled with the next best.
        """
        ranked = self.per_layout
        every = np.arange(len(ranked))
        forms = each_once(every[:2], ranked.first_of(["mode"]))
        first = each_once(forms, ranked.first_of(["family"])[: max(0, MOST_SHOWN - len(forms))])
        rest = every[~among(every, first)][: max(0, MOST_SHOWN - len(first))]
        rows = ranked.where(each_once(first, rest)).records()
        return [Choice(row, self.name(row), *self.comparison.deployments(row["candidate"])) for row in rows]

    def full(self, row: dict[str, Any]) -> bool:
        """Whether memory ends a candidate's batch: it decodes as many sequences as fit, but for a hundredth."""
        return bool(row["batch"] >= 0.99 * row["largest_batch"])

    @cached_property
    def load(self) -> float:
        """Decoding sequences per GPU at which layouts are set side by side: those of the first shown."""
        row = self.shown[0].row
        return float(row["batch"] / (row["tp"] * row["pp"]))

    def batch_at_load(self, choice: Choice) -> tuple[int, bool]:
        """Sequences per dp rank at :attr:`load`, and whether they all fit (else: as many as do)."""
        row = choice.row
        wanted = max(1, round(self.load * row["tp"] * row["pp"]))
        largest = int(row["largest_batch"])
        return max(1, min(wanted, largest)), wanted <= largest

    def decode_price(self, choice: Choice, batch: float) -> StepPrice:
        """A decode step of ``batch`` sequences per dp rank, halfway through the answers."""
        return self.comparison.step_price(choice.decode, float(batch), 1.0, float(self.cached_tokens))


def interval(view: View, row: dict[str, Any], column: str) -> tuple[float, float]:
    """Lower and upper end of the 80 % interval of a column's value; one number where a column is certain."""
    if column in ("ttft_s", "tpot_s"):
        stem = column.removesuffix("_s")
        return row[f"{stem}_low_s"], row[f"{stem}_high_s"]
    if column == "tokens_per_s_per_user":
        return 1.0 / row["tpot_high_s"], 1.0 / row["tpot_low_s"]
    if column in CERTAIN:
        return row[column], row[column]
    tokens = row["output_tokens_per_s"]
    slow, fast = row["output_tokens_low_per_s"] / tokens, row["output_tokens_high_per_s"] / tokens
    if column in ("cost_per_million_tokens", "request_s"):
        return row[column] / fast, row[column] / slow
    return row[column] * slow, row[column] * fast


def cost_apart(view: View, row: dict[str, Any]) -> tuple[float, float, float]:
    """The part of the bill that prompts cause, and US dollars per million tokens of prompts and of replies.

    Of two pools each pays for its GPUs. One pool's bill is parted as a prompt's steps and a reply's share of decode
    steps take time by themselves.
    """
    c = view.comparison
    if row["mode"] == "disaggregated":
        written = row["decode_workers"] * row["replicas"] * row["tp"] * row["dp"] * row["pp"] / row["gpus"]
        second = next((task.pools[-1].price for task in c.tasks if task.pools), None)
        if second is not None and view.price is None and " > " in row["device"]:
            written *= second * row["gpus"] / row["usd_per_hour"]
    else:
        load = c.behind[row["candidate"]][0].load
        reply_s = row["decode_step_s"] / row["batch"] * float(load.decode_steps(row["mtp_depth"]))
        prompt_s = row["prefill_step_s"] * math.ceil((load.input_len - load.prefix_cached) / row["chunk_tokens"])
        written = reply_s / (reply_s + prompt_s)
    usd = row["cost_per_million_tokens"]
    return 1.0 - written, usd * (1.0 - written) * c.output_len / c.input_len, usd * written


CERTAIN = ("gpus", "concurrency")
"""Columns that are chosen, not predicted."""


def worth(view: View, row: dict[str, Any]) -> str:
    """What the objective makes of a candidate, with its interval and the bound that is reached with a chance."""
    column = view.objective.column
    within = f" ({between(view, row, column)})" if column not in CERTAIN else ""
    chance = view.comparison.tasks[0].confidence if view.comparison.tasks else None
    sure = f"; {view.write(row['lower_bound'])} with a chance of {100 * chance:g} %" if chance and within else ""
    return f"{view.write(row[column])} {view.objective.words}{within}{sure}"


def between(view: View, row: dict[str, Any], column: str) -> str:
    """``289 to 350``, with each end's unit where they differ: ``950 us to 1.05 ms``."""
    start, end = (WRITTEN[column](value) for value in interval(view, row, column))
    number, _, unit = start.partition(" ")
    return f"{number} to {end}" if unit and end.endswith(f" {unit}") else f"{start} to {end}"


def step_parts(deployment: Deployment, price: StepPrice) -> StepParts:
    """Split a step into :data:`PARTS`.

    Launches are what kernel times hold beside compute and traffic. What other kernels hide is in no part:
    communication of the token exchange, and shared experts (dense GEMMs) on a stream of their own.
    """
    made = breakdown(price, deployment.layout.pp, kernel_group)
    parts = {name: group.seconds - group.launch_s for name, group in made.groups.items()}
    parts = {name: parts.get(name, 0.0) for name in PARTS}
    launches = sum(group.launch_s for group in made.groups.values())
    for name, less in (("token exchange", made.hidden_comm_s), ("dense GEMM", made.hidden_s - made.hidden_comm_s)):
        parts[name] = max(0.0, parts[name] - max(0.0, less))
    parts["launches and engine"] = launches + made.overhead_s
    seconds = float(price.seconds)
    whole = sum(parts.values())
    if whole > seconds:  # more was hidden than the two parts that may be: each gives up its share
        parts = {name: value * seconds / whole for name, value in parts.items()}
    else:
        parts["waiting"] = seconds - whole
    return StepParts(seconds, parts, max(0.0, made.hidden_comm_s))
