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
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from tensorcast.errors import InputError
from tensorcast.scheduling.requests import Length, Requests, drawn

BLOCK_TOKENS = 512
"""Tokens of a block whose hash a Mooncake trace has (https://github.com/kvcache-ai/Mooncake, FAST25-release)."""

BAILIAN_TOKENS = 16
"""The same of a Bailian trace (https://github.com/alibaba-edu/qwen-bailian-usagetraces-anon, README.md), whose
timestamps are seconds."""

MOST_TOKENS = 100_000_000
"""Tokens of the longest prompt or reply that is believed."""

Row = tuple[float, int, int, tuple[int, ...]]
"""Seconds of the arrival, tokens of prompt and reply, and ids of the prompt's blocks."""

Reader = Callable[[Any], Row | None]
"""Of what a line or entry holds; none where it is no request of the run."""

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
    """Requests of a trace: JSON lines (Mooncake's, Bailian's, aiperf's), CSV (ours, Azure's, BurstGPT's, Vidur's),
    Parquet, or results: of ``vllm bench serve --save-detailed``, of SGLang's ``bench_serving --output-details``, of
    guidellm (``FILE#2`` is the second of several); also gzipped. Raises :class:`InputError` on anything else."""
    path, which = _numbered(path)
    try:
        if path.suffix == ".parquet":
            return _table(path, _parquet(path), skip_bad)
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    start = text.lstrip()[:1]
    if not start:
        raise InputError(f"{path}: is empty, must be a trace of requests")
    if start == "[":
        raise InputError(f"{path}: is one JSON list, must be JSON lines, a table, or a result of a benchmark's client")
    if start != "{":
        head = text.lstrip().split("\n", 1)[0]
        delimiter = max(",;\t", key=head.count)
        return _table(path, csv.DictReader(io.StringIO(text), delimiter=delimiter), skip_bad)
    first = text.lstrip().split("\n", 1)[0]
    try:
        one = json.loads(first)
    except ValueError:
        one = None
    if isinstance(one, dict) and not {"input_lens", "benchmarks", "request_throughput"} & set(one):
        kind = _AIPERF if "metrics" in one else _BAILIAN if "chat_id" in one else _MOONCAKE
        return _lines(path, text.splitlines(), skip_bad, kind)
    return _result(path, text, skip_bad, which)


def _numbered(path: Path) -> tuple[Path, int | None]:
    """``FILE#2`` as the file and the number, where no file is called so."""
    name, mark, number = path.name.rpartition("#")
    if not mark or not number.isdigit() or path.exists():
        return path, None
    return path.with_name(name), int(number)


WRONG = (ValueError, KeyError, TypeError, AttributeError)
"""What is raised over values that are none of what is read."""


def _each(
    path: Path, items: Iterable[Any], read: Callable[[Any], Row | None], skip_bad: bool, what: str
) -> tuple[list[Row], int]:
    """Every item as a row, and how many were skipped; the first that cannot be read is named by its number."""
    rows, skipped = list[Row](), 0
    for number, item in enumerate(items, 1):
        if isinstance(item, str) and not item.strip():
            continue
        try:
            if (row := read(item)) is not None:
                rows.append(row)
        except WRONG as error:
            if not skip_bad:
                way = "--skip-bad leaves such rows out"
                raise InputError(f"{path}: {what} {number}: {_said(error, item)}; {way}") from None
            skipped += 1
    if not rows:
        raise InputError(f"{path}: no row could be read{f' ({skipped} skipped)' if skipped else ''}")
    return rows, skipped


def _lines(path: Path, lines: Sequence[str], skip_bad: bool, kind: tuple[str, Reader]) -> TraceFile:
    name, read = kind

    def of_line(line: str) -> Row | None:
        one = json.loads(line)
        if not isinstance(one, dict):
            raise ValueError("is no object of a request's fields")
        return read(one)

    rows, skipped = _sound(lines, read), 0
    if rows is None:
        rows, skipped = _each(path, lines, of_line, skip_bad, "line")
    size = BAILIAN_TOKENS if name == "bailian" else BLOCK_TOKENS
    requests = _requests(rows, fixed=name == "aiperf", block_tokens=size)
    if name == "aiperf" and (users := _aiperf_users(path)):
        requests = replace(requests, arrival_s=np.zeros(len(requests)), users=users)
    return TraceFile(requests, name, skipped)


def _sound(lines: Sequence[str], read: Reader) -> list[Row] | None:
    """Rows of lines without a fault, parsed all at once; None where there is one, which line by line is then named."""
    written = [line for line in lines if line.strip()]
    try:
        rows = [read(one) for one in json.loads(f"[{','.join(written)}]")]
    except WRONG:
        return None
    return [row for row in rows if row is not None] or None if len(rows) == len(written) else None


