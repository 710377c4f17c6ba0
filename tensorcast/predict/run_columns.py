"""A table of deployments, one per row: its columns, their aliases and defaults, and what a row says once read.

Column names are compared without case, ``-`` as ``_``. A cell that is empty, ``nan``, ``none`` or ``0`` (where 0 means
nothing) takes the default. For disaggregated rows every size of a layout exists twice, as ``prefill_tp`` and
``decode_tp``; a size without prefix counts for both. What defaults were taken is said in the ``assumed`` column.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from tensorcast.deploy.layout import Layout, one_server
from tensorcast.deploy.model_names import understand
from tensorcast.deploy.options import SERVED_ROUTING, Options, of_traffic
from tensorcast.errors import InputError, unknown_name
from tensorcast.predict.arrivals import ARRIVAL_COLUMNS, Arrivals, read_arrivals, read_client, with_waits
from tensorcast.predict.cells import MOST_NAMED, Cells, is_empty
from tensorcast.predict.image_columns import IMAGE_COLUMNS, read_images
from tensorcast.predict.launch_records import (
    LENGTH_RATIO,
    MTP_ACCEPTANCE,
    Launched,
    Recorded,
    aggregated_sizes,
    counted_twice,
    frontend,
    launched,
    launched_pools,
    pool_sizes,
    rules_of,
    wait_steps,
)
from tensorcast.predict.stored_in import kv_dtype, stored_in
from tensorcast.profiles.engine import Frontend
from tensorcast.serving.encoder import PromptImages
from tensorcast.serving.traffic import steps_waited

WORKER_COLUMNS = {
    "tp": ("attention tensor-parallel size", 1, ("tp_size", "tensor_parallel_size")),
    "dp": ("attention data-parallel size", 1, ("dp_size", "data_parallel_size", "attention_dp", "attention_dp_size")),
    "ep": ("expert-parallel size", None, ("ep_size", "moe_ep", "moe_ep_size", "expert_parallel_size")),
    "moe_tp": ("ranks that share one expert; tp*dp = moe_tp*ep", None, ("etp", "moe_tp_size")),
    "pp": ("pipeline stages", 1, ("pp_size", "pipeline_parallel_size")),
    "batch": ("requests per data-parallel rank, where concurrency is not given", None, ("batch_size",)),
    "workers": ("workers of a pool; default one decode per 64 users, 2.5 decode per prefill", None, ("num_workers",)),
}
"""Columns of a layout: what they say, default (None: follows from the others), other names. Prefixes as above."""

COLUMNS: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "model": ("profile, alias, Hugging Face id or path", None, ("model_path", "model_name", "hf_id")),
    "device": ("profile or alias", None, ("system", "gpu", "hardware")),
    "engine": ("profile or alias", "vllm", ("backend", "framework")),
    "mode": ("aggregated (agg) or disaggregated (disagg)", "aggregated", ("form", "serving_mode")),
    "isl": ("prompt tokens", 1024, ("input_len", "input_tokens", "input_length", "random_input_len")),
    "osl": ("reply tokens", 1024, ("output_len", "output_tokens", "output_length", "random_output_len")),
    "concurrency": ("requests in flight; default batch * dp * workers", None, ("conc", "max_concurrency", "users")),
    "length_ratio": ("lengths are uniform between this share of isl, osl and the whole", 1.0, ("random_range_ratio",)),
    "rounds": ("requests per client of the measurement, which starts with all at once", 10, ()),
    "wait_steps": ("steps that pass before a request is seen; default half of receive_interval less 1", 0, ()),
    "receive_interval": ("steps between SGLang's looks for requests", None, ("sched_recv_interval",)),
    "release": ("of the engine: its rules hold, or the nearest ones read", "", ("backend_version", "engine_release")),
    "frontend": ("what takes requests to pools: own (the engine's router), dynamo (public records)", "own", ()),
    "replicas": ("independent copies that share the load (agg)", 1, ()),
    "precision": ("weights: bf16, fp8, fp8_block, nvfp4 ...; default: model's", None, ("quant", "quantization")),
    "gemm_precision": ("the same for linears", None, ("gemm_quant_mode", "gemm_dtype")),
    "moe_precision": ("the same for experts", None, ("moe_quant_mode", "moe_dtype")),
    "kv_dtype": ("KV cache: bf16 or fp8; default the engine's", None, ("kv_cache_dtype", "kvcache_quant_mode")),
    "state_dtype": ("recurrent states: float32 or bfloat16; default the engine's", None, ("mamba_ssm_dtype",)),
    "all2all": ("MoE exchange; default the engine's", "auto", ("moe_backend",)),
    "dispatch": ("dtype tokens are sent in; default the experts'", None, ()),
    "combine": ("dtype results come back in, or logfmt10 (low_latency); default bf16", None, ()),
    "routing": (
        "how tokens fall on experts: served (as fits the network), typical, alike (of random tokens: served in tables "
        "of public records), balanced, uniform, zipf:S, recorded:FILE",
        SERVED_ROUTING, (),
    ),
    "placement": ("which rank holds which experts: linear, round_robin, eplb", "linear", ()),
    "redundant_experts": ("copies of experts", 0, ()),
    "prefix_cached": ("prompt tokens found in the cache", 0, ()),
    "prefix_cache": ("whether prompts' beginnings are kept: on, off; default off in public records", "on", ()),
    "mtp_depth": ("drafted tokens per step", 0, ("speculative_tokens", "nextn", "spec_depth")),
    "speculative_method": ("what drafts them: mtp, eagle3, dflash, dspark, draft_model, ngram", "mtp", ()),
    "draft_model": ("the network that drafts: a name or directory; default as published heads are", None, ()),
    "draft_overlap": ("on: SGLang works ahead of drafts (SGLANG_ENABLE_SPEC_V2); off: as its release does", "off", ()),
    "mtp_acceptance": ("chance that a drafted token is accepted", 0.8, ()),
    "chunk_tokens": (
        "prompt tokens per step; default the engine's", None,
        ("max_num_batched_tokens", "max_num_tokens", "chunked_prefill_size"),
    ),
    "memory_fraction": (
        "share of memory, as the engine's flag means it; default the engine's", None,
        ("gpu_memory_utilization", "mem_fraction_static", "free_gpu_memory_fraction"),
    ),
    "cuda_graphs": ("what is replayed from graphs: engine, full, piecewise, off", "engine", ("cudagraph_mode",)),
    "compiled": ("whether torch.compile fuses, where the engine uses it: on, off", "on", ()),
    "custom_all_reduce": ("all-reduces by the engine's own kernels (on) or NCCL (off)", "on", ()),
    "allreduce_fusion": ("all-reduces joined with norms: engine, on, off", "engine", ("fuse_allreduce_rms",)),
    "experts_kernels": ("whose run experts: engine, triton, cutlass, deepgemm, trtllm, marlin", "engine", ()),
    "attention_kernels": ("whose run attention: engine, triton, trtllm, flashinfer, flash_attention", "engine", ()),
    "hand_over_gbs": ("GB/s at which a GPU hands caches to the other pool; default as links have it", None, ()),
    "pp_partition": ("layers of each pipeline stage, as 16,15; default as the engine splits", None, ()),
    **ARRIVAL_COLUMNS,
    **IMAGE_COLUMNS,
}  # fmt: skip
"""Columns of a row: what they say, default, other names."""

DEFAULTS = {name: default for name, (_, default, _) in (COLUMNS | WORKER_COLUMNS).items()}
"""Of columns by name."""

MEASURED = {
    "measured_ttft_s": ("silicon_ttft_ms", "measured_ttft_ms", "ttft_ms"),
    "measured_tpot_s": ("silicon_tpot_ms", "measured_tpot_ms", "tpot_ms"),
    "measured_output_tokens_per_s": ("output_throughput", "measured_output_throughput"),
}
"""Measured columns and their other names; a name that ends in ``_ms`` holds milliseconds."""

MODES = {"agg": "aggregated", "disagg": "disaggregated", "pd": "disaggregated"}
"""Short spellings of the modes of serving."""

ROLES = ("prefill_", "decode_")
"""Prefixes of the columns of pools."""

PER_DECODE_WORKER, DECODE_PER_PREFILL = 64, 2.5
"""Requests in flight per decode worker and decode workers per prefill worker where a row does not say: medians of the
35 public disaggregated runs behind ``reports/serving.md`` that do (28 of them state the requests). They spread widely:
a quarter has 16 requests and fewer, a quarter 160 and more."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One row, read: names of profiles, layouts, load, options, and what was assumed where the row says nothing.

    ``arrivals``: how requests came, where that is no steady number in flight. ``other_depths``: drafted tokens per step
    that a public record may have had beside those of ``options``. ``max_sequences``: of a step and data-parallel rank,
    as it was launched; else what the engine lets run unasked, if not ``unlimited``: a record's launch is not known, or
    asks for as many as its users.
    """

    model: str
    device: str
    engine: str
    release: str = ""
    mode: str
    frontend: Frontend = "own"
    isl: int
    osl: int
    concurrency: float
    prefill: Layout
    decode: Layout
    workers: tuple[int, int] = (1, 1)
    replicas: int = 1
    length_ratio: float = 1.0
    rounds: float = 10.0
    wait_steps: float = 0.0
    prefix_cached: int = 0
    prefix_cache: bool = True
    unlimited: bool = False
    record: bool = False
    draft_overlap: bool = False
    mtp_acceptance: float = 0.8
    chunk_tokens: int | None = None
    max_sequences: int | None = None
    arrivals: Arrivals | None = None
    images: PromptImages | None = None
    options: Options = field(default_factory=Options)
    other_depths: tuple[int, ...] = ()
    assumed: tuple[str, ...] = field(default=(), compare=False)

    @property
    def served_by(self) -> str:
        """The engine's profile, of its release."""
        return f"{self.engine}=={self.release}" if self.release else self.engine

    @property
    def gpus(self) -> int:
        if self.mode == "aggregated":
            return self.decode.world_size * self.replicas
        return self.workers[0] * self.prefill.world_size + self.workers[1] * self.decode.world_size

    @property
    def layout(self) -> str:
        if self.mode == "aggregated":
            return str(self.decode) + (f" x{self.replicas}" if self.replicas > 1 else "")
        return f"{self.workers[0]}x {self.prefill} + {self.workers[1]}x {self.decode}"


