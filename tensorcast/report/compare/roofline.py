"""The roofline of the best layout's decode step: its costliest ops under the peaks of its device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tensorcast.deploy.plan.plan import Collective
from tensorcast.deploy.step.breakdown import kernel_group
from tensorcast.report import units
from tensorcast.report.compare.choices import Choice, View
from tensorcast.report.compare.figures import INK, MUTED, Chart, canvas, finish, places
from tensorcast.report.compare.steps import PART_COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tensorcast.deploy.deployment import Deployment
    from tensorcast.deploy.step.price import StepPrice

COSTLIEST, LEAST_SHARE = 8, 0.005
"""Ops in the roofline: how many at most, and the share of kernel time below which one is left out."""


def roofline(view: View) -> Chart:
    """The costliest ops of the best layout's decode step under the device's roofs."""
    choice = view.shown[0]
    deployment = choice.decode
    batch, _ = view.batch_at_load(choice)
    ops = costliest(view.decode_price(choice, batch))
    bandwidth = float(deployment.device.memory_bandwidth_bytes_per_s)
    roofs = sorted({op["peak"] for op in ops})
    title = _roofline_title(choice, ops, bandwidth)
    figure, axes = canvas(3.9, title)
    at = [op["flops"] / op["bytes"] for op in ops]
    reached = [op["flops"] / op["seconds"] for op in ops]
    low, high = min(*at, 0.5 * min(roofs) / bandwidth) / 2, max(*at, roofs[-1] / bandwidth) * 2.5
    floor = min(*reached, bandwidth * low * 2) / 2.5
    start, end = max(low, floor / bandwidth), roofs[-1] / bandwidth
    axes.plot([start, end], [start * bandwidth, end * bandwidth], color=INK)
    middle = start * (end / start) ** 0.68
    axes.annotate(
        f"memory, {units.byte_rate(bandwidth)}", (middle, middle * bandwidth), xytext=(-6, 2),
        textcoords="offset points", ha="right", fontsize=9, color=MUTED,
    )
    names = _peak_names(deployment, roofs)
    for peak in roofs:
        axes.plot([peak / bandwidth, high], [peak, peak], color=INK)
        axes.annotate(
            f"{names[peak]}, {units.flop_rate(peak)}", (high, peak), xytext=(-2, 3 if peak == roofs[-1] else -4),
            textcoords="offset points", ha="right", va="bottom" if peak == roofs[-1] else "top", fontsize=9,
            color=MUTED,
        )
    for x, y, op in zip(at, reached, ops, strict=True):
        size, colour = 5 + 26 * op["share"] ** 0.5, PART_COLOURS[op["group"]]
        axes.plot([x], [y], marker="o", markersize=size, color=colour, alpha=0.75, markeredgewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(floor, 2.2 * roofs[-1])
    axes.minorticks_off()
    axes.set_xticks(*places([low, high]))
    ticks, labels = places([floor, roofs[-1]])
    axes.set_yticks(ticks, labels)
    _thin(axes)
    for x, y, number, size in _numbers(axes, at, reached, ops):
        inside = size > 15
        axes.annotate(
            number, (x, y), xytext=(0 if inside else size / 2 + 3, 0), textcoords="offset points", va="center",
            ha="center" if inside else "left", fontsize=9, fontweight="bold",
        )
    axes.set_xlabel("FLOP per byte of memory traffic")
    axes.set_ylabel("FLOP/s of one GPU")
    _numbered(axes, ops)
    caption = (
        "Ops with arithmetic, costliest first; a larger mark takes more of the step. Far below both roofs: latency, "
        f"small tiles or padding. Batch {units.count(batch)} per data-parallel rank."
    )
    return finish(figure, "roofline", title, caption)


def _thin(axes: Axes) -> None:
    """Leave out labels of crowded logarithmic ticks: whole powers of ten are enough over many decades."""
    for axis in (axes.xaxis, axes.yaxis):
        if len(axis.get_ticklocs()) > 9:
            kept = [(t, text.get_text()) for t, text in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
                    if text.get_text().lstrip("0.").startswith("1") and "2" not in text.get_text()]
            axis.set_ticks([t for t, _ in kept], [text for _, text in kept])


def _numbers(
    axes: Axes, at: Sequence[float], reached: Sequence[float], ops: Sequence[dict[str, Any]]
) -> list[tuple[float, float, str, float]]:
    """Where to write which number, and the mark's size there; marks that cover each other share a label: ``3, 4``."""
    apart = [
        axes.transData.transform(point) * 72 / axes.figure.dpi for point in zip(at, reached, strict=True)
    ]
    groups: list[list[int]] = []
    for i, point in enumerate(apart):
        near = next((g for g in groups if max(abs(apart[g[0]] - point)) < 8), None)
        groups.append([i]) if near is None else near.append(i)
    return [
        (at[g[0]], reached[g[0]], ", ".join(str(i + 1) for i in g), 5 + 26 * ops[g[0]]["share"] ** 0.5) for g in groups
    ]