def _mooncake_row(one: Mapping[str, Any], second: float = 1e3, block_tokens: int = BLOCK_TOKENS) -> Row:
    arrival = _number("timestamp", one["timestamp"]) / second
    lengths = [_whole(name, one[name]) for name in ("input_length", "output_length")]
    ids = one.get("hash_ids") or ()
    if not isinstance(ids, list | tuple) or not set(map(type, ids)) <= {int}:
        raise ValueError(f"hash_ids {str(ids)[:40]}: must be a list of whole numbers")
    if (len(ids) - 1) * block_tokens >= lengths[0]:
        raise ValueError(f"hash_ids: are {len(ids)}, more than {lengths[0]} tokens have blocks of {block_tokens}")
    return arrival, lengths[0], lengths[1], tuple(ids)


def _bailian_row(one: Mapping[str, Any]) -> Row:
    return _mooncake_row(one, 1.0, BAILIAN_TOKENS)


def _aiperf_row(one: Mapping[str, Any]) -> Row | None:
    """A line of aiperf's ``profile_export.jsonl`` (aiperf 0.13.0, common/models/record_models.py: MetricRecordInfo);
    none of a request that only warms up, which has its line, too."""
    if one["metadata"].get("benchmark_phase") == "warmup":
        return None
    if one.get("error"):
        raise ValueError(f"error {str(one['error'])[:40]!r}: the request failed")
    names = ("input_sequence_length", "output_sequence_length")
    prompt, reply = (_whole(name, one["metrics"][name]["value"]) for name in names)
    return _number("request_start_ns", one["metadata"]["request_start_ns"]) / 1e9, prompt, reply, ()


def _aiperf_users(path: Path) -> int | None:
    """Requests in flight, where the summary beside the lines (config/artifacts.py) says that nothing else was waited
    for."""
    for name in (f"{path.stem}_aiperf.json", f"{path.stem}.json"):
        try:
            phases = json.loads(path.with_name(name).read_text(encoding="utf-8"))["input_config"]["phases"]
            (measured,) = (one for one in phases if one.get("kind", "profiling") == "profiling")
            return int(measured.get("concurrency") or 1) if measured.get("type") == "concurrency" else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None


_MOONCAKE = ("mooncake", _mooncake_row)
_BAILIAN = ("bailian", _bailian_row)
_AIPERF = ("aiperf", _aiperf_row)


def _result(path: Path, text: str, skip_bad: bool, which: int | None) -> TraceFile:
    """A benchmark client's results, each one object with an entry per request; vLLM's and SGLang's append a line to
    their file for each."""
    try:
        results = [json.loads(text)]
    except ValueError as error:
        try:
            results = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError:
            said = _said(error, "")
            raise InputError(f"{path}: is no trace of JSON lines and no result of a benchmark: {said}") from None
    if isinstance(results[0], dict) and "benchmarks" in results[0]:
        return _guidellm(path, _chosen(path, results[0]["benchmarks"], which, "benchmarks"), skip_bad)
    one = _chosen(path, results, which, "results")
    if isinstance(one, dict) and "request_throughput" in one and "input_lens" not in one:
        raise InputError(f"{path}: has no requests: vllm bench serve writes them with --save-detailed, SGLang's "
                         "bench_serving with --output-details")  # fmt: skip
    try:
        lists = [one["input_lens"], one["output_lens"]]
        starts, users = _sent(path, one, len(lists[0])), one.get("max_concurrency")
        entries = list(zip(starts, *lists, one.get("errors") or [""] * len(lists[0]), strict=True))
    except WRONG as error:
        said = _said(error, "")
        raise InputError(f"{path}: is no trace of JSON lines and no detailed result of vllm bench: {said}") from None

    def read(entry: tuple[Any, ...]) -> Row:
        if entry[3]:
            raise ValueError(f"errors {str(entry[3])[:40]!r}: the request failed")
        return _number("start_times", entry[0]), _whole("input_lens", entry[1]), _whole("output_lens", entry[2]), ()

    rows, skipped = _each(path, entries, read, skip_bad, "request")
    return TraceFile(_of_users(path, _requests(rows), "max_concurrency", users), "vllm bench", skipped)


def _of_users(path: Path, requests: Requests, name: str, users: Any) -> Requests:
    """``requests`` of so many users, where some are said."""
    try:
        return replace(requests, users=_whole(name, users)) if users else requests
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def _chosen(path: Path, many: Any, which: int | None, what: str) -> Any:
    """The one that is asked for of many."""
    if not isinstance(many, list):
        raise InputError(f"{path}: {what} {str(many)[:40]!r}: must be a list")
    if which is None and len(many) != 1:
        raise InputError(f"{path}: holds {len(many)} {what}; say which, as {path.name}#1")
    if not 1 <= (which or 1) <= len(many):
        raise InputError(f"{path}#{which}: holds {what} 1 to {len(many)}")
    return many[(which or 1) - 1]


def _sent(path: Path, one: Mapping[str, Any], count: int) -> Sequence[Any]:
    """When requests were sent: all at once where nothing but a place among the users was waited for; as noted, which
    SGLang's client (0.5.23, benchmark/serving.py) does not; at random at its rate."""
    rate, noted = one.get("request_rate"), one.get("start_times")
    endless = rate is None or str(rate).lower() in ("inf", "infinity")
    if noted and (rate is None or not endless or one.get("ramp_up_strategy")):
        return list(noted)
    if endless:
        return [0.0] * count
    try:
        rate_s = _number("request_rate", rate)
    except ValueError:
        raise InputError(f"{path}: request_rate {rate!r}: when requests were sent is not in it") from None
    burstiness = float(one.get("burstiness") or 1.0)
    return drawn(count, Length(1), Length(1), rate=rate_s, burstiness=burstiness).arrival_s.tolist()