MISSPELT = 0.9
"""Likeness (of :mod:`difflib`) from which on a column that nobody knows is one of ours, misspelt."""


def canonical_columns(table: Iterable[Any]) -> dict[str, str]:
    """Our name of every column of a table that has one, keyed by the table's. Raises where two mean the same."""
    names = [str(name) for name in table]
    known: dict[str, str] = {}
    for name, (_, _, others) in COLUMNS.items():
        known |= dict.fromkeys((name, *others), name)
    for name, (_, _, others) in WORKER_COLUMNS.items():
        for prefix in ("", "prefill_", "decode_"):
            known |= dict.fromkeys((f"{prefix}{n}" for n in (name, *others)), prefix + name)
    spelt = list(known)
    for name, others in MEASURED.items():
        known |= dict.fromkeys((name, *others), name)
    found: dict[str, str] = {}
    if not any(name.strip().lower().replace("-", "_") in known for name in names):
        told = "the first line names columns, separated by comma, semicolon or tab: tensorcast predict --columns"
        raise InputError(f"the table needs columns model and device, has {', '.join(names[:MOST_NAMED])}; {told}")
    for i, name in enumerate(names):
        if name in names[:i]:
            both = f"{names.index(name) + 1} and {i + 1}"
            raise InputError(f"column {name!r} is there twice, as columns {both}: keep one")
        ours = known.get(name.strip().lower().replace("-", "_"))
        if ours is None:
            continue
        if ours in found.values():
            first = next(n for n, o in found.items() if o == ours)
            raise InputError(f"columns {first!r} and {name!r} both mean {ours}: keep one")
        found[name] = ours
    for name in names:
        near = [] if name in found else difflib.get_close_matches(name.strip().lower(), spelt, n=1, cutoff=MISSPELT)
        if near and known[near[0]] not in found.values() and len(name.strip()) > 3:
            raise InputError(f"column {name!r} is not known: did you mean {near[0]}? (another name, if it is yours)")
    return found


