"""Result files of load generators, as measured rows of the deployment that they ran against.

Read are what engines' own clients write (vLLM 0.33.0, benchmarks/serve.py; SGLang 0.5.23, benchmark/serving.py;
TensorRT-LLM, serve/scripts/benchmark_serving.py: all the same names), guidellm's ``benchmarks.json`` (0.8.1,
benchmark/schemas/metrics.py) and aiperf's ``profile_export_aiperf.json`` (0.13.0, common/models/export_models.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorcast.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

ENGINES = {
    "measured_ttft_s": ("mean_ttft_ms", 1e-3), "measured_tpot_s": ("mean_tpot_ms", 1e-3),
    "measured_output_tokens_per_s": ("output_throughput", 1.0), "requests": ("completed", 1.0),
}
"""Columns with their names and units in a result of an engine's own client."""

AIPERF = {
    "measured_ttft_s": ("time_to_first_token.avg", 1e-3), "measured_tpot_s": ("inter_token_latency.avg", 1e-3),
    "measured_output_tokens_per_s": ("output_token_throughput.avg", 1.0), "requests": ("request_count.avg", 1.0),
    "isl": ("input_sequence_length.avg", 1.0), "osl": ("output_sequence_length.avg", 1.0),
}
"""The same of aiperf, whose inter-token latency is a request's time after the first token over its other tokens."""

GUIDELLM = {
    "measured_ttft_s": ("metrics.time_to_first_token_ms.successful.mean", 1e-3),
    "measured_tpot_s": ("metrics.inter_token_latency_ms.successful.mean", 1e-3),
    "measured_output_tokens_per_s": ("metrics.output_tokens_per_second.successful.mean", 1.0),
    "requests": ("metrics.request_totals.successful", 1.0),
    "isl": ("metrics.prompt_token_count.successful.mean", 1.0),
    "osl": ("metrics.output_token_count.successful.mean", 1.0),
}
"""The same of guidellm, whose ``time_per_output_token_ms`` has the first token's time in it, which TPOT has not."""

CONSTANT, POISSON = math.inf, 1.0
"""Burstiness of requests at even gaps, and at random ones."""

REPLAY = "see tensorcast replay"
"""What is said of loads that are not steady."""


def with_results(table: pd.DataFrame, paths: Sequence[Path]) -> pd.DataFrame:
    """A row per result: the table's only one, at the load and with the times that a file tells.

    Raises :class:`InputError` where the table holds several deployments, or a file is no result.
    """
    import pandas as pd

    if len(table) != 1:
        raise InputError(f"--result: is of one deployment, and the table has {len(table)} rows")
    rows, notes = [], list[str]()
    own = {str(name): cell for name, cell in table.iloc[0].items()}
    drafts = any(str(own.get(name) or "0") not in ("0", "nan") for name in DRAFTED)
    for path in paths:
        for result in _results(path):
            rows.append({**own, **_cells(path, result)})
            notes += [] if drafts else _untimed(path, result)
    found = pd.DataFrame(rows, dtype=object)
    found.attrs["notes"] = notes
    return found


DRAFTED = ("mtp_depth", "speculative_tokens", "nextn", "spec_depth")
"""Columns of a table that say how many tokens are drafted."""

FEW_CHUNKS = 0.7
"""Chunks per token that a client times, below which something is behind it."""


def _untimed(path: Path, result: dict[str, Any]) -> list[str]:
    """That an engine's client timed fewer chunks than there were tokens, which no drafts explain."""
    each, apart = (result.get(f"mean_{name}_ms") for name in ("tpot", "itl"))
    if not isinstance(each, int | float) or not isinstance(apart, int | float) or not 0 < each < FEW_CHUNKS * apart:
        return []
    return [
        f"--result {path}: {each:.3g} ms per token, but {apart:.3g} between chunks: the server sends several tokens at "
        "once, or the client passes over some, as vLLM's does over thoughts that SGLang streams (reasoning_content): "
        "its first token is then the first word after them"
    ]


