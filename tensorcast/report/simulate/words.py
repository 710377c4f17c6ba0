"""The totals of a simulation in words, for the terminal and for Markdown alike. Reads only ``Simulation.totals()``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from tensorcast.report import units
from tensorcast.report.units import plural

MEMORY_PARTS = {
    "weights": "weights", "kv_cache": "KV cache", "activations": "activations",
    "communication": "comm. buffers", "engine": "engine",
}
"""Parts of a GPU's memory in the order they are listed, with their names for people."""

SIZES = {
    "B": "B sequences per data-parallel rank", "S": "S new tokens each", "P": "P cached tokens each", "L": "L = P + S",
    "R": "R expert rows of the busiest rank", "E": "E its experts", "etp": "etp ranks that share an expert",
}
"""What the letters in the shapes mean."""

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv")


class MemoryRow(NamedTuple):
    """One part of a GPU's memory: its name, bytes, and share of the budget."""

    name: str
    bytes: float
    share: float


def headline(t: dict[str, Any]) -> str:
    """What was simulated: ``deepseek-v3 decode on 32 x h200-sxm, tp1-dp32-ep32, vllm``."""
    return f"{t['model']} {t['phase']} on {t['world_size']} x {t['device']}, {t['layout']}, {t['engine']}"


def workload(t: dict[str, Any]) -> str:
    """The batch and the tokens of one step."""
    batch = plural(t["batch_per_dp_rank"], "sequence")
    if t["dp"] > 1:
        batch += f" per data-parallel rank ({units.count(t['batch_total'])} in all)"
    each = ", each " if t["batch_per_dp_rank"] > 1 or t["dp"] > 1 else ", "
    new = plural(t["input_len"], "new token")
    cached = f" after {units.count(t['context'])} cached" if t["context"] else ""
    return f"{batch}{each}{new}{cached}"


def numerics(t: dict[str, Any]) -> str:
    """Quantisation, expert routing and exchange: what else the numbers depend on."""
    schemes = dict(item.partition("=")[::2] for item in t["quantization"].split(","))
    named = {"linear": "linears", "experts": "experts", "kv": "KV cache"}
    has_experts = t["ep"] > 1 or t["etp"] > 1 or "grouped_gemm" in t["seconds_by_family"]
    parts = [
        f"{named.get(key, key)} {value}" for key, value in schemes.items() if has_experts or key != "experts"
    ]
    if has_experts:
        parts.append(f"routing {t['routing']}")
        if t["placement"] != "linear" or t["redundant_experts"]:
            copies = f" with {t['redundant_experts']} redundant experts" if t["redundant_experts"] else ""
            parts.append(f"placement {t['placement']}{copies}")
    if t["all2all"] != "none":
        back = f", back in {t['combine_dtype']}" if t["combine_dtype"] != "bf16" else ""
        parts.append(f"exchange {t['all2all']} in {t['dispatch_dtype']}{back}")
    if has_experts and t["experts_backend"] != "grouped_mm":
        parts.append(f"{t['experts_backend']} expert GEMMs")
    if t["chunk_tokens"]:
        parts.append(f"{t['chunk_tokens']} tokens at a time through the experts")
    if t["external_shared_experts"]:
        parts.append(f"shared expert on {plural(t['external_shared_experts'], 'rank')} of its own")
    elif t["fused_shared_experts"]:
        parts.append("shared expert as one more routed one")
    elif not t["shared_expert_tp"]:
        parts.append("shared expert whole on every rank")
    if t["dual_batch_overlap"]:
        parts.append("dual-batch overlap")
    if t["mtp_depth"]:
        by = f" by {t['speculative_method']}" if t["speculative_method"] != "mtp" else ""
        parts.append(f"{plural(t['mtp_depth'], 'token')} drafted per sequence{by}")
    parts += [f"each sequence's cache over {t['dcp']} GPUs"] * (t["dcp"] > 1)
    parts += [f"each prompt read by {t['pcp']} data-parallel groups together"] * (t["pcp"] > 1)
    if t["fusion"] != "engine":
        parts.append("nothing fused" if t["fusion"] == "none" else f"fusion {t['fusion']}")
    return ", ".join(parts)


