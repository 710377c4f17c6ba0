"""How far predicted kernel times are from measured ones, on a small table of rows that no fit has seen.

``python -m tensorcast.validate.accuracy.sample --tables DIR | --from silicon --out reports/accuracy.md`` writes the
full comparison (:mod:`tensorcast.validate.accuracy.splits`); without tables, what the fitted constants alone reach on
the sample.
Predictions use the shipped device profiles and kernel models.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from tensorcast.calibrate import command
from tensorcast.calibrate.constants.from_tables import KERNEL_FAMILIES, described
from tensorcast.calibrate.measured_devices import read_device, system_of
from tensorcast.calibrate.measured_tables import (
    MeasuredKernel,
    MeasuredSystem,
    hashed,
    held_out,
    installed_tables,
)
from tensorcast.cost import roofline
from tensorcast.cost.kernels.formula import formula_of
from tensorcast.cost.kernels.kept_answers import model_path
from tensorcast.cost.kernels.shape_tables import calls_of
from tensorcast.cost.kernels.vocabulary import PRECISION, SIZES
from tensorcast.errors import InputError
from tensorcast.files import write_atomically
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.store import list_devices, load_device
from tensorcast.validate.accuracy import devices_left_out, splits
from tensorcast.validate.accuracy import page as accuracy_page
from tensorcast.validate.accuracy.page import percent, table

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "moe_exchange")

EXCHANGES = ("low_latency", "high_throughput")
"""Exchanges between experts that have constants: DeepEP's."""

ID = ("system", "engine", "family", "dtype", "variant")

SAMPLE_HEADER = (
    "# Measured kernels, seconds per call; a sample of the shapes held out of every fit.\n"
    "# Source: aiconfigurator-core 0.12.0 (https://pypi.org/project/aiconfigurator-core/), Apache-2.0.\n"
)


def _has_constants(rows: MeasuredKernel) -> bool:
    family, dtype, _, variant = rows.key
    if family == "moe_exchange":
        return variant.startswith(EXCHANGES)
    return family in COLLECTIVES or (family in KERNEL_FAMILIES and dtype in PRECISION and not variant)


def draw_sample(systems: Sequence[MeasuredSystem], per_kernel: int = 2) -> pd.DataFrame:
    """``per_kernel`` held-out rows of each kernel with constants, of those that constants are fitted to, inside one
    node, chosen by a hash of the shape."""
    parts = []
    for system in systems:
        for rows in system.kernels.values():
            family, dtype, engine, variant = rows.key
            if not _has_constants(rows):
                continue
            if not len(some := described(rows, {})):
                continue
            out = held_out(family, some.columns) & (some.columns.get("nodes", np.ones(len(some))) == 1)
            some = some.take(out)
            some = some.take(np.argsort(hashed(family, some.columns), kind="stable")[:per_kernel])
            named = dict(zip(ID, (system.name, engine, family, dtype, variant), strict=True))
            columns = {name: some.columns[name] for name in SIZES[family]}
            parts.append(pd.DataFrame(columns).assign(**named, seconds=some.seconds))
    sample = pd.concat(parts, ignore_index=True)
    sizes = [name for name in sample.columns if name not in (*ID, "seconds")]
    return sample[[*ID, *sizes, "seconds"]].sort_values([*ID, "seconds"]).reset_index(drop=True)


def write_sample(path: Path, sample: pd.DataFrame) -> None:
    """Comma-separated, source on top, empty where a column says nothing about a family."""
    exact = sample.drop(columns="seconds").convert_dtypes()  # whole numbers without a trailing .0
    written = exact.assign(seconds=sample.seconds.map("{:.5g}".format))
    write_atomically(Path(path), SAMPLE_HEADER + written.to_csv(index=False))


