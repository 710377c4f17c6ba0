"""What was fitted to served runs, what was left out, and what the error that remains is made of: ``serving.md``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensorcast.errors import InputError
from tensorcast.predict.error_causes import attribute
from tensorcast.predict.score import errors, left_out
from tensorcast.profiles.engine import AXES, EngineFit
from tensorcast.profiles.store import load_engine

if TYPE_CHECKING:
    import pandas as pd

Lines = list[list[str]]

PARTS = {
    "kernels": ("kernels", "a factor on kernel time per network, precision, device and layout"),
    "step": ("engine: per step", "seconds more per step, per release and device"),
    "batch": ("engine: scheduling", "seconds more per sequence of a step, per release and device"),
    "prompts": ("engine: chunked prefill", "a factor on the time that prompts take of steps, per release and device"),
    "lengths": ("workload: lengths", "a factor per prompt and reply length"),
    "record": ("workload: not recorded", "what runs that do not state their workers err more than the others"),
}
"""Parts of the error, by what is taken out of it."""


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def markdown(head: list[str], rows: Lines) -> list[str]:
    """A table, first column to the left."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(head), "|---|" + "---:|" * (len(head) - 1), *map(line, rows)]


def headline(summary: dict[str, Any]) -> list[str]:
    """The score on rows that nothing was fitted to, in one line."""
    fresh = summary.get("left_out") or {}
    if not (fresh.get("tpot_s", {}).get("rows") and fresh.get("ttft_s", {}).get("rows")):
        return []
    tpot, ttft = fresh["tpot_s"], fresh["ttft_s"]
    text = (
        f"**On the {tpot['rows']} rows that no engine constant was fitted to: time per token off by "
        f"{percent(tpot['median'])} in the median and {percent(tpot['mean'])} in the mean, time to first token by "
        f"{percent(ttft['median'])} and {percent(ttft['mean'])}.**"
    )
    return [text, ""]


def fits(frame: pd.DataFrame, words: dict[str, str]) -> list[str]:
    """What was fitted to which runs, and errors on those and on the others."""
    measured = [name for name in words if f"measured_{name}" in frame]
    if not measured:
        return []
    found = {name: fit for name in sorted(set(frame["engine"])) if (fit := _fit(name)) is not None}
    text = (
        "`make engines` fits what an engine does beside its kernels to measured runs: seconds per layer and how many "
        "times as long as their kernels steps with prompts take under load to aggregated runs, seconds per first token "
        "to the same, per hand-over behind Dynamo and how much longer decode steps of pools take to disaggregated runs "
        "whose workers are known. It takes groups of runs (model, "
        "device, layout, lengths) whose hash is even. Left out is every other row, less records that measured the same "
        "to the last digit as one that was fitted to. Each network's runs are fitted to alone; an engine has the "
        "median of its networks, drawn towards that of all engines' networks, so that none of them weighs much. Picked "
        "by looking at all runs, none left out: how much tokens of a step resemble one another (routing alike), how "
        "strongly engines are drawn, two waiting steps, how many prompts ride together, how records are read, their "
        "default workers, SGLang's intervals in pools, the width of intervals of pools."
    )
    lines = ["## Fitted and left out", "", text, ""]
    rows = []
    fresh = left_out(frame)
    for label, chosen in (("fitted to", frame[~fresh]), ("left out", frame[fresh])):
        for name in [name for name in ("tpot_s", "ttft_s") if name in measured] or measured:
            if (e := errors(chosen, name))["rows"]:
                rows.append([label, words[name], percent(e["median"]), percent(e["mean"]), str(e["rows"])])
    lines += [*markdown(["rows", "", "median error", "mean", "rows"], rows), ""]
    if found:
        lines += [*_overheads(found), ""]
    return lines


def _fit(engine: str) -> EngineFit | None:
    try:
        return load_engine(engine).fitted
    except InputError:  # its rows say so
        return None