def read_run(row: Mapping[str, Any], stated: frozenset[str] = frozenset()) -> Run:
    """The run that a row of canonical columns describes. ``stated``: the table's own column names, lower case; some
    formats have defaults of their own. Raises :class:`InputError` naming column and value."""
    filled = {name: value for name, value in row.items() if not is_empty(value)}
    cells = Cells(filled, DEFAULTS, WORKER_COLUMNS)
    model, device = cells.text("model"), cells.text("device")
    public = "moe_ep_size" in stated  # tables of public benchmarks, whose prompts are random tokens
    record = public and ("dp" in cells.cells or "prefill_dp" in cells.cells)
    engine, release, rules = rules_of(cells.text("engine"), cells.text("release"), record)
    cells.assumed += rules
    mode = MODES.get(m := cells.text("mode").lower(), m)
    if mode not in MODES.values():
        raise InputError(f"mode {mode!r}: must be aggregated (agg) or disaggregated (disagg)")
    named = understand(model)
    profile, quant = stored_in(cells, named, model, device, record)
    roles = ("", "") if mode == "aggregated" else ROLES
    twice = record and mode == "aggregated"
    prefill, decode = (_layout(cells, role, named.profile.num_experts, record, twice) for role in roles)
    concurrency = cells.number("concurrency", None)
    arrivals = read_arrivals(cells, concurrency)
    workers = (1, 1) if mode == "aggregated" else _workers(cells, concurrency)
    if concurrency is None and arrivals is not None:
        concurrency = float(arrivals.count or 1)
    elif concurrency is None:
        batch = cells.number("batch", None, roles[1])
        concurrency = float((batch or 1) * decode.dp * workers[1])
        cells.assumed.append(f"concurrency {concurrency:g}" + ("" if batch else " (nothing said)"))
    if concurrency <= 0:
        raise InputError(f"concurrency {concurrency:g}: must be more than 0")
    ratio = cells.number("length_ratio", LENGTH_RATIO if record else 1.0)
    if not 0 <= ratio <= 1:
        raise InputError(f"length_ratio {ratio:g}: must be from 0 (from one token up) to 1 (all alike)")
    if ratio < 1 and "random_range_ratio" in stated and engine == "vllm" and not record:
        cells.assumed.append("random_range_ratio as SGLang's client means it (vLLM's: half the width over the middle)")
    isl, osl = cells.whole("isl"), cells.whole("osl")
    found = None
    if record:
        of = Recorded(
            model=named.profile.name, device=device, engine=engine, precision=cells.text("precision", ""),
            lengths=(isl, osl), users=concurrency, release=cells.text("release"),
            depth=cells.whole("mtp_depth", least=0) if "mtp_depth" in cells.cells else None,
        )  # fmt: skip
        found, workers, prefill, decode = _as_recorded(cells, of, workers, (prefill, decode), mode == "aggregated")
    depths = _as_launched(cells, found)
    (prefill, *_), (decode, ranks) = alone = [one_server(one, named.profile.num_experts) for one in (prefill, decode)]
    if mode == "disaggregated":
        workers, ranks = (workers[0] * alone[0][1], workers[1] * ranks), 1
    arrivals = with_waits(cells, decode.dp if mode == "aggregated" else 0, concurrency, arrivals)
    arrivals = read_client(
        cells, arrivals, engine=engine, public=record, isl=isl, ratio=ratio, users=concurrency
    )
    interval, default = cells.number("receive_interval", None), 0.0
    if engine == "sglang":
        unknown = record and found is None and interval is None
        default = wait_steps(device, mode, concurrency) if unknown else steps_waited(interval or 0.0)
    wait = cells.number("wait_steps", default)
    images = read_images(cells, arrivals is None)
    if problem := named.profile.too_long(isl + osl + (0 if images is None else images.tokens(named.profile))):
        raise InputError(f"context length: {problem}")
    chunk = cells.whole("chunk_tokens") if cells.number("chunk_tokens", 0) else None
    before = cells.text("frontend", frontend(device) if record and mode == "disaggregated" else "own").lower()
    if before not in (known := get_args(Frontend)):
        raise unknown_name("frontend", before, known)
    kept = cells.switch("prefix_cache", not record)  # InferenceX's scripts switch it off
    options = of_traffic(Options(
        quant=quant,
        kv_dtype=kv_dtype(cells, engine, stated), state_dtype=cells.text("state_dtype", None),
        routing=cells.text("routing"), all2all=cells.text("all2all"),
        dispatch=cells.text("dispatch", None), combine=cells.text("combine", None),
        placement=cells.text("placement"), redundant_experts=cells.whole("redundant_experts", least=0),
        pp_partition=cells.text("pp_partition", None), mtp_depth=cells.whole("mtp_depth", least=0),
        speculative_method=cells.text("speculative_method"), draft_model=cells.text("draft_model", None),
        memory_fraction=cells.number("memory_fraction", None), hand_over_gbs=cells.number("hand_over_gbs", None),
        cuda_graphs={"off": "none"}.get(graphs := cells.text("cuda_graphs").lower(), graphs),
        compiled=cells.switch("compiled"), custom_all_reduce=cells.switch("custom_all_reduce"),
        allreduce_fusion=cells.text("allreduce_fusion").lower(), experts_kernels=cells.text("experts_kernels").lower(),
        attention_kernels=cells.text("attention_kernels").lower(),
    ), named.profile, alike=public)
    return Run(
        model=profile, device=device, engine=engine, release=release, mode=mode, frontend=before,
        isl=isl, osl=osl, concurrency=concurrency, prefill=prefill, decode=decode, workers=workers,
        replicas=cells.whole("replicas") * ranks,
        length_ratio=ratio,
        rounds=cells.number("rounds", 10.0),
        wait_steps=wait, record=record, unlimited=record and (found is None or not found.unasked),
        prefix_cache=kept, prefix_cached=cells.whole("prefix_cached", least=0),
        draft_overlap=cells.switch("draft_overlap", False),
        mtp_acceptance=cells.number("mtp_acceptance", MTP_ACCEPTANCE if record else 0.8),
        chunk_tokens=chunk, max_sequences=cells.whole("max_num_seqs") if "max_num_seqs" in cells.cells else None,
        arrivals=arrivals, images=images, options=options,
        other_depths=depths,
        assumed=tuple(cells.assumed),
    )


