"""A study of expert placements in sentences, table rows and plain values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorcast.report import units
from tensorcast.report.sections import Section, Table
from tensorcast.report.units import plural

if TYPE_CHECKING:
    from tensorcast.deploy.expert_study import ExpertStudy, Move, PlacedChoice

MEANING = {
    "linear": "in order", "trivial": "in order, copies idle", "round_robin": "round robin", "eplb": "EPLB",
    "eplb_global": "EPLB, global",
}
LEGEND = (
    "EPLB is DeepSeek's balancer as the engine runs it, groups of the router on nodes where they divide; global, over "
    "all ranks at once (SGLang: --eplb-algorithm deepseek). busiest, worst: the busiest rank's load over the mean, of "
    "all layers and of one; batch: the largest that fits per data-parallel rank, with tokens/s that it gives a GPU."
)


def headline(study: ExpertStudy) -> str:
    """The finding in one line."""
    best = study.best
    if study.gain < 1.005:
        return f"Balancing experts gains nothing here: {_copied(best)} is as fast as any"
    return f"{_copied(best)} makes a step {study.gain:.2f} times as fast: {units.seconds(best.step_s)} instead of " + (
        units.seconds(study.own.step_s)
    )


def _copied(choice: PlacedChoice) -> str:
    copies = f" with {plural(choice.copies, 'redundant expert')}" if choice.copies else ""
    return f"{MEANING.get(choice.placement, choice.placement)}{copies}"


def conditions(study: ExpertStudy) -> list[str]:
    """What was priced, on which counts, and how sure the maxima are."""
    d = study.deployment
    what = f"{plural(study.new, 'new token')} each" if study.past == 0 else f"{study.past:,} cached tokens each"
    return [
        f"{d.model.name} {d.phase} on {d.layout.world_size} x {d.device.name}, {d.layout}, {d.engine.name}: "
        f"{plural(study.batch, 'sequence')} per data-parallel rank, {what}",
        f"routing {study.law}, counts of {plural(len(study.before), 'layer')}",
        f"busiest ranks are expected maxima over {study.before.shape[1]} ranks, drawn: rows within "
        f"{100 * study.error:.1f} % (one standard error)",
        *study.notes,
    ]


def choices(study: ExpertStudy) -> Table:
    """A row per placement."""
    head = ("placement", "copies", "busiest", "worst", "step", "gain", "weights", "batch", "tokens/s")
    rows = [
        [
            ("> " if one is study.best else "  ") + MEANING.get(one.placement, one.placement), str(one.copies),
            f"{one.busiest.mean():.2f}", f"{one.busiest.max():.2f}",
            units.seconds(one.step_s) + ("" if one.fits else " *"), f"{study.own.step_s / one.step_s:.2f}",
            units.nbytes(one.weights_bytes), str(one.largest), f"{one.most_per_gpu:,.0f}",
        ]
        for one in study.choices
    ]
    return Table(head, rows, "lrrrrrrrr")


def beyond(study: ExpertStudy) -> list[str]:
    """What a perfect balance would bring, and what other counts or moving weights cost."""
    said = [
        f"A perfect balance would take {units.seconds(study.perfect_s)}, {study.best.step_s / study.perfect_s:.2f} "
        "times as fast as the best placement."
    ]
    said += [
        f"Placed by {one.source} instead ({100 * one.moved:.0f} % of choices fall elsewhere): busiest rank "
        f"{one.busiest:.2f} times the mean, {units.seconds(one.step_s)} a step, "
        f"{one.step_s / study.best.step_s:.2f} times as long as by its own counts."
        for one in study.drifted
    ]
    if study.logged:
        mean = sum(study.logged) / len(study.logged)
        said.append(
            f"Logged: balancedness {mean:.2f} in the mean of {plural(len(study.logged), 'line')} (mean load over the "
            f"busiest rank's); by the recording {study.own.balancedness:.2f} without balancing, "
            f"{study.best.balancedness:.2f} with the best placement."
        )
    return said + [_moving(one, study) for one in study.moves]


def _moving(move: Move, study: ExpertStudy) -> str:
    said = (
        f"From {MEANING.get(move.source, move.source)} to the best placement a rank fetches up to "
        f"{plural(move.experts, 'expert')} over all layers, {units.nbytes(move.nbytes)} in "
        f"{units.seconds(move.seconds)}"
    )
    if not math.isfinite(move.worth_steps):
        return f"{said}; no faster step pays for it."
    said += f": won back after {plural(max(1, round(move.worth_steps)), 'step')}"
    if move.interval:
        cost = move.seconds / (move.interval * study.best.step_s)
        said += f"; at {study.deployment.engine.name}'s interval of {move.interval} steps it takes {100 * cost:.1f} %"
    return f"{said}."


def layer_rows(study: ExpertStudy) -> Table:
    """The busiest rank of every layer, before and after."""
    numbers = study.layers if len(study.layers) == len(study.before) else range(len(study.before))
    rows = [
        [str(layer), f"{before.max():.2f}", f"{after.max():.2f}", str(int(before.argmax())), str(int(after.argmax()))]
        for layer, before, after in zip(numbers, study.before, study.after, strict=True)
    ]
    return Table(("layer", "busiest / mean before", "after", "busiest rank before", "after"), rows, "rrrrr")


def page(study: ExpertStudy) -> list[Section]:
    """The report: the finding, its conditions, placements, what is beyond them, and layers."""
    return [
        Section(headline(study), tuple(conditions(study)), figure="experts.png"),
        Section("Placements", (LEGEND,), table=choices(study)),
        Section("Beyond", tuple(beyond(study))),
        Section("Layers", (f"Counts: {study.source}",) if study.source else (), table=layer_rows(study)),
    ]


def document(study: ExpertStudy) -> dict[str, Any]:
    """All of it as plain values, units in the names."""

    def choice(one: PlacedChoice) -> dict[str, Any]:
        return {
            "placement": one.placement, "redundant_experts": one.copies,
            "busiest_over_mean": float(one.busiest.mean()),
            "busiest_over_mean_median": float(np.median(one.busiest)),
            "busiest_over_mean_worst": float(one.busiest.max()),
            "balancedness": one.balancedness, "step_s": one.step_s, "gain": study.own.step_s / one.step_s,
            "fits": one.fits, "weights_bytes": one.weights_bytes, "largest_batch_per_dp_rank": one.largest,
            "tokens_per_s_per_gpu_at_largest_batch": one.most_per_gpu,
        }

    d = study.deployment
    return {
        "model": d.model.name, "device": d.device.name, "engine": d.engine.name, "layout": str(d.layout),
        "phase": d.phase, "batch_per_dp_rank": study.batch, "new_tokens": study.new, "cached_tokens": study.past,
        "routing": study.law, "source": study.source, "best": choice(study.best),
        "without_balancing": choice(study.own),
        "gain": study.gain, "perfect_balance_step_s": study.perfect_s, "placements": list(map(choice, study.choices)),
        "placed_by_other_counts": [vars(one) for one in study.drifted], "moves": [vars(one) for one in study.moves],
        "layers": list(study.layers), "busiest_over_mean_before": study.before.max(axis=1).tolist(),
        "busiest_over_mean_after": study.after.max(axis=1).tolist(), "load_before": study.before.tolist(),
        "load_after": study.after.tolist(), "relative_standard_error": study.error,
        "logged_balancedness": list(study.logged), "notes": list(study.notes),
    }
