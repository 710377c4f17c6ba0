"""Result files of engines' load generators, as measured rows of the deployment that they ran against."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorcast.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

FIELDS = {
    "measured_ttft_s": ("mean_ttft_ms", 1e-3), "measured_tpot_s": ("mean_tpot_ms", 1e-3),
    "measured_output_tokens_per_s": ("output_throughput", 1.0),
}
"""Measured columns with their names and units in a result file. vLLM 0.33.0 (benchmarks/serve.py), SGLang 0.5.23
(benchmark/serving.py) and TensorRT-LLM (serve/scripts/benchmark_serving.py) write the same names."""


def with_results(table: pd.DataFrame, paths: Sequence[Path]) -> pd.DataFrame:
    """A row per result: the table's only one, at the load and with the times that a file tells.

    Raises :class:`InputError` where the table holds several deployments, or a file is no result.
    """
    import pandas as pd

    if len(table) != 1:
        raise InputError(f"--result: is of one deployment, and the table has {len(table)} rows")
    rows = []
    for path in paths:
        for result in _results(path):
            rows.append({**{str(name): cell for name, cell in table.iloc[0].items()}, **_cells(path, result)})
    return pd.DataFrame(rows, dtype=object)


def _results(path: Path) -> list[dict[str, Any]]:
    """Of a JSON file, or of a file with one JSON object per line."""
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
    if not found or not all(isinstance(one, dict) for one in found):
        raise InputError(f"--result {path}: holds no result")
    return found


def _cells(path: Path, result: dict[str, Any]) -> dict[str, str]:
    """Columns of ``predict``, as text: lengths are means over the requests that were served."""
    found = {}
    for column, (name, unit) in FIELDS.items():
        found[column] = f"{_number(path, result, name) * unit!r}"
    done = _number(path, result, "completed")
    for column, name in (("isl", "total_input_tokens"), ("osl", "total_output_tokens")):
        found[column] = str(max(1, round(_number(path, result, name) / done)))
    users = result.get("max_concurrency")
    if users is None:
        raise InputError(f"--result {path}: has no max_concurrency: measure with a number of requests in flight")
    found["concurrency"] = f"{_number(path, result, 'max_concurrency'):g}"
    return found


def _number(path: Path, result: dict[str, Any], name: str) -> float:
    value = result.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"--result {path}: {name} = {value!r}: must be a number more than 0")
    return float(value)
