"""The answer in words: the best layout and its numbers, the runner-up and what would make it win, what is a tie."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from tensorcast.cost.evidence import EVIDENCE, NORMAL_90
from tensorcast.deploy.deployment import memory_share
from tensorcast.report import units
from tensorcast.report.compare.choices import LIMITS, PARTS, WRITTEN, Choice, View, step_parts
from tensorcast.report.units import plural
from tensorcast.search.space import NARROW

if TYPE_CHECKING:
    import pandas as pd

    from tensorcast.search.compare import Comparison

COVERS = {"everything": "", "weights_and_cache": " for weights and cache", "cache": " that these leave for the cache"}
"""What an engine's share of the memory is for."""
EXCHANGES = {
    "allgather_reducescatter": "tokens by all-gather and reduce-scatter",
    "high_throughput": "high-throughput all-to-all", "low_latency": "low-latency all-to-all", "direct": "all-to-all",
}
"""How tokens reach their experts, for people."""


@dataclass(frozen=True)
class Number:
    """One of the best layout's numbers: its name, value, and what to hold it against."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Conclusion:
    """What the page starts with."""

    headline: str
    numbers: tuple[Number, ...]
    how: str = ""
    runner_up: str = ""
    ways: tuple[str, ...] = ()
    ties: str = ""
    warning: str = ""
    """What to know before trusting the headline, if anything."""

    @property
    def paragraphs(self) -> list[str]:
        """The answer as plain text, after its headline."""
        second = f"{self.runner_up} {'; or '.join(self.ways)}." if self.ways else self.runner_up
        return [text for text in (self.warning, self.how, second, self.ties) if text]


def limit_name(limit: str) -> str:
    """``TTFT`` for the limit ``ttft``."""
    return limit.removesuffix("_s").upper().replace("GPUS", "GPUs")


def asked_for(view: View) -> str:
    """What was asked: ``deepseek-v3 on up to 32 x h200-sxm, vllm, 4,096 tokens in and 1,024 out, TPOT up to 50 ms``."""
    c = view.comparison
    sizes = {task.gpus for task in c.tasks}
    limits = {LIMITS[column]: limit for column, limit in view.limits.items() if limit is not None}
    asked = [f"{name} up to {units.seconds(limit)}" for name, limit in limits.items()]
    devices = " or ".join(device.name for device in c.devices)
    parts = [
        f"{c.model.name} on {'up to ' if len(sizes) > 1 or c.objective == 'gpus' else ''}{units.count(max(sizes))} x "
        f"{devices}", c.engine.name,
        f"{units.count(c.input_len)} tokens in and {units.count(c.output_len)} out", *asked,
    ]
    return ", ".join(parts)


def conclusion(view: View) -> Conclusion:
    """All of it; every number is computed from the candidates."""
    if view.best is None:
        return _none_meets(view)
    best, second = view.best, view.runner_up
    runner_up, ways = _runner_up(view, best, second) if second is not None else ("", ())
    c = view.comparison
    untried = c.pruned["layouts"].get(NARROW, 0) and c.candidates["tp"].max() == 1
    among = " of the layouts without tensor parallelism (its class runs with no tp above 1 here)" if untried else ""
    return Conclusion(
        headline=f"{view.name(best)} is best{among}: {_worth(view, best)}", numbers=tuple(_numbers(view, best)),
        how=_how(view, best), runner_up=runner_up, ways=ways, ties=_ties(view, best), warning=view.comparison.warning,
    )


def interval(view: View, row: dict[str, Any], column: str) -> tuple[float, float]:
    """Lower and upper end of a column's value, carried from the kernels' errors through TTFT and TPOT."""
    if column in ("ttft_s", "tpot_s"):
        stem = column.removesuffix("_s")
        return row[f"{stem}_low_s"], row[f"{stem}_high_s"]
    if column == "tokens_per_s_per_user":
        return 1.0 / row["tpot_high_s"], 1.0 / row["tpot_low_s"]
    if column == "gpus":
        return row["gpus"], row["gpus"]
    length = view.comparison.output_len
    request = row["ttft_s"] + length * row["tpot_s"]
    short = (row["ttft_low_s"] + length * row["tpot_low_s"]) / request
    long = (row["ttft_high_s"] + length * row["tpot_high_s"]) / request
    if column in ("cost_per_million_tokens", "request_s"):
        return row[column] * short, row[column] * long
    return row[column] / long, row[column] / short


def _worth(view: View, row: dict[str, Any]) -> str:
    column = view.objective.column
    within = f" ({between(view, row, column)})" if column != "gpus" else ""
    return f"{view.write(row[column])} {view.objective.words}{within}"


def between(view: View, row: dict[str, Any], column: str) -> str:
    """``289 to 350``, with each end's unit where they differ: ``950 us to 1.05 ms``."""
    start, end = (WRITTEN[column](value) for value in interval(view, row, column))
    number, _, unit = start.partition(" ")
    return f"{number} to {end}" if unit and end.endswith(f" {unit}") else f"{start} to {end}"