def _as_recorded(
    cells: Cells, of: Recorded, workers: tuple[int, int], pools: tuple[Layout, Layout], aggregated: bool
) -> tuple[Launched | None, tuple[int, int], Layout, Layout]:
    """How a public record was launched, its workers and layouts: where it is silent of these, the launch's."""
    if aggregated:
        found, (_, layout) = launched(of, aggregated_sizes(pools[1]), pools[1].ep), pools
        # results that name no release say nothing of how experts are cut either, and are recorded as ep 1
        if found and found.ep and not of.release and layout.ep == 1 < found.ep <= layout.tp * layout.dp:
            layout = replace(layout, ep=found.ep)
            cells.assumed.append(f"launched with ep {found.ep}")
        return found, workers, layout, layout
    silent = not any(cells.number("workers", 0, role) for role in ROLES)
    if silent and (known := launched_pools(of, pools)):
        workers, pools = known
        cells.assumed[:] = [said for said in cells.assumed if not said.startswith("workers ")]
        cells.assumed.append(f"launched as {workers[0]} x {pools[0]} and {workers[1]} x {pools[1]}")
    return launched(of, pool_sizes(*pools, workers), pools[1].ep), workers, *pools


def _as_launched(cells: Cells, found: Launched | None) -> tuple[int, ...]:
    """Fill the cells that a public record leaves empty as it was ``launched``. Other depths of drafting it may have."""
    if found is None:
        return ()
    added = {name: value for name, value in found.cells().items() if name not in cells.cells}
    cells.cells |= added
    if added:
        cells.assumed.append(f"launched with {', '.join(f'{name} {value}' for name, value in added.items())}")
    others = found.mtp_depths[1:] if "mtp_depth" not in cells.cells or "mtp_depth" in added else ()
    if others:
        cells.assumed.append(f"may have drafted {' or '.join(map(str, others))} tokens: the interval holds both")
    return others


