"""Constants of attention that chooses what it reads, from tables that timed whole attention modules.

``python -m tensorcast.calibrate.attention_modules --tables DIR [--device NAME] [--profiles DIR]``. DeepSeek-V3.2's and
GLM-5's sparse attention, DeepSeek-V4's over compressed entries and MiniMax-M3's over blocks have no tables of their
kernels on every device and engine, but of the module around them: projections, norms, indexer, attention, output
(aiconfigurator-core, ``sparse_attention`` and ``msa``). What such a module takes over the price of its other rows is
given to the attention and to those kernels of the indexer that were not timed alone, so that a step adds up to the
module as it was timed. Run after :mod:`tensorcast.calibrate.devices`, whose constants price the other rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tensorcast.calibrate import command
from tensorcast.calibrate.constants.errors import errors
from tensorcast.calibrate.constants.from_tables import write_calibration
from tensorcast.calibrate.constants.minimise import FEWEST, fit_constants
from tensorcast.calibrate.measured_devices import system_of
from tensorcast.calibrate.measured_tables import row_hash, table_files
from tensorcast.cost.formulas import work_of
from tensorcast.cost.roofline import constants_for, kernel_time, sparse_constants
from tensorcast.cost.work import Array, Work
from tensorcast.deploy.deployment import Deployment, deploy
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.options import options_of
from tensorcast.deploy.step.price import pick
from tensorcast.errors import InputError, unknown_name
from tensorcast.profiles.device import DeviceProfile, KernelConstants
from tensorcast.profiles.store import load_device, load_engine, load_model
from tensorcast.trace.table import Op

MODELS = {
    "deepseek-ai/DeepSeek-V3.2": "deepseek-v3.2", "zai-org/GLM-5-FP8": "glm-5",
    "sgl-project/DeepSeek-V4-Flash-FP8": "deepseek-v4-flash", "deepseek-ai/DeepSeek-V4-Pro": "deepseek-v4-pro",
    "MiniMaxAI/MiniMax-M3": "minimax-m3",
}
"""The tables' models, as this package knows the same networks."""

LINEAR = {"deepseek-v3.2": "fp8_block", "glm-5": "fp8_block", "deepseek-v4-flash": "fp8_block",
          "deepseek-v4-pro": "fp8_block", "minimax-m3": "bfloat16"}
"""In what the tables timed the projections as those networks' checkpoints hold them."""

SKIPPED = "skip_indexer"
"""Modules of GLM-5.2 that take another layer's selection: their rows are of the other's attention alone."""

EXPANDED = "dense_mha"
"""SGLang's kernels over expanded keys for prompts within the selection's width. Its prefill graphs, which hold 8,192
tokens of such a model, run the sparse ones (0.5.23, layers/attention/dsa_backend.py)."""

FLOOR = 1.5
"""Prompts' rows within so many times of their table's least are the host's time, which launches kernel by kernel."""

PRICED = 1600
"""Rows of a table and cache precision that are priced; three quarters of them are fitted to."""

BOUNDS = {
    "compute_efficiency": (0.4, 0.01, 1.0), "memory_efficiency": (0.5, 0.01, 1.0), "launch_s": (1e-5, 1e-8, 3e-4),
    "row_s": (1e-8, 1e-12, 2e-5),
}


TIMED_ALONE = ("sglang", "indexer_topk")
"""Whose selection on prompts was timed by itself (:data:`tensorcast.cost.roofline.SPARSE`), as every engine's scores of
prompts were (DeepGEMM's kernel); others' is fitted here."""


@dataclass(frozen=True)
class ModuleTable:
    """One table: ``families`` of kernels that it fits; what the attention of the layers that it timed ``has`` among its
    attributes, and ``lacks``."""

    name: str
    phase: str
    families: tuple[str, ...]
    has: str
    lacks: tuple[str, ...] = ()

    def fitted(self, engine: str) -> tuple[str, ...]:
        """The families that are fitted for an engine."""
        return tuple(family for family in self.families if (engine, family) != TIMED_ALONE)


