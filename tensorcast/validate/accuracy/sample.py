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
from tensorcast.calibrate.constants import tables as measured
from tensorcast.calibrate.constants.errors import kernel_seconds
from tensorcast.calibrate.constants.from_tables import KERNEL_FAMILIES, SOURCE
from tensorcast.calibrate.measured_tables import installed_tables, read_system, systems_in
from tensorcast.cost import roofline
from tensorcast.cost.collectives import Kind, Phase, collective_time
from tensorcast.cost.kernels.predictor import model_path
from tensorcast.errors import InputError
from tensorcast.files import write_atomically
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.store import list_devices, load_device
from tensorcast.validate.accuracy import page as accuracy_page
from tensorcast.validate.accuracy import splits

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")

SAMPLE_HEADER = (
    "# Measured kernels, seconds per call; a sample of the shapes held out of every fit.\n"
    "# Source: aiconfigurator-core 0.12.0 (https://pypi.org/project/aiconfigurator-core/), Apache-2.0.\n"
)

Key = tuple[str, ...]


def draw_sample(tables: measured.Tables, per_group: int = 2) -> pd.DataFrame:
    """``per_group`` held-out rows of each (system, family, dtype, engine, algorithm), chosen by a hash of the row."""
    parts = []
    for family in (*KERNEL_FAMILIES, *COLLECTIVES):
        frame = tables.family(family)
        frame = frame[frame.dtype.isin([*measured.PRECISION, "any"])]
        frame = frame[measured.held_out(frame, measured.SHAPE[family])]
        order = measured.row_hash(frame, [*measured.ID, *measured.SHAPE[family]])
        frame = frame.assign(order=order).sort_values("order")
        parts.append(frame.groupby(["system", "dtype", "engine", "algorithm"]).head(per_group).drop(columns="order"))
    sample = pd.concat(parts)
    columns = [c for c in sample.columns if c != "seconds"]
    return sample[[*columns, "seconds"]].sort_values([*measured.ID, "seconds"]).reset_index(drop=True)


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
    missing = {*measured.ID, "seconds"} - set(sample.columns)
    if missing:
        raise InputError(f"{path}: column {sorted(missing)[0]!r} is missing")
    return sample.assign(algorithm=sample.algorithm.fillna(""), engine=sample.engine.fillna("any"))


def _kernel(rows: pd.DataFrame, key: Key, device: DeviceProfile) -> tuple[np.ndarray, np.ndarray, str]:
    _, family, dtype, engine, _ = key
    constants, evidence = roofline.constants_for(device, family, dtype, engine)
    others, _ = roofline.constants_for(device, "memory", "bf16")
    works = measured.works_of(family, dtype, rows)
    bandwidth = float(device.memory_bandwidth_bytes_per_s)
    plain = sum(
        np.maximum(work.flops / roofline.peak_flops(device, work.dtype), work.bytes / bandwidth) for work in works
    )
    return kernel_seconds(works, constants, others, device), np.asarray(plain), evidence


def _collective(rows: pd.DataFrame, key: Key, device: DeviceProfile) -> tuple[np.ndarray, np.ndarray, str]:
    _, op, _, engine, algorithm = key
    kind, _, phase = algorithm.rpartition("_")
    exchange: Kind = kind if kind in ("low_latency", "high_throughput") else "direct"  # type: ignore[assignment]
    way: Phase = "combine" if phase == "combine" else "dispatch"
    seconds, evidence = np.zeros(len(rows)), "calibrated"
    copies = rows.copies.to_numpy(float) if op == "all_to_all" else 1.0
    distinct = measured.distinct_ranks(rows) if exchange == "high_throughput" else None
    for ranks in sorted(rows.ranks.unique()):
        at = (rows.ranks == ranks).to_numpy()
        found = collective_time(
            op, rows.payload_bytes.to_numpy(float)[at], (int(ranks),), device,
            engine=engine, kind=exchange, phase=way,
            copies=copies[at] if isinstance(copies, np.ndarray) else copies,
            distinct_ranks=None if distinct is None else distinct[at], custom=algorithm == "custom",
        )
        seconds[at] = found.seconds
        evidence = found.evidence if found.evidence == "datasheet" else evidence
    speed = float(device.interconnect[0].bandwidth_bytes_per_s)
    return seconds, measured.wire_bytes(op, algorithm, rows) / speed, evidence


def predict(sample: pd.DataFrame) -> pd.DataFrame:
    """The sample with ``predicted`` and ``roofline`` seconds (datasheet peaks alone), their errors, and evidence."""
    parts = []
    devices = {name: load_device(str(name).replace("_", "-")) for name in sample.system.unique()}
    for key, rows in sample.groupby(["system", "family", "dtype", "engine", "algorithm"]):
        names = tuple(str(part) for part in key)
        device = devices[names[0]]
        price = _collective if names[1] in COLLECTIVES else _kernel
        seconds, plain, evidence = price(rows, names, device)
        parts.append(rows.assign(
            device=device.name, predicted=seconds, roofline=plain, evidence=evidence,
            error=np.abs(seconds / rows.seconds - 1.0), roofline_error=np.abs(plain / rows.seconds - 1.0),
        ))
    return pd.concat(parts)