def _numbered(axes: Axes, ops: Sequence[dict[str, Any]]) -> None:
    lines = [f"{i + 1}  {op['name']}, {units.percent(op['share'])}" for i, op in enumerate(ops)]
    axes.annotate(
        "\n".join(lines), (1.0, 1.0), xycoords="axes fraction", xytext=(10, 0), textcoords="offset points", va="top",
        fontsize=9, linespacing=1.55,
    )


def costliest(price: StepPrice) -> list[dict[str, Any]]:
    """Ops with arithmetic and traffic, calls of one module over all layer kinds together, costliest first."""
    found: dict[str, dict[str, Any]] = {}
    total = sum(float(row.seconds) * count for row, count in price.calls)
    for row, count in price.calls:
        if isinstance(row.row, Collective) or not count or float(row.ideal_compute_s) <= 0 or row.family == "memory":
            continue
        name = f"{_part_of_layer(row.row.module)}{' (grouped GEMM)' if row.family == 'grouped_gemm' else ''}"
        op = found.setdefault(
            name,
            {"name": name, "group": kernel_group(row), "flops": 0.0, "bytes": 0.0, "seconds": 0.0, "ideal": 0.0},
        )
        for key, value in (
            ("flops", row.flops), ("bytes", row.bytes), ("seconds", row.seconds), ("ideal", row.ideal_compute_s)
        ):
            op[key] += float(value) * count
    for op in found.values():
        op["share"] = op["seconds"] / total
        op["peak"] = float(f"{op['flops'] / op['ideal']:.4g}")
    ranked = sorted(found.values(), key=lambda op: -op["seconds"])[:COSTLIEST]
    return [op for op in ranked if op["share"] >= LEAST_SHARE] or ranked[:1]


def _part_of_layer(module: str) -> str:
    """``self_attn.o_proj`` for ``layers[3-60].self_attn.o_proj``."""
    return module.split("].", 1)[-1].removeprefix("model.")


def _peak_names(deployment: Deployment, roofs: Sequence[float]) -> dict[float, str]:
    """Which arithmetic each roof is; of several with one rate, the first in the profile's order."""
    peaks = {float(f"{float(value):.4g}"): name for name, value in reversed(deployment.device.peak_flops.items())}
    return {roof: peaks.get(roof, "compute") for roof in roofs}


def _roofline_title(choice: Choice, ops: Sequence[dict[str, Any]], bandwidth: float) -> str:
    under_memory = [op for op in ops if op["flops"] / op["bytes"] < op["peak"] / bandwidth]
    share = sum(op["share"] for op in under_memory)
    first = ops[0]
    roof = min(first["peak"], bandwidth * first["flops"] / first["bytes"])
    reached = units.percent(first["flops"] / first["seconds"] / roof)
    how_many = "All" if len(under_memory) == len(ops) else f"{len(under_memory) or 'None'} of the"
    return (
        f"{how_many} {len(ops)} costliest ops of {choice.label} lie under the memory roof ({units.percent(share)} of "
        f"kernel time); the first, {first['name']}, reaches {reached} of its roof"
    )
