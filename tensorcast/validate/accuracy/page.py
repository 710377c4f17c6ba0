"""reports/accuracy.md and its figures: targets first, then every kernel, then what was left out and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from tensorcast.calibrate.attention_modules import fitted_to_modules
from tensorcast.calibrate.kernel_models.residual import FEWEST
from tensorcast.calibrate.measured_tables import Key
from tensorcast.cost.kernels.device_model import OUTSIDE
from tensorcast.files import write_atomically
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.store import list_devices, load_device
from tensorcast.validate.accuracy.causes import SOME_ROWS, Table, causes
from tensorcast.validate.accuracy.splits import (
    FITTED_ON,
    LEFT_OUT_DEVICE,
    METHODS,
    MODEL_DEVICES,
    SIZE_DEVICE,
    SIZE_SHARE,
)

ATTENTION = ("attention_prefill", "attention_decode", "mla_prefill", "mla_decode", "mla_prefill_module",
             "mla_decode_module")
EXCHANGE = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "moe_exchange")

TARGETS: tuple[tuple[str, str, tuple[str, ...], float, float | None], ...] = (
    # what, split, families, median, p90
    ("GEMM", "shape", ("gemm",), 0.04, 0.12),
    ("experts' grouped GEMM, new shapes", "shape", ("grouped_gemm",), 0.05, 0.15),
    ("experts' grouped GEMM, whole models left out", "model", ("grouped_gemm",), 0.08, 0.25),
    ("attention: context, generation, MLA", "shape", ATTENTION, 0.06, 0.18),
    ("collectives and all-to-all", "shape", EXCHANGE, 0.08, 0.25),
    ("a device left out", "device", ("gemm", "grouped_gemm", *ATTENTION), 0.20, None),
)

WORDS = {
    "predictor": "predictor", "tuned": "tuned roofline", "nearest": "nearest neighbours", "plain": "plain roofline",
}

UNTOLD = {
    "ruled": "the same, whose kernel runs by the engine's own rules",
    "untold": "the same, not told whose kernel runs",
}

COVERED = (0.75, 0.85)
"""Between these an 80 % interval holds as it should."""

Shown = dict[tuple[str, Key], Table]

GROUP = ["family", "dtype", "engine", "variant", "device"]


def quantile(values: pd.Series, share: float) -> float:
    """Of the values that are there; NaN where none is."""
    known = values.dropna()
    return float(known.quantile(share)) if len(known) else float("nan")


def percent(value: float) -> str:
    return "" if np.isnan(value) else f"{100 * value:.1f} %"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def chosen(errors: pd.DataFrame, split: str, families: Sequence[str]) -> pd.DataFrame:
    """Rows of one split and some families."""
    return errors[(errors.split == split) & errors.family.isin(families)]


def kernels_of(errors: pd.DataFrame) -> pd.DataFrame:
    """One line per kernel and device: rows, every method's median, the predictor's p90, how often its interval held."""
    found = errors.groupby(GROUP, observed=True)
    columns = {"rows": found.size(), **{name: found[name].median() for name in METHODS}}
    return pd.DataFrame(columns | {"p90": found["predictor"].quantile(0.9), "held": found["held"].mean()}).reset_index()


def targets_table(errors: pd.DataFrame) -> list[str]:
    """The targets, what was reached over all rows, and how many kernels reach it one by one."""
    rows: list[list[object]] = []
    for what, split, families, median, p90 in TARGETS:
        part = chosen(errors, split, families)
        if not len(part):
            continue
        each = kernels_of(part)
        good = (each.predictor <= median) & ((each.p90 <= p90) if p90 else True)
        aim = percent(median) + (f" / {percent(p90)}" if p90 else "")
        reached = f"{percent(quantile(part.predictor, 0.5))} / {percent(quantile(part.predictor, 0.9))}"
        rows.append([
            what, f"{len(part):,}", aim, reached,
            *(percent(quantile(part[name], 0.5)) for name in METHODS[1:]), f"{100 * part.held.mean():.0f} %",
            f"{int(good.sum())} of {len(each)}",
        ])
        for name, words in UNTOLD.items():
            if split == "model" and name in part:
                reached = f"{percent(quantile(part[name], 0.5))} / {percent(quantile(part[name], 0.9))}"
                rows.append([words, f"{len(part):,}", aim, reached, *[""] * 5])
    head = ["", "rows", "target: median / p90", "predictor", "tuned roofline", "nearest neighbours", "plain roofline",
            "80 % interval held", "kernels within target"]
    return table(head, rows)


def gemm_table(errors: pd.DataFrame) -> list[str]:
    """GEMM per dtype and engine over :data:`MODEL_DEVICES`, new shapes: the target as it is put."""
    _, split, families, median, p90 = TARGETS[0]
    assert p90 is not None
    part = chosen(errors, split, families)
    rows: list[list[object]] = []
    for names, some in part[part.device.isin(MODEL_DEVICES)].groupby(["dtype", "engine"], observed=True):
        middle, far = quantile(some.predictor, 0.5), quantile(some.predictor, 0.9)
        missed = [what for what, value, aim in (("median", middle, median), ("p90", far, p90)) if value > aim]
        rows.append([
            *names, f"{len(some):,}", f"{percent(middle)} / {percent(far)}", percent(quantile(some.nearest, 0.5)),
            f"{100 * some.held.mean():.0f} %", f"misses its {' and '.join(missed)}" if missed else "met",
        ])
    head = ["dtype", "engine", "rows", "median / p90", "nearest neighbours, median", "80 % interval held", "target"]
    return table(head, rows)


def missed_table(errors: pd.DataFrame, shown: Shown) -> list[str]:
    """Every kernel that misses its target, worst first, with what its rows show of the reason."""
    rows: list[tuple[float, list[object]]] = []
    for what, split, families, median, p90 in TARGETS:
        part = chosen(errors, split, families)
        groups = dict(list(part.groupby(GROUP, observed=True)))
        for one in kernels_of(part).to_dict("records") if len(part) else ():
            over = max(one["predictor"] / median, one["p90"] / p90 if p90 else 0.0)
            if over > 1.0:
                family, dtype, engine, variant, device = (str(one[column]) for column in GROUP)
                key = family, dtype, engine, variant
                why = causes(key, split, groups[(*key, device)], shown.get((device, key)), p90 or 2.0 * median)
                rows.append((over, [
                    what, " ".join(name for name in (*key, device) if name), f"{one['rows']:,}",
                    f"{percent(one['predictor'])} / {percent(one['p90'])}", percent(one["nearest"]), f"x {over:.1f}",
                    why,
                ]))
    rows.sort(key=lambda row: -row[0])
    head = ["target", "kernel", "rows", "median / p90", "nearest neighbours, median", "over the target", "what is seen"]
    return table(head, [row for _, row in rows])


def _apart(errors: pd.DataFrame, shown: Shown) -> str:
    """Median and p90 of models left out, over kernels with few configurations at a level of their own."""
    calm = []
    for names, part in errors[errors.split == "model"].groupby(GROUP, observed=True):
        family, dtype, engine, variant, device = (str(name) for name in names)
        found = shown.get((device, (family, dtype, engine, variant)))
        if found is not None and found.apart <= SOME_ROWS:
            calm.append(part.predictor)
    every = pd.concat(calm) if calm else pd.Series(dtype=float)
    return f"{percent(quantile(every, 0.5))} / {percent(quantile(every, 0.9))}" if len(every) else "nothing"


def _outside(errors: pd.DataFrame) -> list[str]:
    """Per family and size: rows above the fit, errors, and how often the interval held."""
    rows: list[list[object]] = []
    for names, part in errors[errors.split == "size"].groupby(["family", "variant"], observed=True):
        rows.append([
            *names, f"{len(part):,}", f"{percent(quantile(part.predictor, 0.5))} / "
            f"{percent(quantile(part.predictor, 0.9))}", percent(quantile(part.tuned, 0.5)),
            f"{100 * part.held.mean():.0f} %",
        ])
    return table(["family", "size", "rows", "median / p90", "tuned roofline", "80 % interval held"], rows)


def _detail(errors: pd.DataFrame, split: str) -> list[str]:
    rows = [
        [one["family"], one["dtype"], one["engine"], one["variant"], one["device"], f"{one['rows']:,}",
         percent(one["predictor"]), percent(one["p90"]), *(percent(one[name]) for name in METHODS[1:]),
         f"{100 * one['held']:.0f} %"]
        for one in kernels_of(errors[errors.split == split]).to_dict("records")
    ]
    head = ["family", "dtype", "engine", "variant", "device", "rows", "predictor, median", "p90", "tuned roofline",
            "nearest neighbours", "plain roofline", "interval held"]
    return table(head, rows)


def modules_table(devices: Sequence[DeviceProfile]) -> list[str]:
    """Attention modules and hyper-connections that were timed whole: errors of those held out, by what was fitted."""
    rows: list[list[object]] = []
    for device in devices:
        known = device.calibration.kernels if device.calibration else ()
        fits = [one for one in known if fitted_to_modules(one.family) and one.median_error is not None and one.held_out]
        rows += [
            [device.name, one.engine, one.family, one.dtype, one.held_out, percent(one.median_error or 0.0),
             percent(one.p90_error if one.p90_error is not None else float("nan"))]
            for one in fits if not one.family.startswith(BESIDE)
        ]
    return table(["device", "engine", "attention", "dtype", "modules", "median", "p90"], rows)


BESIDE = ("indexer", "block_scores")
"""Kernels that were fitted to the same modules as the attention that they choose for."""


def page(
    errors: pd.DataFrame, shown: Shown, dropped: dict[str, dict[str, int]], provenance: Sequence[str],
    left_out: Sequence[str] = (),
) -> str:
    """The accuracy page, Markdown. ``errors``, ``shown`` as of :func:`tensorcast.validate.accuracy.splits.compare`;
    ``left_out``: the section of :mod:`tensorcast.validate.accuracy.devices_left_out`."""
    shape = errors[errors.split == "shape"]
    reasons = sorted({reason for counts in dropped.values() for reason in counts})
    counts = [[reason, *(f"{found.get(reason, 0):,}" for found in dropped.values())] for reason in reasons]
    lines = [
        "# How far to trust kernel times", "",
        "Made by `make accuracy`; do not edit. Errors are |predicted / measured - 1| on rows that took no part in a",
        "fit. *Tuned roofline*: the formula with fitted constants. *Nearest neighbours*: the measured tables,",
        "interpolated. *Plain roofline*: max(FLOPs / peak, bytes / bandwidth), for collectives bytes on the wire over",
        "link speed. Repeating a measurement moves it by 3-5 %.", "", "## Targets", "", *targets_table(errors), "",
        "![Median error of four methods](accuracy.png)", "",
        "A kernel is one family, dtype, engine and variant on one device. `shape`: one shape in four, by a hash of the",
        f"shape. `model`: whole models out of the fit ({', '.join(MODEL_DEVICES)}). `device`: {', '.join(FITTED_ON)}",
        f"fitted, {LEFT_OUT_DEVICE} predicted from its datasheet; there *tuned* is the formula with datasheet",
        "fractions and *nearest* the last fitted device's table as it is.", "",
        "An engine picks one of several libraries' experts by model. The rows of models left out say which (the",
        "tables' `kernel_source`). Two more lines do without. *By the engine's own rules*: engine profiles say, from",
        "the engines' source, what class of model, activation, dtype and device gets which (`experts`); this is how a",
        "simulation prices a model. A measured model without a profile here counts as of no class. *Not told*: the",
        "library that ran most models of its kind. Each has an interval of its own for a new model.", "",
        "What is not blind here: the number and depth of trees were settled on these held-out shapes; how models left",
        "out are fitted was settled by leaving models out of the H200 and B200 fits in other groups than here; the",
        "formula's seven constants per kernel have seen every model; and whether a family takes its own engine's",
        f"kernel or the fastest one's was settled while looking at {LEFT_OUT_DEVICE}. Those lines flatter a little.",
        "Rows of the public set that were never given to this fit are the better judge.", "",
        f"### GEMM per dtype and engine, new shapes on {', '.join(MODEL_DEVICES)}", "", *gemm_table(errors), "",
        "## Where a target is missed", "",
        "The last column is computed from the rows. A table is rough where a row lies far off the line between the two",
        "rows next to it in size, all else equal: what no function of the shape can follow. Configurations (model,",
        "split, routing) off their like run at a level of their own at every number of tokens; those in the fit are",
        "remembered, those of a new model cannot be known. Nearly all that are slower ran under trtllm, at random and",
        "2 to 10 times as long as the same split under another routing law: most likely kernels that were not tuned. A",
        "simulation prices them as tuned.",
        f"In kernels with under {100 * SOME_ROWS:.0f} % of such rows, models left out come to",
        f"{_apart(errors, shown)}.", "",
        *missed_table(errors, shown),
        "", "## Intervals", "",
        f"An 80 % interval should hold for {100 * COVERED[0]:.0f}-{100 * COVERED[1]:.0f} % of the rows. Over shapes",
        f"left out it holds for {100 * shape.held.mean():.1f} %: ends from one half of them, tried on the other. For",
        "models and the device left out the ends come from the other models and devices alone.", "",
        "![How often intervals hold](accuracy-intervals.png)", "",
        "## Attention that chooses what it reads, modules left out", "",
        "Sparse latent attention (`mla_sparse`), compressed entries, blocks, and hyper-connections (`stream_mix`) were",
        "timed as modules of a layer. Constants are fitted to what a module takes over the price of its other rows;",
        "errors are of the whole module, one in four held out by a hash of its sizes.", "",
        *modules_table([one for one in map(load_device, list_devices()) if one.timed_on == one.name]), "",
        "## Every kernel, shapes left out", "", *_detail(errors, "shape"), "",
        "## Whole models left out", "", *_detail(errors, "model"), "",
        f"## {LEFT_OUT_DEVICE} left out", "", *_detail(errors, "device"), "",
        *left_out, "",
        "## Outside the data", "",
        "Inside, times follow what was measured, which may fall with size. Outside, the residual stays as at the",
        "nearest measured sizes, and times stand on a lattice of sizes on which they never fall (a head size or window",
        "that was measured picks a kernel of its own). Devices without measurements: times grow with every size. No",
        "time is under the floor of peak arithmetic and bandwidth. An interval grows by",
        f"{100 * OUTSIDE:.1f} % per factor of two outside.", "",
        f"How far that carries, on {SIZE_DEVICE}: of one size after the other the largest values are left out of the",
        f"fit (above the {100 * SIZE_SHARE:.0f}th percentile) and predicted from the smaller ones.", "",
        *_outside(errors), "",
        "## What it rests on", "", *(f"- {line}" for line in provenance), "",
        f"Kernels with fewer than {FEWEST} rows have no residual. Not measured on any device: exchange and collectives",
        "across nodes, send/receive, state-space scans, norms, kernels overlapping each other.", "",
        "## Rows left out", "", *table(["family: reason", *dropped], counts),
    ]
    return "\n".join(lines) + "\n"


def figures(errors: pd.DataFrame, folder: Path) -> None:
    """Median error per family of the four methods, and how often intervals hold per kernel."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    parts = [(what, chosen(errors, split, families), aim) for what, split, families, aim, _ in TARGETS]
    parts = [part for part in parts if len(part[1])]
    colours = dict(zip(METHODS, ("#1b6ca8", "#7fb3d5", "#c9a24b", "#b9b9b9"), strict=True))
    figure, axis = plt.subplots(figsize=(8.5, 4.6), layout="constrained")
    for i, method in enumerate(METHODS):
        place = np.arange(len(parts)) + 0.2 * (i - 1.5)
        values = [100 * quantile(part[method], 0.5) for _, part, _ in parts]
        axis.barh(place, values, 0.19, color=colours[method], label=WORDS[method])
    for i, (_, _, aim) in enumerate(parts):
        ends = [i - 0.42, i + 0.42]
        axis.plot([100 * aim] * 2, ends, color="black", linewidth=1.4, label="target" if i == 0 else None)
    axis.set_yticks(range(len(parts)), [what.replace(", ", ",\n", 1) for what, _, _ in parts])
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xticks([1, 2, 5, 10, 20, 50], ["1 %", "2 %", "5 %", "10 %", "20 %", "50 %"])
    axis.set_xlabel("median error on rows that took no part in the fit")
    met = sum(quantile(part["predictor"], 0.5) <= aim for _, part, aim in parts)
    medians = [{method: quantile(part[method], 0.5) for method in METHODS} for _, part, _ in parts]
    best = sum(found["predictor"] == min(found.values()) for found in medians)
    axis.set_title(f"The predictor's median meets {met} of {len(parts)} targets and is the best of four in {best}",
                   loc="left", fontsize=11, pad=24)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=5)
    _save(figure, folder / "accuracy.png", io.BytesIO())

    figure, axis = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
    for split, colour in (("shape", "#1b6ca8"), ("model", "#c9a24b")):
        some = kernels_of(errors[errors.split == split])
        some = some[some.rows >= 40]
        axis.scatter(some.rows, 100 * some.held, s=12, color=colour, alpha=0.7, linewidths=0,
                     label={"shape": "shapes left out", "model": "whole models left out"}[split])
    told = {split: 100 * errors[errors.split == split].held.mean() for split in ("shape", "model")}
    axis.set_title(f"80 % intervals hold for {told['shape']:.0f} % of shapes left out, {told['model']:.0f} % of models",
                   loc="left", fontsize=10)
    axis.axhspan(100 * COVERED[0], 100 * COVERED[1], color="black", alpha=0.08, linewidth=0)
    axis.set_xscale("log")
    axis.set_ylim(0, 100)
    axis.set_xlabel("rows left out, one dot per kernel")
    axis.set_ylabel("80 % interval held, %")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    _save(figure, folder / "accuracy-intervals.png", io.BytesIO())


def _save(figure: object, path: Path, buffer: object) -> None:
    from matplotlib import pyplot as plt

    figure.savefig(buffer, dpi=130)  # type: ignore[attr-defined]
    plt.close(figure)  # type: ignore[arg-type]
    write_atomically(path, buffer.getvalue())  # type: ignore[attr-defined]