def _results(path: Path) -> list[dict[str, Any]]:
    """Of a JSON file, which may hold several benchmarks, or of a file with one JSON object per line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--result {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        found = [json.loads(text)]
    except ValueError:
        try:
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError:
            raise InputError(f"--result {path}: is neither JSON nor a line of JSON per run") from None
    if len(found) == 1 and isinstance(found[0], dict) and "benchmarks" in found[0]:
        found = found[0]["benchmarks"]
    if not found or not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise InputError(f"--result {path}: holds no result")
    return found


def _cells(path: Path, result: dict[str, Any]) -> dict[str, str]:
    """Columns of ``predict``, as text: lengths are means over the requests that were served."""
    if "scheduler_metrics" in result:
        names, load = GUIDELLM, _guidellm_load
    elif "aiperf_version" in result:
        names, load = AIPERF, _aiperf_load
    else:
        names, load = ENGINES, _engine_load
    found = {column: _number(path, result, name) * unit for column, (name, unit) in names.items()}
    if "isl" not in found:
        for column, name in (("isl", "total_input_tokens"), ("osl", "total_output_tokens")):
            found[column] = _number(path, result, name) / found["requests"]
    found |= {name: round(max(1.0, found[name])) for name in ("isl", "osl", "requests")} | load(path, result)
    return {name: f"{value!r}" if name.startswith("measured_") else f"{value:g}" for name, value in found.items()}


def _engine_load(path: Path, result: dict[str, Any]) -> dict[str, float]:
    """How an engine's own client sent requests: so many in flight, or at a rate, or both."""
    load, rate = dict[str, float](), result.get("request_rate")
    if result.get("max_concurrency") is not None:
        load["concurrency"] = _number(path, result, "max_concurrency")
    if rate == "trace" or result.get("ramp_up_strategy"):
        raise InputError(f"--result {path}: its requests came as a trace says, or at a growing rate: {REPLAY}")
    if rate not in (None, "inf", math.inf):
        load["request_rate"] = _number(path, result, "request_rate")
        if result.get("burstiness") is not None:
            load["burstiness"] = _number(path, result, "burstiness", endless=True)
    elif not load:  # all at once
        if rate is None:
            raise InputError(f"--result {path}: has no max_concurrency and no request_rate: measure with one of them")
        load["request_rate"] = math.inf
    return load


def _guidellm_load(path: Path, result: dict[str, Any]) -> dict[str, float]:
    """How guidellm's strategy sent requests (scheduler/strategies.py)."""
    kind, place = _text(path, result, "config.strategy.type_"), "config.strategy"
    if kind == "synchronous":
        return {"concurrency": 1.0}
    if kind == "concurrent":
        return {"concurrency": _number(path, result, f"{place}.streams")}
    limit = _at(result, f"{place}.max_concurrency")
    load = {} if limit is None else {"concurrency": _number(path, result, f"{place}.max_concurrency")}
    if kind == "throughput":
        return load or {"request_rate": math.inf}
    if kind in ("constant", "poisson"):
        burstiness = CONSTANT if kind == "constant" else POISSON
        return load | {"request_rate": _number(path, result, f"{place}.rate"), "burstiness": burstiness}
    raise InputError(f"--result {path}: {place}.type_ = {kind!r}: no steady load: {REPLAY}")


def _aiperf_load(path: Path, result: dict[str, Any]) -> dict[str, float]:
    """How aiperf's measured phase sent requests (config/phases.py)."""
    phases = _at(result, "input_config.phases")
    phases = [one for one in phases or () if isinstance(one, dict) and one.get("kind", "profiling") == "profiling"]
    if len(phases) != 1:
        raise InputError(f"--result {path}: input_config.phases: {len(phases)} were measured, and not one")
    (phase,) = phases
    kind, load = phase.get("type"), dict[str, float]()
    if phase.get("concurrency") is not None:
        load["concurrency"] = _number(path, phase, "concurrency")
    if kind == "concurrency":
        return load or {"concurrency": 1.0}
    if kind not in ("poisson", "gamma", "constant") or phase.get("rate") is None:
        raise InputError(f"--result {path}: input_config.phases: type = {kind!r}: no steady load: {REPLAY}")
    load["request_rate"], load["burstiness"] = _number(path, phase, "rate"), CONSTANT if kind == "constant" else POISSON
    if kind == "gamma" and phase.get("smoothness") is not None:
        load["burstiness"] = _number(path, phase, "smoothness")
    return load


def _at(result: dict[str, Any], name: str) -> Any:
    """What stands at the name's parts, one in the other; None where one is missing."""
    held: Any = result
    for part in name.split("."):
        held = held.get(part) if isinstance(held, dict) else None
    return held


def _text(path: Path, result: dict[str, Any], name: str) -> str:
    value = _at(result, name)
    if not isinstance(value, str):
        raise InputError(f"--result {path}: {name} = {value!r}: must be a name")
    return value


def _number(path: Path, result: dict[str, Any], name: str, *, endless: bool = False) -> float:
    value = _at(result, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not (
        value > 0 and (endless or value < math.inf)
    ):
        raise InputError(f"--result {path}: {name} = {value!r}: must be a number more than 0")
    return float(value)