def read_sample(path: Path) -> pd.DataFrame:
    """The sample table. Raises :class:`InputError` where it is missing or lacks a column."""
    try:
        sample = pd.read_csv(path, comment="#", keep_default_na=True)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read measured rows from {path}: {error}") from error
    missing = {*ID, "seconds"} - set(sample.columns)
    if missing:
        raise InputError(f"{path}: column {sorted(missing)[0]!r} is missing")
    return sample.assign(variant=sample.variant.fillna(""))


def predict(sample: pd.DataFrame) -> pd.DataFrame:
    """The sample with ``predicted`` and ``roofline`` seconds (datasheet peaks alone), their errors, and evidence."""
    parts = []
    for (system, engine), rows in sample.groupby(["system", "engine"]):
        device = load_device(str(system).replace("_", "-"))
        for calls in calls_of(rows):
            found = formula_of(calls.family, calls.dtype, calls.variant, calls.columns, device, engine=str(engine))
            part, plain = rows.iloc[calls.rows], splits.plain_roofline(found, device)
            parts.append(part.assign(
                device=device.name, predicted=found.seconds, roofline=plain, evidence=found.evidence,
                error=np.abs(found.seconds / part.seconds - 1.0), roofline_error=np.abs(plain / part.seconds - 1.0),
            ))
    return pd.concat(parts)


