"""The answer in words: the best layout and its numbers, the runner-up and what would make it win, what is a tie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorcast.cost.evidence import EVIDENCE
from tensorcast.deploy.plan.memory_share import memory_share
from tensorcast.deploy.plan.switches import served_with
from tensorcast.report import units
from tensorcast.report.compare.choices import LIMITS, WRITTEN, Choice, View, between, cost_apart, worth
from tensorcast.report.compare.runner_up import runner_up
from tensorcast.report.units import plural
from tensorcast.search.space import NARROW

if TYPE_CHECKING:
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
    paragraphs: tuple[str, ...] = ()
    """The answer as plain text, after its headline."""


def limit_name(limit: str) -> str:
    """``TTFT`` for the limit ``ttft``."""
    return limit.removesuffix("_s").upper().replace("GPUS", "GPUs")


def asked_for(view: View) -> str:
    """What was asked: ``deepseek-v3 on up to 32 x h200-sxm, vllm, 4,096 tokens in and 1,024 out, TPOT up to 50 ms``."""
    c = view.comparison
    sizes = {task.gpus for task in c.tasks}
    limits = {LIMITS[column]: limit for column, limit in view.limits.items() if limit is not None}
    asked = [f"{name} up to {units.seconds(limit)}" for name, limit in limits.items()]
    devices = f"{units.count(max(sizes))} x {' or '.join(device.name for device in c.devices)}"
    if c.tasks and c.tasks[0].pools:
        devices = _of_each(c)
    least = {"requests/s": c.tasks[0].request_rate, "users at once": c.tasks[0].users} if c.tasks else {}
    asked += [f"at least {units.digits(number)} {what}" for what, number in least.items() if number is not None]
    if c.tasks and c.tasks[0].budget is not None:
        asked.append(f"at most {units.digits(c.tasks[0].budget)} USD per hour")
    if c.tasks and c.tasks[0].confidence is not None and any(limits.values()):
        asked.append(f"each kept with a chance of {100 * c.tasks[0].confidence:g} %")
    engines = " or ".join(dict.fromkeys(task.engine.name for task in c.tasks)) or c.engine.name
    parts = [
        f"{c.model.name} on {'up to ' if len(sizes) > 1 or c.objective == 'gpus' else ''}{devices}", engines,
        f"{units.count(c.input_len)} tokens in and {units.count(c.output_len)} out", *asked,
    ]
    return ", ".join(parts)


def _of_each(comparison: Comparison) -> str:
    """GPUs for prompts and for replies, of two devices: ``16 x h100-sxm for prompts and 8 x h200-sxm for replies``."""
    largest = max(comparison.tasks, key=lambda task: task.gpus)
    first, second = largest.pools or (largest, largest)
    devices = " or ".join(dict.fromkeys(task.device.name for task in comparison.tasks))
    each = first.gpus + second.gpus == largest.gpus
    number, rest = (first.gpus, f"{units.count(second.gpus)} x ") if each else (largest.gpus, "")
    return f"{units.count(number)} x {devices} for prompts and {rest}{second.device.name} for replies"


def conclusion(view: View) -> Conclusion:
    """All of it; every number is computed from the candidates."""
    if view.best is None:
        return _none_meets(view)
    best, second = view.best, view.runner_up
    said, ways = runner_up(view, best, second) if second is not None else ("", ())
    c = view.comparison
    tied = view.kept.where(np.isin(view.kept["candidate"], [one for one in c.ties if one != best["candidate"]]))
    names = [name for name in dict.fromkeys(map(view.name, tied.records())) if name != view.name(best)]
    ties = "No other layout comes within the error of the predictions: the order at the top is clear."
    if names:
        ties = f"Cannot be told apart from it within the error of the predictions: {', '.join(names[:5])}"
        ties += f" and {plural(len(names) - 5, 'more layout')}" if len(names) > 5 else ""
        ties += ". Measure these before choosing."
    untried = c.pruned["layouts"].get(NARROW, 0) and c.kept["tp"].max() == 1
    among = " of the layouts without tensor parallelism (its class runs with no tp above 1 here)" if untried else ""
    how, whole = _how(view, best), f"{said} {'; or '.join(ways)}." if ways else said
    return Conclusion(
        headline=f"{view.name(best)} is best{among}: {worth(view, best)}", numbers=tuple(_numbers(view, best)),
        how=how, runner_up=said, ways=ways, ties=ties, warning=c.warning,
        paragraphs=tuple(text for text in (c.warning, how, whole, ties) if text),
    )


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
            chance = units.chance(row[f"{column[:-2]}_chance"])
            asked = f"; {units.seconds(limit)} kept with a chance of {chance}"
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
        prompts, read, written = cost_apart(view, row)
        apart = f"{units.digits(written)} out, if {units.percent(prompts)} of the bill is for prompts"
        found.append(Number("USD per million tokens in", units.digits(read), apart))
        hour = row["usd_per_hour"]
        month = f"{hour * HOURS_OF_A_MONTH:,.0f} a month"
        found.append(Number("USD per hour", units.digits(hour), f"{month}, {plural(row['gpus'], 'GPU')}"))
    if idle := row["idle_gpus"]:
        said = "this layout has no use for them, but they cost as much" if cost == cost else "no use for them"
        found.append(Number("idle GPUs", units.count(idle), f"of {units.count(row['gpus'] + idle)}: {said}"))
    drawn = {device.name: device.power_w for device in view.comparison.devices}
    of_gpus = [drawn.get(name) for name in row["device"].split(" > ")]
    if None not in of_gpus:
        power = [float(watts) for watts in of_gpus if watts is not None]
        written = row["decode_workers"] * row["replicas"] * row["tp"] * row["dp"] * row["pp"] if len(power) > 1 else 0.0
        watts = power[0] * (row["gpus"] - written) + power[-1] * written
        joules = watts / tokens
        each = " or ".join(dict.fromkeys(units.count(one) for one in power))
        limits = f"at most: {each} W for every GPU; cooling and hosts not counted"
        found.append(Number("kWh per million output tokens", units.digits(joules / 3.6), limits))
    return found


SURE = 0.9
"""Chance of keeping a limit from which on it is kept: the slow end of an 80 % interval keeps it, too."""

AMOUNTS = {"users": "too few users", "requests": "too few requests/s", "budget": "over budget"}
"""What is said of a candidate that misses another limit than a time."""


def verdict(row: Any) -> str:
    """``keeps limits``, ``may miss TTFT`` where its chance to keep that is less than :data:`SURE`, ``over TPOT``."""
    near = [name for column, name in LIMITS.items() if row[f"{column[:-2]}_chance"] < SURE]
    if not row["meets"]:
        return AMOUNTS.get(row["limit"], f"over {limit_name(row['limit'])}")
    return f"may miss {' and '.join(near)}" if near else "keeps limits"


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
    if row["dcp"] > 1:
        parts.append(f"each sequence's cache over {row['dcp']} GPUs")
    if row["pcp"] > 1:
        parts.append(f"each prompt read by {row['pcp']} data-parallel groups together")
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
    spread = [f"attention cut over {plural(row['tp'], 'GPU')}" if row["tp"] > 1 else "attention whole on every GPU"]
    if row["dp"] > 1:
        spread[0] += f", {units.count(row['dp'])} data-parallel {'groups' if row['tp'] > 1 else 'ranks'}"
    if row["ep"] > 1:
        cut = f", each cut over {units.count(row['etp'])}" if row["etp"] > 1 else ""
        spread.append(f"experts dealt out to {plural(row['ep'], 'group')}{cut}")
    elif row["family"] not in ("TP", "1 GPU") and row["etp"] > 1:
        spread.append(f"experts cut over {plural(row['etp'], 'GPU')}")
    if row["pp"] > 1:
        spread.append(plural(row["pp"], "pipeline stage"))
    full = ", all that memory holds" if view.full(row) else ""
    chosen = options(row)
    return (
        f"{start}: {'; '.join(spread)}. {plural(row['concurrency'], 'request')} in flight, "
        f"{plural(row['batch'], 'decoding sequence')} per data-parallel rank{full}. {chosen[:1].upper()}{chosen[1:]}."
    )


def _none_meets(view: View) -> Conclusion:
    """No candidate meets the targets: which limit binds, and how close the best came."""
    if not len(view.kept):
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
    return Conclusion(headline, tuple(_numbers(view, row)), text, paragraphs=(text,))


def evidence(view: View) -> list[tuple[str, float]]:
    """Shares of the best candidate's kernel time by evidence; nothing without candidates."""
    if not len(view.kept):
        return []
    row = view.best if view.best is not None else view.kept.where(slice(1)).records()[0]
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
    ran = {choice.prefill.device.name: choice.prefill for choice in shown}
    for deployment in (ran | {choice.decode.device.name: choice.decode for choice in shown}).values():
        engine, experts = deployment.engine, deployment.raw.facts.num_experts > 0
        share = memory_share(
            engine, deployment.device, deployment.layout, experts, deployment.model.config, phase=deployment.phase,
            served=served_with(deployment.options, deployment.step.plan.all2all),
        )
        precision = deployment.quantization.describe().replace(",", ", ").replace("=", " ")
        lines.append(
            f"On {deployment.device.name}: {precision}; routing {deployment.options.routing}; "
            f"{engine.name} {engine.version} may use {units.percent(float(share))} of the memory"
            f"{COVERS[engine.memory_covers]}."
        )
    if "disaggregated" in view.kept["mode"]:
        lines.append("A > B: workers laid out as A read the prompts and hand them to workers laid out as B.")
    if view.price is not None:
        lines.append(f"Price as given: {units.digits(view.price)} USD per GPU hour.")
    else:
        lines += [f"Cost on {name}: {price}." for name, price in _prices(c).items()]
    return lines


def _prices(comparison: Comparison) -> dict[str, str]:
    """By device, where its price is from."""
    found = {}
    for task in [pool for one in comparison.tasks for pool in one.pools or (one,)]:
        listed = task.device.price_per_hour_usd
        if task.price_per_hour is not None:
            found[task.device.name] = f"{units.digits(task.price_per_hour)} USD per GPU hour, as given"
        elif listed is not None:
            found[task.device.name] = str(listed)
    return found