def summary(predicted: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Rows, median, mean and p90 error, and the plain roofline's median, per group."""
    return predicted.groupby(list(by), sort=True).agg(
        rows=("error", "size"), median=("error", "median"), mean=("error", "mean"),
        p90=("error", lambda values: float(np.quantile(values, 0.9))), roofline_median=("roofline_error", "median"),
    ).reset_index()


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def _sample_table(predicted: pd.DataFrame, by: Sequence[str]) -> list[str]:
    figures = ("median", "mean", "p90", "roofline_median")
    rows = [
        [*(row[name] for name in by), row["rows"], *(_percent(row[name]) for name in figures)]
        for row in summary(predicted, by).to_dict("records")
    ]
    return _table([*by, "rows", "median", "mean", "p90", "plain roofline, median"], rows)


def _fit_tables(devices: Sequence[DeviceProfile]) -> list[str]:
    """Median (p90) held-out error of every fit, one column per device."""
    lines: list[str] = []
    for title, kind in (("Kernels", "kernels"), ("Collectives and expert exchange, inside one node", "collectives")):
        cells: dict[Key, dict[str, str]] = {}
        names = ("family", "dtype", "engine") if kind == "kernels" else ("op", "algorithm", "engine")
        for device in devices:
            assert device.calibration is not None
            for entry in getattr(device.calibration, kind):
                text = f"{_percent(entry.median_error)} ({_percent(entry.p90_error)})"
                cells.setdefault(tuple(getattr(entry, name) for name in names), {})[device.name] = text
        head = [*names, *(device.name for device in devices)]
        rows = [[*key, *(cell.get(device.name, "") for device in devices)] for key, cell in sorted(cells.items())]
        lines += [f"### {title}", "", *_table(head, rows), ""]
    return lines


def page(predicted: pd.DataFrame) -> str:
    """The accuracy page, Markdown."""
    profiles = [load_device(name) for name in list_devices()]
    fitted = [device for device in profiles if device.calibration is not None]
    rest = [device.name for device in profiles if device.calibration is None]
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
        "", f"Not measured, priced from datasheet fractions (expect about {_percent(roofline.DATASHEET_ERROR)}): "
        f"{', '.join(rest) or 'none'}.",
        "Nor were these, on any device: collectives and expert exchange across nodes (published DeepEP rates and",
        "datasheet link speeds), send/receive, sparse attention, linear attention, norms and other pointwise kernels",
        "(priced as memory traffic with the constants of quantisation kernels), kernels overlapping each other.",
        "Skewed routing is not part of these numbers: rows are those of evenly loaded experts. Measured matmuls and",
        "experts include quantising and permuting their rows; a simulated step prices those as rows of their own and",
        "leaves them out of the matmul.", "",
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
    return "\n".join([*lines, *_table(["family: reason", *(d.name for d in fitted)], counts)]) + "\n"


def write_full(folder: Path, out: Path) -> None:
    """Page and figures from full tables: shapes, models and a device left out, four methods side by side."""
    systems = systems_in(folder)
    names = [name for name in list_devices() if name.replace("-", "_") in systems and model_path(name)]
    errors, shown = splits.compare(folder, tuple(names))
    dropped = {name: read_system(folder, name.replace("-", "_")).dropped for name in names}
    provenance = [SOURCE.format(system=name.replace("-", "_")) for name in names]
    write_atomically(out, accuracy_page.page(errors, shown, dropped, provenance))
    accuracy_page.figures(errors, out.parent)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    program = "python -m tensorcast.validate.accuracy.sample"
    parser = argparse.ArgumentParser(prog=program, description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=Path, default=Path("tests/data/kernel_sample.csv"), help="measured rows")
    parser.add_argument("--out", type=Path, default=Path("reports/accuracy.md"), help="page to write")
    parser.add_argument("--tables", type=Path, help="full tables (SYSTEM/KIND/*.parquet): every split, every method")
    parser.add_argument("--from", dest="origin", choices=["silicon"], help="silicon: an installed aiconfigurator-core")
    parser.add_argument("--draw", action="store_true", help="draw the sample anew from the full tables")
    options = parser.parse_args(arguments)
    folder = installed_tables() if options.origin else options.tables
    if options.draw and folder is not None:
        write_sample(options.sample, draw_sample(measured.read_tables(folder)))
    if folder is None:
        write_atomically(options.out, page(predict(read_sample(options.sample))))
    else:
        write_full(folder, options.out)
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    command.run(main)