TABLES = (
    ModuleTable("dsa_generation_module", "decode", ("mla_sparse_decode", "indexer_decode"), "latent"),
    ModuleTable("dsa_context_module", "prefill", ("mla_sparse", "indexer_topk"), "latent"),
    ModuleTable("dsv4_csa_generation_module", "decode", ("compressed_decode", "indexer_decode"), "picked"),
    ModuleTable("dsv4_hca_generation_module", "decode", ("compressed_decode",), "compress", ("picked",)),
    ModuleTable("dsv4_csa_context_module", "prefill", ("compressed_prefill", "indexer_topk"), "picked"),
    ModuleTable("dsv4_hca_context_module", "prefill", ("compressed_prefill",), "compress", ("picked",)),
    ModuleTable("msa_generation_module", "decode", ("blocks_decode", "block_scores_decode"), "selected", ("latent",)),
    ModuleTable("msa_context_module", "prefill", ("blocks_prefill", "block_scores_prefill"), "selected", ("latent",)),
)

STREAM_TABLE = ModuleTable("mhc_module", "prefill", ("memory",), "stream_mix")

FAMILIES = frozenset(family for table in TABLES for family in table.families)

WORST = 0.3
"""Fits with a larger median error on modules held out say nothing of a kernel: those modules ran another one."""


@dataclass(frozen=True)
class Timed:
    """Rows of modules: what they took, the price of their other rows, and the works of those to be fitted."""

    seconds: Array
    others_s: Array
    works: tuple[Work, ...]
    held_out: np.ndarray


