"""What there is to simulate: tables of the model, device and engine profiles, for people and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensorcast.report import units

if TYPE_CHECKING:
    from rich.console import Console

    from tensorcast.profiles.device import DeviceProfile
    from tensorcast.profiles.engine import EngineProfile
    from tensorcast.profiles.model import ModelProfile
    from tensorcast.profiles.network.description import Network

Record = dict[str, Any]

WITH_SOURCE = 120
"""Columns from which the tables show where the figures are from."""


def model_record(profile: ModelProfile) -> Record:
    """Published sizes and what the config says; None where nothing does."""
    from tensorcast.modeling.checkpoint.read import checkpoint
    from tensorcast.profiles.config_values import text_of

    config, text = profile.config, text_of(profile.config)
    quantization = checkpoint(profile)
    return {
        "name": profile.name, "aliases": list(profile.aliases), "hf_id": profile.hf_id,
        "description": profile.description, "model_type": config.get("model_type", profile.model),
        "total_params": float(profile.total_params) if profile.total_params else None,
        "active_params": float(profile.active_params) if profile.active_params else None,
        "experts": profile.num_experts or None, "top_k": profile.experts_per_token or None,
        "layers": text.get("num_hidden_layers"),
        "attention": attention(text) if profile.network is None else described(profile.network),
        "linear_dtype": quantization.linear.name, "expert_dtype": quantization.experts.name,
        "kv_dtype": quantization.kv,
        "kv_bytes_per_token": float(profile.kv_bytes_per_token) if profile.kv_bytes_per_token else None,
        "sources": dict(profile.sources),
    }


def device_record(profile: DeviceProfile) -> Record:
    """Memory, peaks, interconnect tiers, and whether kernels were measured on it."""
    fitted = profile.calibration
    errors: list[float] = []
    if fitted and not fitted.other_chip:
        said = [row.median_error for row in fitted.kernels] + [row.median_error for row in fitted.collectives]
        errors = [error for error in said if error is not None]
    return {
        "name": profile.name, "aliases": list(profile.aliases), "vendor": profile.vendor,
        "architecture": profile.architecture, "description": profile.description, "processors": profile.processors,
        "memory_bytes": float(profile.memory_bytes),
        "memory_bandwidth_bytes_per_s": float(profile.memory_bandwidth_bytes_per_s),
        "peak_flops_per_s": {dtype: float(figure) for dtype, figure in profile.peak_flops.items()},
        "interconnect": [
            {
                "name": tier.name, "size": tier.size, "bandwidth_bytes_per_s": float(tier.bandwidth_bytes_per_s),
                "latency_s": float(tier.latency_s), "pairwise": tier.pairwise,
            }
            for tier in profile.interconnect
        ],
        "evidence": "calibrated" if fitted and not fitted.other_chip else "datasheet",
        "kernels_as_on": profile.timed_on if profile.timed_on != profile.name else None,
        "median_error": sorted(errors)[len(errors) // 2] if errors else None,
        "calibration": fitted.provenance if fitted else None, "sources": dict(profile.sources),
    }


def engine_record(profile: EngineProfile) -> Record:
    """Fusions, captured phases, overheads, memory."""
    fit, beside = profile.fitted, profile.overhead
    return {
        "name": profile.name, "aliases": list(profile.aliases), "version": profile.version,
        "releases": list(profile.releases), "calibrated": profile.calibrated and profile.calibrated.model_dump(),
        "description": profile.description, "fusions": list(profile.fusions),
        "graph_captured_phases": list(profile.graph_captured_phases),
        "step_overhead_s": beside.step_s, "request_overhead_s": beside.request_s,
        "layer_overhead_s": beside.layer_s, "prefill_factor": beside.prefill_factor,
        "pool_factor": beside.pool_factor,
        "first_token_s": profile.first_token_s(0), "hand_over_s": profile.in_pools("dynamo").hand_over_s,
        "prompt_token_s": profile.fitted.prompt_token_s if profile.fitted else 0.0,
        "overheads_fitted_to": fit.source if fit else None,
        "graph_launch_gap_s": float(profile.graph_launch_gap_s),
        "eager_launch_gap_s": float(profile.eager_launch_gap_s),
        "memory_fraction": float(profile.memory_fraction), "memory_covers": profile.memory_covers,
        "memory_by_layout": profile.reserve is not None, "reserved_bytes": float(profile.reserved_bytes),
        "max_tokens_per_step": profile.max_tokens_per_step, "all2all": dict(profile.all2all),
        "sources": dict(profile.sources),
    }


def attention(config: Record) -> str:
    """Kind of attention by the field names that configs share: ``MLA``, ``GQA 64/8, window 128``, ..."""
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if config.get("kv_lora_rank"):
        kind = "MLA"
    elif kv_heads is None or kv_heads == heads:
        kind = f"MHA {heads}"
    else:
        kind = f"MQA {heads}/1" if kv_heads == 1 else f"GQA {heads}/{kv_heads}"
    kinds = set(config.get("layer_types") or config.get("layers_block_type") or ())
    if "linear_attention" in kinds:
        kind += " + linear"
    if "mamba" in kinds or "M" in str(config.get("hybrid_override_pattern") or ""):
        kind += " + mamba"
    if chosen := config.get("index_topk"):
        kind += f", sparse {chosen}"
    if (window := config.get("sliding_window")) and config.get("use_sliding_window", True):
        kind += f", window {window}"
    if chunk := config.get("attention_chunk_size"):
        kind += f", chunks {chunk}"
    return kind


def described(network: Network) -> str:
    """The kinds of attention of a network that its profile describes: ``MLA + KDA, described``."""
    kinds = dict.fromkeys("GQA" if one.kind == "attention" else one.kind.upper() for one in network.attention)
    return f"{' + '.join(kinds)}, described"


def _experts(row: Record) -> str:
    if row["experts"]:
        return f"{row['experts']} x {row['top_k']}"
    return "dense" if row["layers"] else "?"  # a class of the user's says neither before it is built


def print_models(records: list[Record], console: Console) -> None:
    """One model per line."""
    def dtype(row: Record) -> str:
        both = row["linear_dtype"], row["expert_dtype"]
        return both[0] if both[0] == both[1] or not row["experts"] else f"{both[1]} experts"

    rows = [
        [
            row["name"], _params(row["total_params"]), _params(row["active_params"]) if row["experts"] else "all",
            _experts(row), str(row["layers"] or "?"),
            row["attention"], dtype(row), units.count(row["kv_bytes_per_token"]) if row["kv_bytes_per_token"] else "",
            row["hf_id"],
        ]
        for row in records
    ]
    heads = ("model", "total", "active", "experts", "layers", "attention", "dtype", "KV B/token", "source")
    narrow = ("dtype", "layers")
    shown = _print(console, heads, "lrrrrllrl", rows, soft=("attention",), optional=("KV B/token",), narrow=narrow)
    if console.width >= WITH_SOURCE:
        _say(console, "Source: the config on Hugging Face; every figure has its own in the profile.")
    cache = "; KV bytes per token (bf16) where published" if "KV B/token" in shown else ""
    _say(console, f"Parameters as published; experts x those a token uses{cache}.")
    _say(console, "A directory with a Hugging Face config.json works in place of a name. All figures: --json")


def print_devices(records: list[Record], console: Console) -> None:
    """One device per line."""
    def rate(tier: Record) -> str:
        whole, links = tier["bandwidth_bytes_per_s"], tier["size"] - 1
        return f"{links} x {units.byte_rate(whole / links)}" if tier["pairwise"] else units.byte_rate(whole)

    def tiers(row: Record) -> str:
        return " > ".join(f"{tier['size']} {tier['name']} {rate(tier)}" for tier in row["interconnect"])

    def evidence(row: Record) -> str:
        error, as_on = row["median_error"], row["kernels_as_on"]
        if row["evidence"] == "datasheet":
            return f"as {as_on}" if as_on else "datasheet"
        return row["evidence"] if error is None else f"{row['evidence']} {units.percent(error)}"

    rows = [
        [
            row["name"], units.nbytes(row["memory_bytes"]), units.byte_rate(row["memory_bandwidth_bytes_per_s"]),
            _peak(row, "bf16", "fp16"), _peak(row, "fp8"), tiers(row), evidence(row), _link(row["sources"]),
        ]
        for row in records
    ]
    heads = ("device", "memory", "bandwidth", "bf16", "fp8", "interconnect", "evidence", "source")
    _print(console, heads, "lrrrrlll", rows, soft=("interconnect",), narrow=("fp8", "evidence"))
    _say(console, "bf16, fp8: peak TFLOP/s, dense. Interconnect: GPUs in reach, bandwidth per GPU and direction.")
    _say(console, "Evidence: median error of the fitted kernels on measurements held out, or datasheet figures only "
                  "(as NAME: and the fractions of them that kernels reach there).")
    _say(console, "cpu: this machine, measured when first used. All figures: --json")


def print_engines(records: list[Record], console: Console) -> None:
    """One engine per line."""
    rows = [
        [
            row["name"], row["version"], ", ".join(row["graph_captured_phases"]) or "none",
            units.seconds(row["step_overhead_s"]) + _each(row["layer_overhead_s"], "layer")
            + _each(row["request_overhead_s"], "seq"),
            "by layout" if row["memory_by_layout"] else units.percent(row["memory_fraction"]),
            ", ".join(row["fusions"]) or "none",
            ", ".join(dict.fromkeys(row["all2all"].values())), _link(row["sources"]),
        ]
        for row in records
    ]
    soft = ("fuses", "exchange")
    heads = ("engine", "version", "graphs", "overhead", "memory", "fuses", "exchange", "source")
    _print(console, heads, "lllrrlll", rows, soft=soft, optional=("exchange",), narrow=("version", "graphs"))
    _say(console, "Graphs: phases replayed from captured graphs. Overhead: per step, layer, sequence; beside kernels.")
    _say(console, "Memory: share of the device, or of what weights leave, that it takes. All figures: --json")
    older = [f"{row['name']} {', '.join(row['releases'])}" for row in records if len(row["releases"]) > 1]
    if older:
        _say(console, f"Releases whose rules are known (--engine NAME==RELEASE): {'; '.join(older)}")


def _each(seconds: float, what: str) -> str:
    return f" + {units.seconds(seconds)}/{what}" if seconds else ""


def _params(value: float | None) -> str:
    return units.parameters(value) if value else "?"


def _peak(row: Record, *dtypes: str) -> str:
    peaks = row["peak_flops_per_s"]
    return next((units.count(peaks[dtype] / 1e12) for dtype in dtypes if dtype in peaks), "-")


def _link(sources: dict[str, str]) -> str:
    """The first source: where the profile comes from."""
    words = next(iter(sources.values()), "").split()
    return words[0].removeprefix("https://") if words else ""


def _print(
    console: Console, heads: tuple[str, ...], align: str, rows: list[list[str]], *, soft: tuple[str, ...] = (),
    optional: tuple[str, ...] = (), narrow: tuple[str, ...] = (),
) -> list[str]:
    """A table in the console's width: ``soft`` columns wrap; ``optional`` ones, then sources, go for want of room.

    Of a width that no soft column can wrap to, ``narrow`` ones go too, rather than that numbers are cut.
    Returns the heads of the columns that stayed.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    widths = [max(len(head), *(len(row[i]) for row in rows), 1) for i, head in enumerate(heads)]
    kept = list(range(len(heads)))
    for name, least in (*((name, 24) for name in (*optional, "source")), *((name, 12) for name in narrow)):
        needed = sum(min(widths[i], least if heads[i] in (*soft, "source") else widths[i]) + 1 for i in kept) - 1
        if needed > console.width or (name == "source" and console.width < WITH_SOURCE):
            kept.remove(heads.index(name))
    free = console.width - len(kept) + 1 - sum(widths[i] for i in kept if heads[i] not in (*soft, "source"))
    for i in (i for i in kept if heads[i] in soft):
        later = sum(1 for k in kept if k > i and heads[k] in (*soft, "source"))
        widths[i] = max(12, min(widths[i], free - later * 24))
        free -= widths[i]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    for i in kept:
        last = heads[i] == "source"
        table.add_column(
            heads[i], justify="right" if align[i] == "r" else "left", no_wrap=heads[i] not in soft,
            width=max(6, min(widths[i], free)) if last else widths[i], style="dim" if last else "",
        )
    for row in rows:
        table.add_row(*(Text(row[i], style="bold" if i == 0 else "") for i in kept))
    console.print(table)
    return [heads[i] for i in kept]


def _say(console: Console, text: str) -> None:
    from rich.text import Text

    console.print(Text(text, style="dim"))
