"""Measured kernels of one system, kernel by kernel: sizes, seconds, and which rows were left out by which rule.

Reads two layouts of the same public tables (``aiconfigurator-core``, Apache-2.0): ``SYSTEM/KIND/ENGINE_TABLE.parquet``
in a folder, or ``SYSTEM/KIND/ENGINE/VERSION/TABLE.parquet`` in an installed package's ``systems/data``, of each table
the newest version. Needs pyarrow.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from tensorcast.calibrate.constants.tables import LOWEST_S, SHAPE, row_hash
from tensorcast.cost.kernels.shape_tables import calls_of
from tensorcast.cost.kernels.vocabulary import ALIASES, SIZES, Columns
from tensorcast.errors import InputError

ANY_ENGINE = ("nccl", "wideep_deepep_ll", "wideep_deepep_normal")
"""Tables of libraries that every engine calls."""

NOT_READ = ("computescale", "dsv4_megamoe_module")
"""Tables without a family here: a difference of two kernels that is mostly zero; one fused module of one model."""

MICROSECONDS = ("moe_a2a",)
"""Tables whose ``latency`` is in microseconds; the others' is in milliseconds."""

Key = tuple[str, str, str, str]
"""Family, dtype, engine, variant."""


@dataclass
class Measured:
    """Rows of one kernel: sizes, seconds, and the version of the engine that ran."""

    key: Key
    columns: Columns
    seconds: np.ndarray
    versions: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.seconds)

    def take(self, rows: np.ndarray) -> Measured:
        """The named rows (a mask or positions)."""
        return Measured(self.key, {n: v[rows] for n, v in self.columns.items()}, self.seconds[rows], self.versions)


@dataclass
class System:
    """All kernels measured on one system, and how many rows each rule left out, by ``family: reason``."""

    name: str
    kernels: dict[Key, Measured] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)


def installed_tables() -> Path:
    """Where an installed ``aiconfigurator-core`` keeps its tables. Raises :class:`InputError` where there is none."""
    found = importlib.util.find_spec("aiconfigurator_core")
    if found is None or not found.submodule_search_locations:
        raise InputError("no aiconfigurator-core is installed: pip install 'tensorcast[silicon]', or give a folder")
    return Path(next(iter(found.submodule_search_locations))) / "systems" / "data"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def table_files(folder: Path, system: str) -> list[tuple[str, str, str, Path]]:
    """(engine, table, version or "", file) of every table of a system, in either layout."""
    flat = [(*p.stem.partition("_")[::2], "", p) for p in sorted(folder.glob(f"{system}/*/*.parquet"))]
    newest: dict[tuple[str, str], tuple[str, str, str, Path]] = {}
    for path in folder.glob(f"{system}/*/*/*/*.parquet"):
        version, engine = path.parts[-2], path.parts[-3]
        key, found = (engine, path.stem), (engine, path.stem, version, path)
        if key not in newest or _version(version) > _version(newest[key][2]):
            newest[key] = found
    return flat + [newest[key] for key in sorted(newest)]


def systems_in(folder: Path) -> list[str]:
    """Names of the systems that a folder of tables holds."""
    if not Path(folder).is_dir():
        raise InputError(f"no folder of measured tables at {folder}")
    return sorted({path.parts[len(Path(folder).parts)] for path in Path(folder).glob("*/*/**/*.parquet")})


def _both_directions(raw: pd.DataFrame) -> pd.DataFrame:
    """DeepEP's tables hold dispatch and combine in one row: one row each."""
    parts = []
    for phase in ("dispatch", "combine"):
        times = next(raw[c] for c in (f"{phase}_avg_t_us", f"{phase}_transmit_us") if c in raw.columns)
        parts.append(raw.assign(phase=phase, latency=times / 1e3))
    return pd.concat(parts, ignore_index=True)