def _guidellm(path: Path, one: Any, skip_bad: bool) -> TraceFile:
    """A benchmark of guidellm's ``benchmarks.json`` (guidellm 0.8.1, schemas/base/request_stats.py:
    GenerativeRequestStats, scheduler/strategies.py). Streams send whenever they have the reply before."""

    def read(one: Mapping[str, Any]) -> Row:
        lengths = [_whole(name, one[name]) for name in ("prompt_tokens", "output_tokens")]
        return _number("request_start_time", one["request_start_time"]), lengths[0], lengths[1], ()

    try:
        entries = list(one["requests"]["successful"])
        strategy = (one.get("config") or {}).get("strategy") or {}
        kind, streams = strategy.get("type_"), strategy.get("streams") or strategy.get("max_concurrency")
    except WRONG as error:
        raise InputError(f"{path}: is no result of guidellm with its requests: {_said(error, '')}") from None
    rows, skipped = _each(path, entries, read, skip_bad, "request")
    requests = _of_users(path, _requests(rows), "streams", 1 if kind == "synchronous" else streams)
    if kind in ("synchronous", "concurrent", "throughput"):
        requests = replace(requests, arrival_s=np.zeros(len(requests)))
    return TraceFile(requests, "guidellm", skipped)


def _parquet(path: Path) -> Iterator[Mapping[Any, Any]]:
    import pandas as pd

    try:
        yield from pd.read_parquet(path).to_dict("records")
    except ImportError:
        raise InputError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from None
    except ValueError as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


def _table(path: Path, found: Iterable[Mapping[Any, Any]], skip_bad: bool) -> TraceFile:
    items = iter(found)
    first = next(items, None)
    if first is None:
        raise InputError(f"{path}: no row could be read")
    columns = _columns(path, list(first))
    rows, skipped = _each(
        path, itertools.chain([first], items), lambda row: _table_row(row, columns), skip_bad, "row"
    )
    return TraceFile(_requests(rows, fixed=False), "table", skipped)


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
            f"it has {' '.join(', '.join(map(str, names)).split())[:120]}"
        )
    return {wanted: column for wanted, column in chosen.items() if column is not None}


def _table_row(row: Mapping[Any, Any], columns: Mapping[str, tuple[str, float]]) -> Row:
    name, unit = columns["arrival"]
    prompt, reply = (_whole(columns[key][0], row[columns[key][0]]) for key in ("input_len", "output_len"))
    return _moment(name, row[name]) * unit, prompt, reply, ()


def _moment(name: str, value: Any) -> float:
    """Seconds: a number, or a date and time."""
    try:
        return _number(name, value)
    except ValueError:
        text = str(value).strip()
        whole, dot, rest = text.partition(".")
        digits = "".join(itertools.takewhile(str.isdigit, rest))
        try:
            found = datetime.fromisoformat(whole + rest[len(digits) :])
            # no clock of this machine's, which summer time moves
            found = found if found.tzinfo else found.replace(tzinfo=UTC)
            return found.timestamp() + float(f"0{dot}{digits or 0}")
        except ValueError:
            raise ValueError(f"{name} {text[:40]!r}: must be a number of seconds or a date and time") from None


def _number(name: str, value: Any) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if isinstance(value, bool) or not math.isfinite(found):
        raise ValueError(f"{name} {str(value)[:40]!r}: must be a number")
    return found


def _whole(name: str, value: Any) -> int:
    if type(value) is int and 1 <= value <= MOST_TOKENS:  # as good as all of them
        return value
    found = _number(name, value)
    if found < 1 or found != int(found) or found > MOST_TOKENS:
        raise ValueError(f"{name} {str(value)[:40]!r}: must be a whole number of tokens, at least 1")
    return int(found)


def _said(error: Exception, line: Any) -> str:
    if isinstance(error, KeyError):
        return f"no {error.args[0]}"
    if isinstance(error, json.JSONDecodeError):
        return f"{str(line).strip()[:40]!r} is no JSON"
    if isinstance(error, TypeError | AttributeError):
        return "something in it is no list or object where one must be"
    return str(error)


def _requests(rows: list[Row], fixed: bool = True, block_tokens: int = BLOCK_TOKENS) -> Requests:
    """In the order of their arrival, the first at 0. ``fixed``: a benchmark's; users' replies end by themselves."""
    arrival, prompts, replies = (np.array([row[i] for row in rows]) for i in range(3))
    order = np.argsort(arrival, kind="stable")
    blocks = tuple(rows[i][3] for i in order) if any(row[3] for row in rows) else None
    return Requests(
        arrival_s=(arrival[order] - arrival.min()).astype(float), input_len=prompts[order].astype(np.int64),
        output_len=replies[order].astype(np.int64), blocks=blocks, block_tokens=block_tokens, fixed=fixed,
    )