def read_rows(path: Path, table: ModuleTable) -> pd.DataFrame:
    """The rows that count: known models at their own precision, kernels that engines run at these lengths.

    Adds ``model``, ``tp``, ``kv``, ``batch``, ``new``, ``past`` and ``seconds``.
    """
    raw = pd.read_parquet(path)
    raw = raw[raw["model"].isin(list(MODELS))]
    raw = raw.assign(model=raw["model"].map(MODELS))
    raw = raw[raw["gemm_type"] == raw["model"].map(LINEAR)]
    raw = raw[~raw["op_name"].str.contains(SKIPPED) & ~raw["kernel_source"].str.contains(EXPANDED)]
    heads = raw["model"].map({name: _heads(name) for name in raw["model"].unique()})
    generation = table.phase == "decode"
    kv = np.where(raw["kv_cache_dtype"].str.contains("fp8"), "fp8", "bf16")
    raw = raw.assign(
        tp=(heads // raw["num_heads"]).astype(int), kv=kv,
        batch=raw["batch_size"].astype(float), new=np.where(generation, 1.0, raw["isl"].astype(float)),
        past=(raw["step"] + (raw["isl"] - 1 if generation else 0)).astype(float), seconds=raw["latency"] * 1e-3,
    )
    if not generation and len(raw):
        raw = raw[raw["seconds"] > FLOOR * raw["seconds"].quantile(0.02)]
    return raw.sample(frac=1.0, random_state=0).groupby("kv").head(PRICED)


def _heads(name: str) -> int:
    config = load_model(name).config
    return int(config["num_attention_heads"])


def _rows_of(deployment: Deployment, table: ModuleTable) -> tuple[int, str]:
    """Layer kind and module of the attention that a table timed; (-1, "") where the model has none such."""
    for op in deployment.step.table.ops:
        attrs = op.attrs
        if op.name != "attention" or any(attrs.get(name) for name in table.lacks):
            continue
        if attrs.get(table.has) and (attrs["selected"] or table.has != "latent"):
            return op.kind, op.module
    return -1, ""


def timed(rows: pd.DataFrame, table: ModuleTable, device: DeviceProfile, engine: str) -> Iterator[Timed]:
    """The modules of each model, tensor-parallel size and cache of ``rows``, beside what the product says of them."""
    for key, group in rows.groupby(["model", "tp", "kv"]):
        name, tp, kv = (str(part) for part in key)
        try:
            deployment = deploy(
                load_model(name), device, load_engine(engine), Layout(world_size=int(tp), tp=int(tp)), table.phase,
                options=options_of({"kv_dtype": kv}),
            )
        except InputError:  # a cut that the engine of today refuses
            continue
        kind, module = _rows_of(deployment, table)
        if kind < 0:
            continue
        columns = [group[one].to_numpy(float) for one in ("batch", "new", "past")]
        others, works = _split(deployment, kind, module, columns, table.fitted(engine))
        shapes = group.assign(model=name)
        yield Timed(
            group["seconds"].to_numpy(float), others, works,
            row_hash(shapes, ("model", "tp", "batch", "new", "past")) % 4 == 0,
        )


def _split(
    deployment: Deployment, kind: int, module: str, columns: Sequence[Array], families: Sequence[str]
) -> tuple[Array, tuple[Work, ...]]:
    """Seconds of the module's kernels that are not fitted, and the works of those that are."""
    engine = deployment.engine.name
    price = deployment.step.price(*columns)
    at = deployment.step.sizes.context(*columns)
    total, works = np.zeros(len(columns[0])), list[Work]()
    for part in price.parts:
        for row, cost in zip(part.rows, part.prices, strict=True):
            if not isinstance(row, Op) or row.kind != kind or module not in row.module:
                continue
            asked = [] if row.name not in ("attention", "sparse_indexer") else work_of(row, at)
            fitted = [work for work in asked if work.family in families]
            if not fitted:
                total = total + pick(cost.seconds, part.at)
                continue
            works += fitted
            for work in asked:
                if work.family not in families:
                    constants, _ = constants_for(deployment.device, work.family, work.dtype, engine, work.kernel)
                    total = total + kernel_time(work, constants, deployment.device).seconds
    return total, tuple(works)


def _named(work: Work) -> str:
    return f"{work.family}/{work.kernel}" if work.kernel else work.family


def fit(
    rows: Sequence[Timed], device: DeviceProfile, engine: str, known: Sequence[KernelConstants]
) -> list[KernelConstants]:
    """Constants that make up for what the modules take, but for kernels that are ``known``; errors of modules that were
    held out. None where no constants do."""
    joined = _joined(rows)
    fixed = {(one.family, one.dtype): one for one in known}
    free = {(_named(w), w.dtype): w for w in joined.works if (_named(w), w.dtype) not in fixed}
    bounds = {f"{family}.{name}": BOUNDS[name] for family, _ in free for name in BOUNDS}

    def constants(values: dict[str, float]) -> dict[tuple[str, str], KernelConstants]:
        return {
            (family, dtype): KernelConstants.model_construct(
                family=family, dtype=dtype, engine=engine, smoothing=1.0,
                **{name: values[f"{family}.{name}"] for name in BOUNDS},  # type: ignore[arg-type]
            )
            for family, dtype in free
        }

    def predicted(take: np.ndarray, values: dict[str, float]) -> Array:
        found = {**fixed, **constants(values)}
        total = joined.others_s[take]
        for work in joined.works:
            total = total + kernel_time(_taken(work, take), found[_named(work), work.dtype], device).seconds
        return np.asarray(total)

    train, held = np.flatnonzero(~joined.held_out), np.flatnonzero(joined.held_out)
    values, _ = fit_constants(bounds, lambda v: predicted(train, v), joined.seconds[train])
    score = errors(predicted(held, values), joined.seconds[held])
    if score["median_error"] > WORST:
        return []
    counts = {"points": len(train), "held_out": len(held)}
    return [
        KernelConstants(**{**one.model_dump(exclude_unset=True), **counts, **score})
        for one in constants(values).values()
    ]


STREAMS = {4096: "deepseek-v4-flash", 7168: "deepseek-v4-pro"}
"""Models with hyper-connections by the width that ``mhc_module`` tells: what a layer's two sites take."""


def timed_streams(path: Path, device: DeviceProfile, engine: str) -> Iterator[Timed]:
    """Hyper-connections of a layer, around attention and feed-forward network, beside what stands for them."""
    raw = pd.read_parquet(path)
    layers = pd.DataFrame(raw.groupby(["hidden_size", "num_tokens"], as_index=False)["latency"].sum())
    # what was timed ran, whatever else of the model the engine has no kernels for on this device
    named = load_engine(engine).model_copy(update={"lacking": ()})
    for width, name in STREAMS.items():
        rows = layers[layers["hidden_size"] == width]
        if rows.empty:
            continue
        deployment = deploy(
            load_model(name), device, named, Layout(world_size=1, tp=1), "prefill", options=options_of({}),
        )
        tokens = rows["num_tokens"].to_numpy(float)
        at = deployment.step.sizes.context(np.ones_like(tokens), tokens, np.zeros_like(tokens))
        ops = deployment.step.table.ops
        kind = next(op.kind for op in ops if op.attrs.get("picked"))
        works = [work for op in ops if op.kind == kind and "stream_mix" in op.parts for work in work_of(op, at)]
        yield Timed(
            rows["latency"].to_numpy(float) * 1e-3, np.zeros_like(tokens), tuple(works),
            row_hash(rows, ("hidden_size", "num_tokens")) % 4 == 0,
        )


def _taken(work: Work, take: np.ndarray) -> Work:
    sizes: dict[str, Any] = {name: np.asarray(getattr(work, name))[take] for name in SIZED}
    return Work(work.family, work.dtype, kernel=work.kernel, **sizes)


SIZED = ("flops", "bytes", "issued_flops", "rows", "elements")


def _joined(rows: Sequence[Timed]) -> Timed:
    """Several modules' rows as one."""
    works = []
    for same in zip(*(one.works for one in rows), strict=True):
        sizes = [len(one.seconds) for one in rows]
        columns: dict[str, Any] = {
            name: np.concatenate([np.broadcast_to(getattr(w, name), (n,)) for w, n in zip(same, sizes, strict=True)])
            for name in SIZED
        }
        works.append(Work(same[0].family, same[0].dtype, kernel=same[0].kernel, **columns))
    return Timed(
        np.concatenate([one.seconds for one in rows]), np.concatenate([one.others_s for one in rows]), tuple(works),
        np.concatenate([one.held_out for one in rows]),
    )


def calibrated(
    device: DeviceProfile, folder: Path, system: str, tables: Sequence[str] = ()
) -> tuple[KernelConstants, ...]:
    """The device's constants, those of such kernels anew from every module that was timed on it, or from ``tables``."""
    files = {(engine, stem.removesuffix("_perf")): path for engine, stem, _, path in table_files(folder, system)}
    assert device.calibration is not None
    found = list[KernelConstants]()
    for table in (*TABLES, STREAM_TABLE):
        for engine in ("sglang", "trtllm", "vllm"):
            if (engine, table.name) not in files or (tables and table.name not in tables):
                continue
            new: list[KernelConstants] = []
            if table is STREAM_TABLE:
                new = fit(list(timed_streams(files[engine, table.name], device, engine)), device, engine, [])
            else:
                for _, rows in sorted(read_rows(files[engine, table.name], table).groupby("kv"), reverse=True):
                    parts = list(timed(rows, table, device, engine))
                    if sum(int((~part.held_out).sum()) for part in parts) >= FEWEST:
                        new += fit(parts, device, engine, new)
            said = ", ".join(f"{one.family} {one.dtype} {one.median_error:.1%}" for one in new)
            print(f"{device.name} {engine} {table.name}: {said or 'none'}", flush=True)
            found += new
    if not tables and any(one.family.startswith("mla_sparse") for one in found):
        found += timed_alone()
    anew = {(one.family, one.dtype, one.engine) for one in found}
    kept = [
        one for one in device.calibration.kernels
        if (one.family, one.dtype, one.engine) not in anew and (tables or not fitted_to_modules(one.family))
    ]
    return (*kept, *found)


def timed_alone() -> list[KernelConstants]:
    """Constants of the indexers' kernels that tables hold by themselves, on the devices that have such tables."""
    engine, family = TIMED_ALONE
    selection = sparse_constants(family, "bf16", engine=engine)
    compressed = selection.model_copy(update={"family": f"{family}/compressed"})
    return [sparse_constants("indexer_scores", "fp8"), selection, compressed]


def fitted_to_modules(family: str) -> bool:
    """Whether constants of a family come from here."""
    return family.partition("/")[0] in {*FAMILIES, "indexer_scores"} or family == "memory/stream_mix"


def calibrate(
    folder: Path, profiles: Path, devices: Sequence[str] = (), tables: Sequence[str] = ()
) -> None:
    """Write the constants of every device of which ``folder`` has such tables into its profile."""
    known = [load_device(path) for path in sorted((profiles / "devices").glob("*.yaml"))]
    chosen = [one for one in known if not devices or one.name in devices]
    if missing := sorted(set(devices) - {one.name for one in chosen}):
        raise InputError(f"no device profile {missing[0]} in {profiles / 'devices'}")
    for device in chosen:
        system = system_of(folder, device)
        if system is None or device.calibration is None:
            continue
        kernels = calibrated(device, folder, system, tables)
        if kernels != device.calibration.kernels:
            new = device.calibration.model_copy(update={"kernels": kernels})
            write_calibration(profiles / "devices" / f"{device.name}.yaml", new)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = command.tables_parser("tensorcast.calibrate.attention_modules", __doc__.splitlines()[0])
    parser.add_argument("--table", action="append", default=[], help="this table alone, other constants kept")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.table) - {table.name for table in (*TABLES, STREAM_TABLE)}):
        raise unknown_name("--table", unknown[0], [table.name for table in (*TABLES, STREAM_TABLE)])
    folder = command.tables_of(options)
    calibrate(folder, options.profiles, options.device, options.table)
    return 0


if __name__ == "__main__":
    command.run(main)
