"""Requests from files: public traces, results of benchmark clients, our own tables.

Which kind a file is, its content tells. A row that cannot be read is named by its number, field and value; with
``skip_bad`` it is counted and left out.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from tensorcast.errors import InputError
from tensorcast.scheduling.requests import Requests

BLOCK_TOKENS = 512
"""Tokens of a block whose hash a Mooncake trace has (https://github.com/kvcache-ai/Mooncake, FAST25-release)."""

COLUMNS: dict[str, tuple[tuple[str, float], ...]] = {
    "arrival": (
        ("arrival_s", 1.0), ("timestamp_ms", 1e-3), ("arrival_ms", 1e-3), ("timestamp", 1.0), ("arrived_at", 1.0),
    ),
    "input_len": (
        ("input_len", 1.0), ("input_length", 1.0), ("contexttokens", 1.0), ("request tokens", 1.0), ("prompt_len", 1.0),
        ("num_prefill_tokens", 1.0), ("isl", 1.0), ("input_tokens", 1.0),
    ),
    "output_len": (
        ("output_len", 1.0), ("output_length", 1.0), ("generatedtokens", 1.0), ("response tokens", 1.0),
        ("num_decode_tokens", 1.0), ("osl", 1.0), ("output_tokens", 1.0),
    ),
}  # fmt: skip
"""Names of columns, and what makes seconds or tokens of their numbers. Azure's traces have TIMESTAMP, ContextTokens and
GeneratedTokens (https://github.com/Azure/AzurePublicDataset), BurstGPT's Timestamp, Request tokens and Response tokens
(https://github.com/HPMLL/BurstGPT), Vidur's arrived_at, num_prefill_tokens and num_decode_tokens."""


@dataclass(frozen=True)
class TraceFile:
    """What a file holds: its requests, of which ``skipped`` rows more could not be read, and what it looked like."""

    requests: Requests
    kind: str
    skipped: int


def read_trace(path: Path, skip_bad: bool = False) -> TraceFile:
    """Requests of a trace: JSON lines (Mooncake's), CSV (ours, Azure's, BurstGPT's, Vidur's), Parquet, or the result
    file of ``vllm bench serve --save-detailed``; also gzipped. Raises :class:`InputError` on anything else."""
    try:
        if path.suffix == ".parquet":
            return _table(path, _parquet(path), skip_bad)
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    start = text.lstrip()[:1]
    if not start:
        raise InputError(f"{path}: is empty, must be a trace of requests")
    if start != "{":
        return _table(path, csv.DictReader(io.StringIO(text)), skip_bad)
    first = text.lstrip().split("\n", 1)[0]
    try:
        one = json.loads(first)
    except ValueError:
        one = None
    if isinstance(one, dict) and "input_lens" not in one:
        return _mooncake(path, text.splitlines(), skip_bad)
    return _bench_result(path, text)


def _mooncake(path: Path, lines: Iterable[str], skip_bad: bool) -> TraceFile:
    rows, skipped = [], 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(_json_row(line))
        except (ValueError, KeyError, TypeError) as error:
            if not skip_bad:
                raise InputError(f"{path}: line {number}: {_said(error, line)}") from None
            skipped += 1
    _some(path, rows, skipped)
    blocks = tuple(row[3] for row in rows)
    ordered = _requests([row[:3] for row in rows], blocks if any(blocks) else None)
    return TraceFile(ordered, "mooncake", skipped)


def _json_row(line: str) -> tuple[float, int, int, tuple[int, ...]]:
    one = json.loads(line)
    if not isinstance(one, dict):
        raise ValueError("is no object with timestamp, input_length and output_length")
    arrival = _number("timestamp", one["timestamp"]) / 1e3
    lengths = [_whole(name, one[name]) for name in ("input_length", "output_length")]
    ids = one.get("hash_ids") or ()
    if not all(isinstance(block, int) for block in ids):
        raise ValueError(f"hash_ids {str(ids)[:40]}: must be whole numbers")
    return arrival, lengths[0], lengths[1], tuple(ids)


def _bench_result(path: Path, text: str) -> TraceFile:
    """``vllm bench serve --save-result --save-detailed`` writes lists, an entry per request."""
    try:
        one = json.loads(text)
        rows = [
            (0.0, _whole(f"input_lens[{i}]", prompt), _whole(f"output_lens[{i}]", reply))
            for i, (prompt, reply) in enumerate(zip(one["input_lens"], one["output_lens"], strict=True))
        ]
    except (ValueError, KeyError, TypeError) as error:
        said = _said(error, "")
        raise InputError(f"{path}: is no trace of JSON lines and no detailed result of vllm bench: {said}") from None
    _some(path, rows, 0)
    starts = one.get("start_times")
    if isinstance(starts, list) and len(starts) == len(rows):
        rows = [(float(start), *row[1:]) for start, row in zip(starts, rows, strict=True)]
    requests = _requests(rows, None)
    users = one.get("max_concurrency")
    if users:
        requests = replace(requests, users=int(users))
    return TraceFile(requests, "vllm bench", 0)


def _parquet(path: Path) -> Iterator[Mapping[Any, Any]]:
    import pandas as pd

    try:
        yield from pd.read_parquet(path).to_dict("records")
    except ImportError:
        raise InputError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from None
    except ValueError as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


def _table(path: Path, found: Iterable[Mapping[Any, Any]], skip_bad: bool) -> TraceFile:
    rows, skipped, columns = [], 0, None
    for number, row in enumerate(found, 1):
        columns = columns or _columns(path, list(row))
        try:
            rows.append(_table_row(row, columns))
        except (ValueError, TypeError) as error:
            if not skip_bad:
                raise InputError(f"{path}: row {number}: {_said(error, '')}") from None
            skipped += 1
    _some(path, rows, skipped)
    return TraceFile(_requests(rows, None), "table", skipped)


def _columns(path: Path, names: list[str]) -> dict[str, tuple[str, float]]:
    known = {str(name).strip().lower(): str(name) for name in names}
    chosen = {
        wanted: next(((known[name], unit) for name, unit in aliases if name in known), None)
        for wanted, aliases in COLUMNS.items()
    }
    lacking = [wanted for wanted, column in chosen.items() if column is None]
    if lacking:
        wanted = lacking[0]
        raise InputError(
            f"{path}: no column of {wanted} (one of {', '.join(name for name, _ in COLUMNS[wanted])}); "
            f"it has {', '.join(map(str, names))[:120]}"
        )
    return {wanted: column for wanted, column in chosen.items() if column is not None}


def _table_row(row: Mapping[Any, Any], columns: Mapping[str, tuple[str, float]]) -> tuple[float, int, int]:
    name, unit = columns["arrival"]
    prompt, reply = (_whole(columns[key][0], row[columns[key][0]]) for key in ("input_len", "output_len"))
    return _moment(name, row[name]) * unit, prompt, reply


def _moment(name: str, value: Any) -> float:
    """Seconds: a number, or a date and time."""
    try:
        return _number(name, value)
    except ValueError:
        text = str(value).strip()
        whole, dot, rest = text.partition(".")
        digits = "".join(itertools.takewhile(str.isdigit, rest))
        try:
            return datetime.fromisoformat(whole + rest[len(digits) :]).timestamp() + float(f"0{dot}{digits or 0}")
        except ValueError:
            raise ValueError(f"{name} {text[:40]!r}: must be a number of seconds or a date and time") from None


def _number(name: str, value: Any) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = np.nan
    if isinstance(value, bool) or not np.isfinite(found):
        raise ValueError(f"{name} {str(value)[:40]!r}: must be a number")
    return found


def _whole(name: str, value: Any) -> int:
    found = _number(name, value)
    if found < 1 or found != int(found) or found > 1e8:
        raise ValueError(f"{name} {str(value)[:40]!r}: must be a whole number of tokens, at least 1")
    return int(found)


def _said(error: Exception, line: str) -> str:
    if isinstance(error, KeyError):
        return f"no {error.args[0]}"
    if isinstance(error, json.JSONDecodeError):
        return f"{line.strip()[:40]!r} is no JSON"
    return str(error)


def _some(path: Path, rows: list[Any], skipped: int) -> None:
    if not rows:
        raise InputError(f"{path}: no row could be read{f' ({skipped} skipped)' if skipped else ''}")


def _requests(rows: list[tuple[float, int, int]], blocks: tuple[tuple[int, ...], ...] | None) -> Requests:
    """In the order of their arrival, the first at 0."""
    arrival, prompts, replies = (np.array(column) for column in zip(*rows, strict=True))
    order = np.argsort(arrival, kind="stable")
    return Requests(
        arrival_s=(arrival[order] - arrival.min()).astype(float), input_len=prompts[order].astype(np.int64),
        output_len=replies[order].astype(np.int64),
        blocks=None if blocks is None else tuple(blocks[i] for i in order), block_tokens=BLOCK_TOKENS,
    )
