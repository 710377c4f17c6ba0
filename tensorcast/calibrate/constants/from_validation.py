"""Folding measurements back: constants fitted to a validate run, kept where they beat what stands on shapes left out.

One shape in three, chosen by a hash, takes no part in a fit; the errors that are stated, and that decide, are those of
the shapes left out. A fit that is worse there than the constants that stand is refused.
"""

from __future__ import annotations

import datetime
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from tensorcast.calibrate.constants.errors import errors, median_error
from tensorcast.calibrate.constants.minimise import fit_constants, minimise
from tensorcast.cost.collectives import collective_time
from tensorcast.cost.roofline import constants_for, kernel_time, peak_flops
from tensorcast.cost.row_seconds import predict
from tensorcast.cost.work import Work
from tensorcast.errors import InputError
from tensorcast.files import write_atomically
from tensorcast.measure.store import works_from
from tensorcast.profiles.device import Calibration, CollectiveConstants, DeviceProfile, KernelConstants

if TYPE_CHECKING:
    import pandas as pd

HELD_OUT = 3
"""One shape in so many is left out of the fit."""

FEWEST = 4
"""Fewer distinct shapes than this are not fitted."""

GAIN = 1e-4
"""Error that a fit must take away to be worth a change."""

LARGE_BYTES = 8e6
"""Traffic from which on a kernel's bytes/s are memory's: its operands rotate through more than a cache holds."""

OTHER_BOARDS = {"pcie", "nvl"}
"""Words of a GPU's name that tell it from the SXM module of the same chip."""

Bounds = dict[str, tuple[float, float, float]]
"""name: (start, least, most)"""

MEMORY_BOUNDS: Bounds = {"memory_efficiency": (0.5, 1e-4, 1.0), "launch_s": (4e-6, 2e-7, 1e-3)}
CPU_BOUNDS: Bounds = {"compute_efficiency": (0.7, 0.01, 1.0), **MEMORY_BOUNDS}
GPU_BOUNDS: Bounds = {
    "compute_efficiency": (0.7, 0.02, 1.0), "memory_efficiency": (0.8, 0.05, 1.0), "launch_s": (3e-6, 2e-7, 6e-5),
    "tile_s": (3e-7, 1e-9, 2e-5), "step_s": (1e-9, 1e-12, 1e-7), "split_s": (3e-6, 1e-8, 4e-5),
}
COLLECTIVE_BOUNDS: Bounds = {"latency_s": (2e-5, 5e-7, 1e-2), "bandwidth_efficiency": (0.5, 0.001, 1.2)}


@dataclass(frozen=True)
class Fit:
    """One family's (or kernel's) constants before and after, and their median error on the shapes left out."""

    family: str
    dtype: str
    points: int
    held_out: int
    before: float
    after: float
    constants: KernelConstants | CollectiveConstants | None
    verdict: str

    @property
    def taken(self) -> bool:
        return self.constants is not None and self.verdict == ""