def step_lines(t: dict[str, Any]) -> list[tuple[str, str]]:
    """Totals of the step as (name, value) pairs."""
    prefill = t["phase"] == "prefill"
    gpus = f"; {units.rate(t['tokens_per_s_per_gpu'] * t['world_size'])} on {t['world_size']}"
    speed = f"{units.rate(t['tokens_per_s_per_gpu'])} tokens/s per GPU{gpus if t['world_size'] > 1 else ''}"
    within = units.span(t["step_low_s"], t["step_high_s"])
    overhead = t["overhead_s"] / t["step_s"]
    lines = [
        ("step time", f"{units.seconds(t['step_s'])}  (80 % of such steps: {within})"),
        ("prompt speed" if prefill else "output speed", speed),
    ]
    if not prefill:
        lines.append(("per sequence", f"{units.rate(1.0 / t['step_s'])} tokens/s"))
    lines += [
        ("use of a GPU", f"MFU {units.percent(t['mfu'])}, memory bandwidth {units.percent(t['memory_bandwidth_use'])}"),
        ("overhead", f"{units.seconds(t['overhead_s'])} outside kernels ({units.percent(overhead)})"),
        *_overlap_line(t),
        ("bound by", shares(t["seconds_by_bound"])),
        ("spent in", shares(t["seconds_by_family"], 5)),
        ("evidence", shares(t["seconds_by_evidence"])),
    ]
    return lines


def _overlap_line(t: dict[str, Any]) -> list[tuple[str, str]]:
    """What kernels hide, where some do."""
    if not t["hidden_s"] > 0:
        return [("overlap", f"none gained: {units.seconds(-t['hidden_s'])} lost")] if t["hidden_s"] < 0 else []
    exposed = f"communication: {units.seconds(t['hidden_comm_s'])} hidden, {units.seconds(t['exposed_comm_s'])} not"
    return [("overlap", f"{units.seconds(t['hidden_s'])} of kernel time hidden ({exposed})")]


def shares(seconds: dict[str, float], most: int = 0) -> str:
    """``network 38.5%, compute 30.2%, ...``: what each takes of their sum, the rest after ``most`` as others."""
    total = sum(seconds.values()) or 1.0
    named = [(name, value / total) for name, value in sorted(seconds.items(), key=lambda item: -item[1]) if value > 0]
    if most and len(named) > most:
        named = [*named[: most - 1], ("others", sum(share for _, share in named[most - 1 :]))]
    return ", ".join(f"{name} {units.percent(share)}" for name, share in named) or "-"


def memory_rows(t: dict[str, Any]) -> list[MemoryRow]:
    """Memory of the fullest GPU by part, then the total."""
    memory = t["memory_bytes"]
    named = {**MEMORY_PARTS, "total": "total"}
    return [MemoryRow(name, memory[key], memory[key] / memory["budget"]) for key, name in named.items()]


def verdict(t: dict[str, Any]) -> str:
    """Whether the memory suffices, and by how much."""
    memory = t["memory_bytes"]
    budget = (
        f"the engine's budget of {units.nbytes(memory['budget'])} "
        f"({units.percent(memory['budget'] / memory['capacity'])} of {units.nbytes(memory['capacity'])})"
    )
    spare = memory["budget"] - memory["total"]
    if t["fits"]:
        return f"fits: {units.nbytes(spare)} free in {budget}"
    return f"DOES NOT FIT: {units.nbytes(-spare)} over {budget}"


def largest(t: dict[str, Any]) -> str:
    """The largest batch that fits."""
    best = t["largest_batch_per_dp_rank"]
    rank = " per data-parallel rank" if t["dp"] > 1 else ""
    if not best:
        return "not even one sequence fits"
    return f"largest batch that fits: {plural(best, 'sequence')}{rank}"


def logged(t: dict[str, Any]) -> list[str]:
    """What the engine would log of its cache at its own settings, on a line."""
    lines = t["engine_log"]["lines"]
    return [f"{t['engine']} would log: {'; '.join(lines)}"] if lines else []


def shape(row: dict[str, Any], t: dict[str, Any]) -> str:
    """Shape of an op as a formula; experts that are whole are not shown divided by one."""
    text = str(row["shape"])
    return text.replace("/etp", "") if t["etp"] == 1 else text


def legend(shapes: Iterable[str]) -> str:
    """What the letters used in ``shapes`` mean."""
    import re

    used = {word for shape in shapes for word in re.findall(r"[A-Za-z]+", shape)}
    return ", ".join(text for letter, text in SIZES.items() if letter in used)