def _bad_rows(key: Key, columns: Columns, seconds: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(reason, rows that it drops), applied in turn."""
    family, dtype, engine, variant = key
    yield "no time or under 1 us", ~(seconds > LOWEST_S)
    if family == "gemm" and dtype == "fp8_block" and engine == "vllm":
        yield ("vllm fp8_block timed without graph capture (host-bound floor of 60-400 us)", seconds > 0)
    if variant == "eager":
        yield ("launched one by one: a captured step runs the graph's kernels", seconds > 0)
    if family == "grouped_gemm" and engine in ("sglang", "vllm") and not variant:
        deepseek = (columns["hidden"] == 7168) & (columns["experts"] == 256) & (columns["topk"] == 8)
        yield (
            "grouped top-k ties send most choices to rank 0 (sglang, vllm; DeepSeek-V3, EP > 1)",
            deepseek & (columns["moe_ep"] > 1),
        )
    if family == "moe_exchange" and variant.startswith("low_latency"):
        yield (
            "low-latency exchange with under 32 experts (few warps drive the link: a tenth of its speed)",
            columns["experts"] < 32,
        )


def distribution_of(skew: float) -> str:
    """The tables' name of a routing law."""
    return {0.0: "balanced", -1.0: "uniform"}.get(skew, f"power_law_{skew:g}")


def hashed(family: str, columns: Columns) -> np.ndarray:
    """A hash of every row's shape: the same wherever it was read from, and as the constants' fit splits its rows."""
    frame = pd.DataFrame(columns)
    if "skew" in frame:
        frame["distribution"] = frame["skew"].map(distribution_of)
    names = SHAPE.get(family, ())
    if not names or not set(names) <= set(frame.columns):
        names = tuple(name for name in SIZES[family] if name != "skew")
    return row_hash(frame, names)


def held_out(family: str, columns: Columns, share: int = 4) -> np.ndarray:
    """One shape in ``share``, on every device and engine alike."""
    return hashed(family, columns) % share == 0


def read_system(folder: Path, system: str, families: tuple[str, ...] | None = None) -> System:
    """Every known table of a system. Raises :class:`InputError` where there is none."""
    result = System(system)
    parts: dict[Key, list[Measured]] = {}
    for engine, stem, version, path in table_files(Path(folder), system):
        table = stem.removesuffix("_perf")
        family = ALIASES.get(table, table)
        if table in NOT_READ or (family not in SIZES and table != "nccl"):
            continue
        if families and family not in families and table != "nccl":
            continue
        try:
            raw = pd.read_parquet(path)
        except ImportError as error:
            raise InputError("reading measured tables needs pyarrow: pip install 'tensorcast[calibrate]'") from error
        raw = raw.assign(family=table, system=system)
        if table.startswith("wideep_deepep"):
            raw = _both_directions(raw)
        seconds = raw["latency"].to_numpy(float) * (1e-6 if table in MICROSECONDS else 1e-3)
        kind = "any" if table in ANY_ENGINE else engine
        known = raw["engine_version"].astype(str).unique() if "engine_version" in raw else [version]
        for calls in calls_of(raw):
            key = (calls.family, calls.dtype, kind, calls.variant)
            rows = Measured(key, calls.columns, seconds[calls.rows], tuple(f"{engine} {v}" for v in known))
            keep = np.ones(len(rows), dtype=bool)
            for reason, bad in _bad_rows(key, rows.columns, rows.seconds):
                if count := int((keep & bad).sum()):
                    name = f"{calls.family}: {reason}"
                    result.dropped[name] = result.dropped.get(name, 0) + count
                keep &= ~bad
            rows = rows.take(keep)
            if len(rows):
                parts.setdefault(key, []).append(rows)
    for key, found in parts.items():
        result.kernels[key] = _repeats(found, result.dropped)
    if not result.kernels:
        raise InputError(f"no measured tables of {system} below {folder}")
    return result


def _repeats(found: list[Measured], dropped: dict[str, int]) -> Measured:
    """One row per shape: the median of repeats, counted."""
    whole = pd.concat([pd.DataFrame({**part.columns, "seconds": part.seconds}) for part in found], ignore_index=True)
    sizes = [name for name in whole.columns if name != "seconds"]
    single = whole.groupby(sizes, sort=False, as_index=False)["seconds"].median()
    if len(single) < len(whole):
        reason = f"{found[0].key[0]}: repeats of a shape, their median taken"
        dropped[reason] = dropped.get(reason, 0) + len(whole) - len(single)
    columns = {name: single[name].to_numpy(float) for name in sizes}
    versions = tuple(sorted({version for part in found for version in part.versions}))
    return Measured(found[0].key, columns, single["seconds"].to_numpy(float), versions)