def _overheads(found: dict[str, EngineFit]) -> list[str]:
    """A line per engine: its overheads, and the error of the time per token before and after."""
    head = [
        "engine", "us per layer", "give or take", "prompts under load", "give or take", "runs",
        "ms per first token", "and us per token of its prompt", "ms per hand-over behind Dynamo", "decode in pools",
        "serving errs by, token", "first token",
        "runs left out, before", "after", "models not fitted to, before", "after",
    ]  # fmt: skip
    words = ("tpot_s", "ttft_s")
    rows = [
        [
            name, f"{1e6 * fit.layer_s:.1f}", f"{1e6 * fit.layer_error_s:.1f}", f"x {fit.prefill_factor:.2f}",
            percent(fit.prefill_error), str(fit.rows), _ms(fit.first_token_s), f"{1e6 * fit.prompt_token_s:.1f}",
            _ms(fit.hand_over_s), f"x {fit.pool_factor:.2f}",
            *(" to ".join(percent(fit.beside_steps(new).get(time)) for new in (0, AXES)) for time in words),
            percent(fit.left_out_before), percent(fit.left_out_error),
            percent(fit.unseen_before), percent(fit.unseen_error),
        ]
        for name, fit in found.items()
    ]  # fmt: skip
    text = (
        "Overheads, and median errors of the time per token of aggregated runs as published and as fitted: runs left "
        "out, and each model by constants that nothing of it was fitted to. Give or take: the median distance of a "
        "model's own constant from the one drawn from others (of seconds per layer what errors of its kernels do not "
        "explain), part of every interval, as is what serving errs by: so much beside steps that four in five runs "
        "left out lie in theirs, where nothing is new and where model, device and release are."
    )
    return [text, "", *markdown(head, rows)]


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:g}"


def remaining(frame: pd.DataFrame) -> list[str]:
    """What the error on rows left out is made of."""
    found = attribute(frame)
    if not found:
        return []
    parts = sorted(found["parts"].items(), key=lambda item: -item[1]["share"])
    whole = {
        word: sum(part["share"] for name, part in parts if PARTS[name][0].startswith(word))
        for word in ("kernels", "engine", "workload")
    }
    named = ", ".join(f"{word} {percent(share)}" for word, share in whole.items())
    largest = "; ".join(f"{PARTS[name][0]}, {percent(part['share'])}" for name, part in parts[:3])
    text = (
        f"Of the error of the time per token on the {found['rows']} rows left out (sum of |log(measured / predicted)|, "
        f"mean {percent(found['mean'])}): {named}; the rest, {percent(found['rest'])}, follows none of the forms "
        f"below. The three largest causes: {largest}."
    )
    rows = [[PARTS[name][0], PARTS[name][1], percent(part["share"]), percent(part["alone"])] for name, part in parts]
    rows.append(["rest", "", percent(found["rest"]), ""])
    table = markdown(["cause", "what is taken out", "share", "alone"], rows)
    how = (
        "An attribution by definition, not a proof. Every cause is fitted by least absolute error to the rows left "
        "out themselves, in the form that the table says. Alone: how much less error is left with this cause alone "
        "taken out. Share: the same when it joins the others, mean over all orders, so that shares add up. Errors are "
        "counted over the degrees of freedom that are left."
    )
    return ["## What the error is made of", "", text, "", *table, "", how, "", *_checks(found)]


def _checks(found: dict[str, Any]) -> list[str]:
    """What else is known of kernels and records, apart from the attribution."""
    lines = [
        f"- Kernels alone, as far off as on held-out kernel measurements, would leave a mean error of "
        f"{percent(found['kernels_held_out'])}: {percent(found['kernels_held_out'] / found['mean'])} of the whole. "
        "Shapes unlike any measured, and kernels of releases that were not, may err more.",
        f"- {found['open_rows']} of the rows do not say how many workers ran.",
    ]
    for key, words in (
        ("repeats", "runs alike in every recorded column"),
        ("releases", "runs alike but for the engine's release or for the model's name, its network the same"),
    ):
        spread = found[key]
        if spread["rows"]:
            share = percent(spread["mean"] / found["mean"])
            apart = f"lie {percent(spread['mean'])} from their median (mean), {share} of the mean error."
            lines.append(f"- {spread['rows']} {words} {apart}")
    return [*lines, ""]