def left_out(texts: Sequence[str]) -> np.ndarray:
    """True for every third shape in the order of their hashes: the same whatever order they were measured in."""
    order = np.argsort([zlib.crc32(text.encode()) for text in texts], kind="stable")
    held = np.zeros(len(texts), dtype=bool)
    held[order[HELD_OUT // 2 :: HELD_OUT]] = True
    return held


CUT_SIZES = ("tiles", "flops", "depth")


def _columns(rows: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
    """One array per attribute."""
    return {name: np.array([float(getattr(row, name)) for row in rows]) for name in names}


def _stacked(works: Sequence[Work]) -> Iterator[tuple[list[int], Work]]:
    """Works of one structure as one whose sizes are arrays: priced at once instead of one by one."""
    groups: dict[Any, list[int]] = {}
    for i, work in enumerate(works):
        cuts = tuple((t.rate, t.whole, t.longest, t.split) for t in work.tilings)
        groups.setdefault((work.family, work.dtype, work.kernel, cuts), []).append(i)
    for members in groups.values():
        first, every = works[members[0]], [works[i] for i in members]
        sizes = _columns(every, ("flops", "bytes", "issued_flops", "tiles", "rows", "elements", "calls"))
        tilings = tuple(
            replace(t, **_columns([w.tilings[i] for w in every], CUT_SIZES)) for i, t in enumerate(first.tilings)
        )
        yield members, replace(first, tilings=tilings, **sizes)


class _Rows:
    """Measured shapes of one kernel family, ready to be priced with any constants."""

    def __init__(self, works: Sequence[Work], device: DeviceProfile) -> None:
        self.count, self.device, self.groups = len(works), device, list(_stacked(works))

    def seconds(self, constants: KernelConstants) -> np.ndarray:
        found = np.zeros(self.count)
        for members, work in self.groups:
            timing = kernel_time(work, constants, self.device, passes=False)
            found[members] = np.asarray(timing.seconds) * work.calls
        return found


def device_with_peaks(device: DeviceProfile, frame: pd.DataFrame) -> DeviceProfile:
    """For a device whose peaks were themselves measured: those that these measurements surpass, raised to them.

    A busy machine shows too little of itself in the seconds that a host profile takes. Standing efficiencies shrink by
    as much, so that what they predict stays. Datasheet peaks are never touched.
    """
    if "host" not in device.sources:
        return device
    flops = {name: float(rate) for name, rate in device.peak_flops.items()}
    bandwidth = float(device.memory_bandwidth_bytes_per_s)
    raised = dict(flops)
    for row in frame[(frame.level == "op") & (frame.seconds > 0)].to_dict("records"):
        works = works_from(row["works"])
        if len(works) != 1:
            continue
        work, seconds = works[0], float(row["seconds"])
        at = peak_flops(device, work.dtype)
        name = next((n for n, rate in flops.items() if rate == at), None)
        if name:
            raised[name] = max(raised[name], float(work.flops) / seconds)
        if float(work.bytes) >= LARGE_BYTES:
            bandwidth = max(bandwidth, float(work.bytes) / seconds)
    data = device.model_dump()
    data["peak_flops"] = {
        n: {"value": float(f"{rate:.4g}"), "source": "host" if rate == flops[n] else "host: best of a validate run"}
        for n, rate in raised.items()
    }
    wider = bandwidth / float(device.memory_bandwidth_bytes_per_s)
    if wider > 1.0:
        source = "host: best of a validate run"
        data["memory_bandwidth_bytes_per_s"] = {"value": float(f"{bandwidth:.4g}"), "source": source}
    faster = {dtype: raised[dtype] / flops[dtype] for dtype in flops}
    for entry in (data["calibration"] or {}).get("kernels", ()):
        entry["memory_efficiency"] /= wider
        entry["compute_efficiency"] /= faster.get(entry["dtype"], 1.0)
    return DeviceProfile.model_validate(data)


def _near(bounds: Bounds, price: Callable[[dict[str, float]], np.ndarray], seconds: np.ndarray) -> Bounds:
    """The bounds with a start from which the robust loss, flat beyond a factor of two, can see the measurements: the
    least mean |log ratio|, which no outlier bends far."""
    names = list(bounds)
    start, low, high = (np.log([bounds[name][i] for name in names]) for i in range(3))

    def loss(x: np.ndarray) -> float:
        return float(np.abs(np.log(price(dict(zip(names, np.exp(x).tolist(), strict=True))) / seconds)).mean())

    found, _ = minimise(loss, start, low, high)
    return {name: (float(v), *bounds[name][1:]) for name, v in zip(names, np.exp(found), strict=True)}


def _fit_rows(
    works: list[Work], seconds: np.ndarray, held: np.ndarray, device: DeviceProfile, *, family: str, dtype: str,
    engine: str,
) -> KernelConstants:
    """Constants of one kernel from the rows that are not ``held`` out, with their errors on those that are."""
    bounds = GPU_BOUNDS if device.whole_tiles else CPU_BOUNDS
    if family.startswith("memory"):
        bounds = MEMORY_BOUNDS
    train = _Rows([w for w, out in zip(works, held, strict=True) if not out], device)
    best: tuple[float, KernelConstants] | None = None
    for smoothing in (1.0, 2.0, 4.0):
        def build(values: dict[str, float], p: float = smoothing) -> KernelConstants:
            return KernelConstants.model_construct(
                family=family, dtype=dtype, engine=engine, smoothing=p, **{"compute_efficiency": 1.0, **values},  # type: ignore[arg-type]
            )

        def price(values: dict[str, float], make: Any = build) -> np.ndarray:
            return train.seconds(make(values))

        found, loss = fit_constants(_near(bounds, price, seconds[~held]), price, seconds[~held])
        if best is None or loss < best[0] - 1e-6:
            best = loss, build(found)
    assert best is not None
    test = _Rows([w for w, out in zip(works, held, strict=True) if out], device)
    score = errors(test.seconds(best[1]), seconds[held])
    counts = {"points": int((~held).sum()), "held_out": int(held.sum())}
    return KernelConstants(**{**best[1].model_dump(exclude_unset=True), **counts, **score})


def _shapes(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of one kernel each, every shape once, with its work parsed."""
    import pandas as pd

    rows = frame[(frame.level == "op") & (frame.seconds > 0)].drop_duplicates(["op", "works"])
    parsed = [works_from(text) for text in rows.works]
    single = np.array([len(works) == 1 for works in parsed], dtype=bool)
    found = rows[single].copy()
    found = found.assign(work=pd.Series([works[0] for works in parsed if len(works) == 1], found.index, dtype=object))
    found["kernel"] = [work.kernel for work in found.work]
    found["held"] = False
    for _, part in found.groupby(["family", "dtype", "kernel"]):
        found.loc[part.index, "held"] = left_out(list(part.works))
    return found


def left_out_errors(frame: pd.DataFrame, device: DeviceProfile, engine: str = "eager") -> pd.DataFrame:
    """Shapes that no fit has seen: ``family``, ``op``, and ``error`` of what ``device`` predicts."""
    rows = _shapes(frame.reset_index(drop=True))
    rows = rows[rows.held]
    seconds = [predict([work], device, engine_of(device, engine)).seconds for work in rows.work]
    return rows.assign(error=np.array(seconds) / rows.seconds - 1.0)[["family", "op", "shape", "seconds", "error"]]


def fit_kernels(frame: pd.DataFrame, device: DeviceProfile, engine: str = "any") -> list[Fit]:
    """Constants per family and dtype, and for kernels that move data per op; each with its verdict."""
    shapes, fits = _shapes(frame.reset_index(drop=True)), []
    for (family, dtype), rows in shapes.groupby(["family", "dtype"], sort=True):
        groups = [(str(family), rows)]
        if family == "memory":
            groups += [("memory/" + str(name), part) for name, part in rows.groupby("kernel") if name]
        for name, part in groups:
            if len(part) < FEWEST:
                continue
            works, seconds = list(part.work), part.seconds.to_numpy(float)
            held = part.held.to_numpy(bool)
            found = _fit_rows(works, seconds, held, device, family=name, dtype=str(dtype), engine=engine)
            standing, _ = constants_for(device, str(family), str(dtype), engine, name.partition("/")[2])
            out = _Rows([w for w, one in zip(works, held, strict=True) if one], device)
            before = median_error(out.seconds(standing) / seconds[held] - 1.0)
            after = median_error(out.seconds(found) / seconds[held] - 1.0)
            verdict = "" if after < before - GAIN else f"refused: {after:.1%} on shapes left out, {before:.1%} stands"
            fits.append(Fit(
                family=name, dtype=str(dtype), points=found.points, held_out=found.held_out, before=before,
                after=after, constants=found, verdict=verdict,
            ))  # fmt: skip
    return fits


def fit_collectives(frame: pd.DataFrame, device: DeviceProfile) -> list[Fit]:
    """Latency and bandwidth of every collective on the innermost tier, from a run under torchrun."""
    fits: list[Fit] = []
    rows = frame[(frame.level == "collective") & (frame.seconds > 0)]
    tier = device.interconnect[0]
    for op, part in rows.groupby("op", sort=True):
        if len(part) < FEWEST:
            continue
        payload, seconds = part.payload_bytes.to_numpy(float), part.seconds.to_numpy(float)
        ranks, held = int(part.ranks.iloc[0]), left_out([str(p) for p in part.payload_bytes])
        share = (ranks - 1) / ranks * (2.0 if op == "all_reduce" else 1.0)
        wire, speed = share * payload, tier.among(ranks)

        def price(values: dict[str, float], wire: np.ndarray = wire[~held], speed: float = speed) -> np.ndarray:
            return values["latency_s"] + wire / (speed * values["bandwidth_efficiency"])

        found, _ = fit_constants(_near(COLLECTIVE_BOUNDS, price, seconds[~held]), price, seconds[~held])
        standing = collective_time(op, payload[held], (ranks,), device, custom=False)  # type: ignore[arg-type]
        before = median_error(np.asarray(standing.seconds) / seconds[held] - 1.0)
        score = errors(price(found, wire[held]), seconds[held])
        after = median_error(price(found, wire[held]) / seconds[held] - 1.0)
        algorithm = "direct" if op == "all_to_all" else "ring"
        constants = CollectiveConstants(
            op=op, tier=tier.name, algorithm=algorithm, points=int((~held).sum()), held_out=int(held.sum()),  # type: ignore[arg-type]
            **found, **score,  # type: ignore[arg-type]
        )
        verdict = "" if after < before - GAIN else f"refused: {after:.1%} on sizes left out, {before:.1%} stands"
        fits.append(Fit(
            family=str(op), dtype="any", points=constants.points, held_out=constants.held_out, before=before,
            after=after, constants=constants, verdict=verdict,
        ))  # fmt: skip
    return fits


def calibrated(device: DeviceProfile, fits: Sequence[Fit], provenance: str, date: str | None = None) -> DeviceProfile:
    """``device`` with the fits that were taken in place of those of the same family, dtype and engine."""
    taken = [fit.constants for fit in fits if fit.taken]
    old = device.calibration or Calibration(provenance="", date="")
    kernels = {(c.family, c.dtype, c.engine): c for c in old.kernels}
    kernels |= {(c.family, c.dtype, c.engine): c for c in taken if isinstance(c, KernelConstants)}
    collectives = {(c.op, c.tier, c.algorithm, c.engine): c for c in old.collectives}
    collectives |= {(c.op, c.tier, c.algorithm, c.engine): c for c in taken if isinstance(c, CollectiveConstants)}
    replaced = len(taken) == len(kernels) + len(collectives)
    said = provenance if replaced or not old.provenance else f"{provenance}; the rest: {old.provenance}"
    new = Calibration(
        provenance=said, date=date or datetime.date.today().isoformat(), dropped=old.dropped,
        kernels=tuple(kernels.values()), collectives=tuple(collectives.values()),
    )
    return device.model_copy(update={"calibration": new})


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.casefold().replace("ascend", " ")))


def is_device(recorded: str, device: DeviceProfile) -> bool:
    """Whether a measurement's ``device`` (CUDA's name of the GPU, the processor's on a host) is this profile's: the
    host's description, else a name or alias of the profile as a word in it; other boards than SXM are other devices."""
    names = {name.casefold() for name in (device.name, *device.aliases, device.description)}
    if recorded.casefold() in names:
        return True
    if "host" in device.sources:
        return False
    words = _words(recorded)
    return bool(words & names) and not (words & OTHER_BOARDS and "sxm" in device.name)


def check_device(device: DeviceProfile, frame: pd.DataFrame) -> None:
    """Raises :class:`InputError`, one line, where ``frame`` holds measurements of another device."""
    for recorded in sorted({str(name or "") for name in frame["device"]}):
        if not is_device(recorded, device):
            what = f"{device.name} ({device.description})" if "host" in device.sources else device.name
            raise InputError(
                f"--device {what}: the measurements were taken on {recorded or 'a device that they do not name'}; "
                "if that is the same, name it so in the profile's aliases"
            )


def engine_of(device: DeviceProfile, asked: str) -> str:
    """``any`` on a device whose constants name no engine (this machine), else the engine that was measured."""
    standing = device.calibration.kernels if device.calibration else ()
    return asked if any(c.engine != "any" for c in standing) else "any"


def calibrate(device: DeviceProfile, frame: pd.DataFrame, engine: str = "eager") -> tuple[DeviceProfile, list[Fit]]:
    """Fit everything that ``frame`` holds. Raises :class:`InputError` where it was measured on another device, or where
    nothing beats what stands."""
    if not len(frame):
        raise InputError("no measurements to calibrate from")
    check_device(device, frame)
    device = device_with_peaks(device, frame)
    fits = [*fit_kernels(frame, device, engine_of(device, engine)), *fit_collectives(frame, device)]
    if not fits:
        raise InputError(f"no kernel family has {FEWEST} measured shapes: measure more batches or lengths")
    if not any(fit.taken for fit in fits):
        best = min(fits, key=lambda fit: fit.after - fit.before)
        raise InputError(
            f"no fit is better than what stands in {device.name}: {best.family} {best.dtype} comes closest, "
            f"{best.after:.1%} against {best.before:.1%} on shapes left out; nothing is written"
        )
    machine = sorted({str(name) for name in frame.device if name}) or ["unknown device"]
    torch = sorted({str(v) for v in frame.get("torch", ()) if v})
    dates = sorted({str(d) for d in frame.get("date", ()) if d})
    measured = int(((frame.seconds > 0) & frame.level.isin(["op", "collective"])).sum())
    provenance = (
        f"tensorcast validate on {', '.join(machine)}"
        + (f", torch {', '.join(torch)}" if torch else "") + (f", measured {dates[-1]}" if dates else "")
        + f"; {measured} points; one shape in {HELD_OUT} left out, errors are theirs"
    )
    return calibrated(device, fits, provenance), fits


def write_profile(path: Path, device: DeviceProfile, source: Path | None) -> None:
    """``device`` as YAML: the hand-written part of ``path``, else of ``source``, else of the profile; then the fit.

    Raises :class:`InputError` where ``path`` holds something else.
    """
    from tensorcast.calibrate.constants.from_tables import MARKER, render

    hand, path = "", Path(path)
    for base in (path, source):
        if not hand and base is not None and base.is_file():
            hand = base.read_bytes().decode("utf-8").partition(MARKER)[0]
            try:
                name = (yaml.safe_load(hand) or {}).get("name")
            except (yaml.YAMLError, AttributeError):
                name = None
            if name != device.name:
                raise InputError(f"{base}: not the profile of {device.name}; give --write another name")
    if not hand or "host" in device.sources:  # peaks of this machine may have moved
        plain = device.model_dump(mode="json", exclude_defaults=True, exclude={"calibration"})
        hand = yaml.safe_dump(plain, sort_keys=False, width=110, allow_unicode=True)
    assert device.calibration is not None
    write_atomically(path, hand.rstrip("\n") + "\n\n" + render(device.calibration))


def fits_frame(fits: Sequence[Fit]) -> pd.DataFrame:
    """One row per fit: family, dtype, points, held_out, error before and after on shapes left out, verdict."""
    import pandas as pd

    columns = ("family", "dtype", "points", "held_out", "before", "after", "verdict")
    return pd.DataFrame([{k: v for k, v in asdict(fit).items() if k in columns} for fit in fits], columns=columns)