def summary(predicted: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Rows, median, mean and p90 error, and the plain roofline's median, per group."""
    return predicted.groupby(list(by), sort=True).agg(
        rows=("error", "size"), median=("error", "median"), mean=("error", "mean"),
        p90=("error", lambda values: float(np.quantile(values, 0.9))), roofline_median=("roofline_error", "median"),
    ).reset_index()


def _sample_table(predicted: pd.DataFrame, by: Sequence[str]) -> list[str]:
    figures = ("median", "mean", "p90", "roofline_median")
    rows = [
        [*(row[name] for name in by), row["rows"], *(percent(row[name]) for name in figures)]
        for row in summary(predicted, by).to_dict("records")
    ]
    return table([*by, "rows", "median", "mean", "p90", "plain roofline, median"], rows)


def _fit_tables(devices: Sequence[DeviceProfile]) -> list[str]:
    """Median (p90) held-out error of every fit, one column per device."""
    lines: list[str] = []
    for title, kind in (("Kernels", "kernels"), ("Collectives and expert exchange, inside one node", "collectives")):
        cells: dict[tuple[str, ...], dict[str, str]] = {}
        names = ("family", "dtype", "engine") if kind == "kernels" else ("op", "algorithm", "engine")
        for device in devices:
            assert device.calibration is not None
            for entry in getattr(device.calibration, kind):
                errors = (float("nan") if value is None else value for value in (entry.median_error, entry.p90_error))
                text = "{} ({})".format(*map(percent, errors))
                cells.setdefault(tuple(getattr(entry, name) for name in names), {})[device.name] = text
        head = [*names, *(device.name for device in devices)]
        rows = [[*key, *(cell.get(device.name, "") for device in devices)] for key, cell in sorted(cells.items())]
        lines += [f"### {title}", "", *table(head, rows), ""]
    return lines


def page(predicted: pd.DataFrame) -> str:
    """The accuracy page, Markdown."""
    profiles = [load_device(name) for name in list_devices()]
    fitted = [device for device in profiles if device.timed_on == device.name]
    rest = [device.name for device in profiles if not device.timed_on]
    lines = [
        "# How far to trust kernel times", "",
        "Made by `make accuracy`; do not edit. Errors are |predicted / measured - 1|. The",
        "plain roofline is max(FLOPs / peak, bytes / bandwidth) of the datasheet (for collectives bytes on the wire /",
        "link speed), with no fitted constant. Repeating a measurement moves it by 3-5 %.", "",
        "## What it rests on", "",
    ]
    for device in fitted:
        assert device.calibration is not None
        lines.append(f"- **{device.name}**, fitted {device.calibration.date}: {device.calibration.provenance}.")
    lines += [
        "", f"Not measured, priced from datasheet fractions (expect about {percent(roofline.DATASHEET_ERROR)}): "
        f"{', '.join(rest) or 'none'}.",
        "Nor were these, on any device: collectives and expert exchange across nodes (published DeepEP rates and",
        "datasheet link speeds), send/receive, sparse attention, state-space scans, norms and other pointwise kernels",
        "(priced as memory traffic with the constants of quantisation kernels), kernels overlapping each other.",
        "Measured matmuls and experts include quantising and permuting their rows; a simulated step prices those as",
        "rows of their own and leaves them out of the matmul.", "",
        "## The sample", "",
        f"{len(predicted)} measured rows (`tests/data/kernel_sample.csv`). None of their shapes was used in a fit, on",
        "any device: one shape in four is held out by a hash of the shape.", "",
        "### Per family", "", *_sample_table(predicted, ("family",)), "",
        "### Per family, dtype and device", "", *_sample_table(predicted, ("family", "dtype", "device")), "",
        "## All held-out rows", "",
        "Median error (90th percentile) of each fit on every held-out row of the full tables, as kept in the device",
        "profiles; `any` is what an unnamed engine is taken to be: per shape the fastest engine measured.", "",
        *_fit_tables(fitted),
        "## Rows left out", "", "Dropped by rule before the fit, per device:", "",
    ]
    dropped = {device.name: device.calibration.dropped for device in fitted if device.calibration is not None}
    reasons = sorted({reason for counts in dropped.values() for reason in counts})
    counts = [[reason, *(per_device.get(reason, 0) for per_device in dropped.values())] for reason in reasons]
    return "\n".join([*lines, *table(["family: reason", *(d.name for d in fitted)], counts)]) + "\n"


def measured(folders: Sequence[Path]) -> dict[str, Path]:
    """Devices that the folders hold measurements of, and the first that does."""
    devices = [(device, folder) for device in map(load_device, list_devices()) for folder in folders]
    return {device.name: folder for device, folder in reversed(devices) if system_of(folder, device)}


def write_full(folders: Sequence[Path], out: Path) -> None:
    """Page and figures from full tables: shapes, models and a device left out, four methods side by side."""
    known = {name: folder for name, folder in measured(folders).items() if model_path(name)}
    where = {name: known[name] for name in sorted(known) if load_device(name).calibration}
    errors, shown = splits.compare(where)
    systems = {name: read_device(folder, load_device(name)) for name, folder in where.items()}
    dropped = {name: system.dropped for name, system in systems.items()}
    provenance = [system.source for system in systems.values()]
    left_out = devices_left_out.section(devices_left_out.errors(where)) if len(where) > 1 else []
    write_atomically(out, accuracy_page.page(errors, shown, dropped, provenance, left_out))
    accuracy_page.figures(errors, out.parent)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    program = "python -m tensorcast.validate.accuracy.sample"
    parser = argparse.ArgumentParser(prog=program, description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=Path, default=Path("tests/data/kernel_sample.csv"), help="measured rows")
    parser.add_argument("--out", type=Path, default=Path("reports/accuracy.md"), help="page to write")
    parser.add_argument(
        "--tables", type=Path, nargs="+", default=[], help="folders of full tables: every split, every method"
    )
    parser.add_argument("--from", dest="origin", choices=["silicon"], help="silicon: an installed aiconfigurator-core")
    parser.add_argument("--draw", action="store_true", help="draw the sample anew from the full tables")
    options = parser.parse_args(arguments)
    folders = [*options.tables, *([installed_tables()] if options.origin else [])]
    if options.draw and folders:
        drawn = [read_device(folder, load_device(name)) for name, folder in sorted(measured(folders).items())]
        write_sample(options.sample, draw_sample(drawn))
    if not folders:
        write_atomically(options.out, page(predict(read_sample(options.sample))))
    else:
        write_full(folders, options.out)
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    command.run(main)