HOURS_OF_A_MONTH = 730.0


def _numbers(view: View, row: Any) -> list[Number]:
    found = []
    speeds = {
        "tokens_per_s_per_gpu": "tokens/s per GPU", "tokens_per_s_per_user": "tokens/s per user",
        "ttft_s": "time to first token", "tpot_s": "time per output token",
    }  # fmt: skip
    for column, name in speeds.items():
        limit, asked = view.limits.get(column), ""
        if limit is not None:
            # four in five true values lie between value / factor and value * factor, log-normally
            spread = math.log(row[f"{column[:-2]}_high_s"] / row[column]) / NORMAL_90
            chance = NormalDist(math.log(row[column]), spread).cdf(math.log(limit))
            asked = f"; {units.seconds(limit)} kept with a chance of {100 * chance:.0f} %"
        found.append(Number(name, WRITTEN[column](row[column]), between(view, row, column) + asked))
    share = units.percent(row["memory_bytes"] / row["capacity_bytes"])
    capacity = units.nbytes(row["capacity_bytes"])
    found.append(Number("memory per GPU", units.nbytes(row["memory_bytes"]), f"{share} of {capacity}"))
    tokens, requests = row["output_tokens_per_s"], row["output_tokens_per_s"] / view.comparison.output_len
    users = f"{requests:.3g} requests/s to {plural(round(row['concurrency']), 'user')} at once"
    found.insert(0, Number("tokens/s of all GPUs", units.rate(tokens), users))
    cost = row["cost_per_million_tokens"]
    if cost == cost and cost is not None:
        ends = between(view, row, "cost_per_million_tokens")
        found.append(Number("USD per million output tokens", units.digits(cost), ends))
        hour = cost * tokens * 3600 / 1e6
        month = f"{hour * HOURS_OF_A_MONTH:,.0f} a month"
        found.append(Number("USD per hour", units.digits(hour), f"{month}, {plural(row['gpus'], 'GPU')}"))
    asked_for = [t.gpus for t in view.comparison.tasks if t.device.name == row["device"] and t.gpus >= row["gpus"]]
    idle = min(asked_for, default=0) - row["gpus"]
    if idle > 0 and view.comparison.objective != "gpus":
        said = "the best layout has no use for them, but they cost as much" if cost == cost else "no use for them"
        found.append(Number("idle GPUs", units.count(idle), f"of {units.count(min(asked_for))}: {said}"))
    return found


def options(row: dict[str, Any]) -> str:
    """What a candidate chose beside its layout, only where it departs from doing nothing."""
    parts = []
    if row["all2all"] not in (None, "none") and row["all2all"] == row["all2all"]:
        dispatch = f" in {row['dispatch']}" if row["dispatch"] else ""
        back = f", results back in {row['combine']}" if row["combine"] else ""
        parts.append(f"{EXCHANGES.get(row['all2all'], row['all2all'])}{dispatch}{back}")
    parts.append(f"KV cache {row['kv_dtype']}")
    if row["placement"] != "linear":
        parts.append(f"experts placed by {row['placement']}")
    if row["redundant_experts"]:
        parts.append(plural(row["redundant_experts"], "redundant expert"))
    if row["external_shared_experts"]:
        parts.append(f"shared experts on {plural(row['external_shared_experts'], 'GPU')} of their own")
    if row["dual_batch_overlap"]:
        parts.append("dual-batch overlap")
    if row["mtp_depth"]:
        parts.append(f"{plural(row['mtp_depth'], 'drafted token')} per step")
    if row["mode"] == "aggregated" and row["chunk_tokens"]:
        parts.append(f"prompts in chunks of {units.count(row['chunk_tokens'])}")
    return ", ".join(parts)


def _how(view: View, row: dict[str, Any]) -> str:
    """How the layout serves: on what, at which load, with which options."""
    if row["mode"] == "disaggregated":
        prefill, decode = (row[name] * row["replicas"] for name in ("prefill_workers", "decode_workers"))
        start = (
            f"Prompts run on {plural(prefill, 'prefill worker')} ({row['prefill_layout']}), answers on "
            f"{plural(decode, 'decode worker')} ({row['layout']}), {plural(row['gpus'], 'GPU')} in all"
        )
    else:
        copies = f" as {plural(row['replicas'], 'replica')}" if row["replicas"] > 1 else ""
        start = f"Prompts and answers share {plural(row['gpus'], 'GPU')}{copies}"
    full = ", all that memory holds" if view.full(row) else ""
    chosen = options(row)
    return (
        f"{start}: {_spread(row)}. {plural(row['concurrency'], 'request')} in flight, "
        f"{plural(row['batch'], 'decoding sequence')} per data-parallel rank{full}. {chosen[:1].upper()}{chosen[1:]}."
    )