def _workers(cells: Cells, concurrency: float | None) -> tuple[int, int]:
    """Prefill and decode workers; :data:`PER_DECODE_WORKER` and :data:`DECODE_PER_PREFILL` where they are not said."""
    said = [cells.whole("workers", role) if cells.number("workers", 0, role) else None for role in ROLES]
    decode = said[1] or max(1, math.ceil((concurrency or 1) / PER_DECODE_WORKER))
    prefill = said[0] or max(1, round(decode / DECODE_PER_PREFILL))
    if None in said:
        cells.assumed.append(f"workers {prefill} prefill, {decode} decode")
    return prefill, decode


def _layout(cells: Cells, role: str, num_experts: int, record: bool, twice: bool) -> Layout:
    """Layout of a row's sizes. ``record``: of a public benchmark's, which may leave ``ep`` open; ``twice``: it may have
    multiplied sizes twice."""
    tp, dp, pp = (cells.whole(name, role) for name in ("tp", "dp", "pp"))
    ep, etp = (int(cells.number(name, 0, role)) or None for name in ("ep", "moe_tp"))
    if not num_experts:
        return Layout(tp * dp * pp, tp, dp, 1, pp)
    if twice and ep and (once := counted_twice(tp, dp, etp or 1, ep)):
        tp, dp, etp, ep = once
        cells.assumed.append(f"recorded sizes count tp and ep twice: read as tp{tp}-dp{dp}-ep{ep}")
    ranks = tp * dp
    if ep is None and etp is None and record and dp > 1:  # cut in dp parts, blocks of scales would be cut as well
        ep = ranks if num_experts % ranks == 0 else 1
        cells.assumed.append(f"{role}ep {ep} (not said, with attention data-parallel)")
    elif ep is None:
        ep = ranks // etp if etp and ranks % etp == 0 else 1
    if etp is not None and etp * ep != ranks:
        raise InputError(f"{role}moe_tp*ep = {etp}*{ep} must equal tp*dp = {tp}*{dp}")
    return Layout(ranks * pp, tp, dp, ep, pp)


def describe_columns() -> list[dict[str, Any]]:
    """Columns that are read: name, what it says, default, other names; layouts' come in three prefixes."""
    return [
        {"column": name, "says": text + note, "default": default, "also": list(others)}
        for columns, note in ((COLUMNS, ""), (WORKER_COLUMNS, " (also prefill_, decode_)"))
        for name, (text, default, others) in columns.items()
    ]