def _spread(row: dict[str, Any]) -> str:
    """A layout in words: ``attention cut over 4 GPUs, 2 such groups side by side; whole experts over 8 GPUs``."""
    attention = f"attention cut over {plural(row['tp'], 'GPU')}" if row["tp"] > 1 else "attention whole on every GPU"
    if row["dp"] > 1:
        attention += f", {units.count(row['dp'])} data-parallel {'groups' if row['tp'] > 1 else 'ranks'}"
    parts = [attention]
    if row["ep"] > 1:
        cut = f", each cut over {units.count(row['etp'])}" if row["etp"] > 1 else ""
        parts.append(f"experts dealt out to {plural(row['ep'], 'group')}{cut}")
    elif row["family"] not in ("TP", "1 GPU") and row["etp"] > 1:
        parts.append(f"experts cut over {plural(row['etp'], 'GPU')}")
    if row["pp"] > 1:
        parts.append(plural(row["pp"], "pipeline stage"))
    return "; ".join(parts)


def _runner_up(view: View, best: dict[str, Any], second: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The runner-up in a sentence, and each thing that would make it win."""
    worse = second[view.objective.column] / best[view.objective.column] - 1
    gap = worse if view.objective.less else -worse  # as a share of the best's value
    text = f"Runner-up: {view.name(second)} with {_worth(view, second)}, "
    text += f"{units.percent(gap)} {'more' if view.objective.less else 'less'}." if gap > 0.0005 else "the same."
    other_limits = [
        f"if {LIMITS[column]} up to {units.seconds(limit)} were allowed" if looser
        else f"if {LIMITS[column]} had to stay under {units.seconds(limit)}"
        for column, limit, looser in turning_points(view, second)
        if units.seconds(limit) != units.seconds(view.limits[column] or 0.0)
    ]
    ways = (*other_limits, *_memory(view, second), *_faster(view, second, gap))
    return (f"{text} It would win" if ways else text), ways


def turning_points(view: View, second: dict[str, Any]) -> list[tuple[str, float, bool]]:
    """Where another value of one limit makes ``second``'s layout the best of all, the other limit as asked.

    (column, limit in seconds, whether it is looser than asked): the least of the looser ones, from there on; and the
    most of the tighter ones, just under it.
    """
    objective = view.objective
    frame = view.frame.assign(own=view.frame.index.isin(view.of_layout(second).index))
    found = []
    for column, limit in view.limits.items():
        (other, most), *_ = (item for item in view.limits.items() if item[0] != column)
        allowed = frame if most is None else frame[frame[other] <= most]
        now = float("inf") if limit is None else limit
        leads = _leader_by_limit(allowed, column, objective.column, objective.less)
        looser = leads[leads["own"] & (leads[column] > now)]
        tighter = leads[leads["own"] & (leads[column] < now)]
        if not looser.empty:
            found.append((column, float(looser[column].iloc[0]), True))
        if not tighter.empty:
            following = leads.loc[leads[column] > tighter[column].iloc[-1], column]
            found.append((column, min(now, float(following.min())), False))
    return found


def _leader_by_limit(frame: pd.DataFrame, column: str, value: str, less: bool) -> pd.DataFrame:
    """The best candidate so far at each value of a limit, from tight to loose; rows where the leader changes."""
    ordered = frame.sort_values([column, value], ascending=[True, less], kind="stable")
    so_far = ordered[value].cummin() if less else ordered[value].cummax()
    return ordered[(ordered[value] == so_far) & (so_far != so_far.shift())]


def _memory(view: View, second: dict[str, Any]) -> list[str]:
    """More memory, where memory ends the runner-up's batch before a limit does and it still gains from load."""
    own = view.of_layout(second).sort_values("batch")
    column, less = view.objective.column, view.objective.less
    if not view.full(second) or column not in ("tokens_per_s_per_gpu", "cost_per_million_tokens"):
        return []
    smaller = own[own["batch"] < second["batch"]]
    if smaller.empty or (smaller[column].iloc[-1] < second[column]) == less:
        return []
    return [
        "with more room for its KV cache, if that lifts its batch far enough over "
        f"{plural(second['batch'], 'sequence')} per rank, all that fit now"
    ]


def _faster(view: View, second: dict[str, Any], gap: float) -> list[str]:
    """The parts of its decode step that alone could close the ``gap``, by how much they would have to shrink."""
    if view.objective.column == "gpus":
        return []
    choices = {choice.row["candidate"]: choice for choice in view.shown}
    if second["candidate"] not in choices:
        return []
    choice = choices[second["candidate"]]
    split = step_parts(choice.decode, view.decode_price(choice, max(1.0, second["batch"])))
    needed = gap / (1 + gap) if view.objective.less else gap
    wanted = needed * split.seconds
    able = sorted((wanted / split.parts[part], part) for part in PARTS if split.parts[part] > wanted)
    less = f"if its requests took {units.percent(needed)} less time at the same load"
    if not able:
        return [f"{less}, more than any one part of its step offers"]
    share, part = able[0]
    return [f"{less}, as with its time for {part} cut by {units.percent(share)}"]


def _ties(view: View, best: dict[str, Any]) -> str:
    frame = view.frame
    ids = [name for name in view.comparison.ties if name != best["candidate"]]
    rows = frame[frame["candidate"].isin(ids)]
    names = list(dict.fromkeys(view.name(row) for _, row in rows.iterrows()))
    names = [name for name in names if name != view.name(best)]
    if not names:
        return "No other layout comes within the error of the predictions: the order at the top is clear."
    shown = ", ".join(names[:5]) + (f" and {plural(len(names) - 5, 'more layout')}" if len(names) > 5 else "")
    return f"Cannot be told apart from it within the error of the predictions: {shown}. Measure these before choosing."


def _none_meets(view: View) -> Conclusion:
    """No candidate meets the targets: which limit binds, and how close the best came."""
    if view.frame.empty:
        return Conclusion("No layout can run this: see what was ruled out below", ())
    closest, binding = view.comparison.closest
    row = view.record(closest) or closest
    names = ["the number of GPUs" if limit == "gpus" else limit_name(limit) for limit in binding]
    verb = "binds" if len(names) == 1 else "bind"
    over = [
        f"{LIMITS[column]} {units.seconds(row[column])} where {units.seconds(limit)} was asked, "
        f"{units.percent(row[column] / limit - 1)} over"
        for column, limit in view.limits.items()
        if limit is not None and row[column] > limit
    ]
    if "gpus" in binding:
        there = max((task.gpus for task in view.comparison.tasks), default=0)
        over.append(f"it takes {plural(row['gpus'], 'GPU')} where there are {units.count(there)}")
    text = f"Closest is {view.name(row)} with {plural(row['concurrency'], 'request')} in flight: {'; '.join(over)}."
    headline = f"No layout meets the targets: {' and '.join(names)} {verb}"
    return Conclusion(headline, tuple(_numbers(view, row)), text)


def evidence(view: View) -> list[tuple[str, float]]:
    """Shares of the best candidate's kernel time by evidence; nothing without candidates."""
    if view.frame.empty:
        return []
    row = view.best if view.best is not None else view.frame.iloc[0].to_dict()
    return [(name, float(row[f"share_{name}"])) for name in EVIDENCE]


def assumptions(view: View, shown: list[Choice]) -> list[str]:
    """What the numbers stand on: load, routing, precision, memory."""
    c = view.comparison
    lines = [
        f"Every request brings {units.count(c.input_len)} tokens and asks for {units.count(c.output_len)}; latencies "
        "are means in the steady state at a constant number of requests in flight.",
        f"Steps are split into parts at {units.count(view.cached_tokens)} cached tokens, halfway through an answer.",
        "Intervals carry the errors of the kernels' predictions on held-out measurements, and no others: 80 % of all "
        "values should lie inside as far as kernels go.",
    ]
    for deployment in {choice.decode.device.name: choice.decode for choice in shown}.values():
        engine, experts = deployment.engine, deployment.raw.facts.num_experts > 0
        share = memory_share(
            engine, deployment.device, deployment.layout, experts, deployment.model.config, phase=deployment.phase,
            exchange=deployment.step.plan.all2all,
        )
        precision = deployment.quantization.describe().replace(",", ", ").replace("=", " ")
        lines.append(
            f"On {deployment.device.name}: {precision}; routing {deployment.options.routing}; "
            f"{engine.name} {engine.version} may use {units.percent(float(share))} of the memory"
            f"{COVERS[engine.memory_covers]}."
        )
    if (view.frame["mode"] == "disaggregated").any():
        lines.append("A > B: workers laid out as A read the prompts and hand them to workers laid out as B.")
    if view.price is not None:
        lines.append(f"Price as given: {units.digits(view.price)} USD per GPU hour.")
    else:
        lines += [f"Cost on {name}: {price}." for name, price in _prices(c).items()]
    return lines


def _prices(comparison: Comparison) -> dict[str, str]:
    """By device, where its price is from."""
    found = {}
    for task in comparison.tasks:
        listed = task.device.price_per_hour_usd
        if task.price_per_hour is not None:
            found[task.device.name] = f"{units.digits(task.price_per_hour)} USD per GPU hour, as given"
        elif listed is not None:
            found[task.device.name] = str(listed)
    return found
