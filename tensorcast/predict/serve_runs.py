"""Many runs served at once, as each would be alone: steps share their models' answers, loads are entries of arrays."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tensorcast.deploy.deployment import Deployment, deploy
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.options import Options
from tensorcast.deploy.step.sizes import GRID
from tensorcast.deploy.step.step import Asked, prices
from tensorcast.errors import InputError
from tensorcast.predict.run_columns import Run
from tensorcast.profiles.engine import EngineProfile
from tensorcast.serving.capacity import own_chunk, room_for
from tensorcast.serving.curves import (
    LINE,
    CurvesAt,
    Line,
    PrefillLine,
    decode_columns,
    evidence_shares,
    expert_seconds,
    under_load,
)
from tensorcast.serving.hand_over import transfer_s
from tensorcast.serving.load import Load, Served
from tensorcast.serving.steady_state import Aggregated, Disaggregated, steady_batch, unserved

AT_ONCE = 32
"""Lengths of one deployment that are priced in one call: their arrays stay in the processor's cache."""


@dataclass
class _Row:
    """A run on its way: what it deploys, and its curves once they are priced."""

    run: Run
    load: Load
    prefill: Deployment
    decode: Deployment
    line: Line
    fits: float = 0.0
    columns: tuple[dict[str, Any], int] = ({}, 0)

    @property
    def ranks(self) -> int:
        """Data-parallel ranks that decode."""
        return self.run.workers[1] * self.decode.layout.dp

    @property
    def lanes(self) -> int:
        """Data-parallel ranks that prefill."""
        return self.run.workers[0] * self.prefill.layout.dp

    @property
    def largest(self) -> float:
        """Most sequences that may decode on a rank."""
        return float(self.load.concurrency) / self.ranks


def serve(runs: Sequence[Run], engine: Callable[[str], EngineProfile] | None = None) -> list[Served]:
    """What each of ``runs`` serves, per replica; a run that cannot be says why in ``problem``.

    ``engine``: the profile of an engine by its name; the shipped (or the user's) if not given.
    """
    found: list[Served | None] = [None] * len(runs)
    deployed = _Deployed(engine or _engine)
    rows: dict[int, _Row] = {}
    for i, run in enumerate(runs):
        try:
            rows[i] = _row(run, deployed)
        except InputError as error:
            found[i] = unserved(np.asarray(run.concurrency / run.replicas), str(error))
    _price_prompts(list(rows.values()))
    for i, row in list(rows.items()):
        row.fits, problem = room_for(row.prefill, row.decode, row.line, row.load, row.run.mode != "agg")
        if problem:
            found[i] = unserved(np.asarray(rows.pop(i).load.concurrency), problem)
    _price_decoding(list(rows.values()))
    alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, row in rows.items():
        alike[row.run.engine, row.run.mode, row.line.per_step <= 1].append(i)
    for (_, mode, _), members in alike.items():
        served = (_aggregated if mode == "agg" else _disaggregated)([rows[i] for i in members])
        for position, i in enumerate(members):
            found[i] = served.one(position)
    return [one for one in found if one is not None]


def _row(run: Run, deployed: _Deployed) -> _Row:
    mean = (1 + run.length_ratio) / 2
    load = Load(
        max(1, round(run.isl * mean)), max(1, round(run.osl * mean)), run.concurrency / run.replicas,
        run.prefix_cached, run.mtp_acceptance, (1 - run.length_ratio) / (1 + run.length_ratio), run.rounds,
        run.wait_steps,
    )  # fmt: skip
    prefill = deployed(run, run.prefill, "prefill")
    decode = deployed(run, run.decode, "decode")
    chunk = run.chunk_tokens or own_chunk(prefill)
    if chunk < 1:
        raise InputError(f"chunk_tokens = {chunk}: must be at least 1")
    return _Row(run, load, prefill, decode, Line(load.new, load.prefix_cached, chunk))


class _Deployed:
    """Deployments by name, each laid out (or refused) once."""

    def __init__(self, engine: Callable[[str], EngineProfile]) -> None:
        self._engine = engine
        self._made: dict[tuple[Any, ...], Deployment | InputError] = {}

    def __call__(self, run: Run, layout: Layout, phase: str) -> Deployment:
        # drafting is the decode step's
        options = replace(run.options, mtp_depth=0) if phase == "prefill" and run.options.mtp_depth else run.options
        key = run.model, run.device, run.engine, run.mode != "agg", layout, phase, options
        if key not in self._made:
            self._made[key] = self._make(*key)
        found = self._made[key]
        if isinstance(found, InputError):
            raise found
        return found

    def _make(
        self, model: str, device: str, engine: str, pools: bool, layout: Layout, phase: str, options: Options
    ) -> Deployment | InputError:
        try:
            served = self._engine(engine)
            served = served.in_pools() if pools else served
            return deploy(_model(model), _device(device), served, layout, phase, options)
        except InputError as error:
            return error


def _profile(kind: str) -> Callable[[str], Any]:
    @functools.lru_cache(maxsize=256)
    def load(name: str) -> Any:
        from tensorcast import profiles

        return getattr(profiles, f"load_{kind}")(name.replace("_", "-") if kind == "device" else name)

    return load


_model, _device, _engine = _profile("model"), _profile("device"), _profile("engine")


def _price_prompts(rows: list[_Row]) -> None:
    """Fill in every row's prefill line; rows of one deployment are priced together."""
    asked: list[Asked] = []
    parts = list(_parts(rows, lambda row: row.prefill))
    for part in parts:
        batch = np.array([row.line.asked for row in part])
        tokens, past = (np.array([getattr(row.line, name) for row in part])[:, None] for name in ("tokens", "past"))
        asked.append((part[0].prefill.step, batch, tokens, past))
    for part, price in zip(parts, prices(asked), strict=True):
        shape = (len(part), 3)
        seconds, error, experts = (
            np.broadcast_to(value, shape) for value in (price.seconds, price.error, expert_seconds(price))
        )
        evidence = {kind: np.broadcast_to(share, shape) for kind, share in evidence_shares(price).items()}
        load = under_load(part[0].prefill)
        for i, row in enumerate(part):
            row.line._read(seconds[i], error[i], {k: share[i] for k, share in evidence.items()}, experts[i], load)


def _price_decoding(rows: list[_Row]) -> None:
    """Fill in every row's decode curve."""
    asked: list[Asked] = []
    parts = list(_parts(rows, lambda row: row.decode))
    for part in parts:
        grid = GRID[: int(np.searchsorted(GRID, max(row.largest for row in part))) + 1]
        asked.append((part[0].decode.step, grid, 1.0, np.array([row.load.context for row in part])[:, None]))
    for part, (_, grid, _, _), price in zip(parts, asked, prices(asked), strict=True):
        columns = decode_columns(price, part[0].decode)
        columns = {name: np.broadcast_to(value, (len(part), len(grid))) for name, value in columns.items()}
        for i, row in enumerate(part):
            row.columns = columns, i


def _parts(rows: list[_Row], deployment: Callable[[_Row], Deployment]) -> Iterator[list[_Row]]:
    """Rows of one deployment, at most :data:`AT_ONCE` together."""
    found: dict[int, list[_Row]] = defaultdict(list)
    for row in rows:
        found[id(deployment(row))].append(row)
    for same in found.values():
        for start in range(0, len(same), AT_ONCE):
            yield same[start : start + AT_ONCE]


class _Lines(PrefillLine):
    """Prefill lines of rows, one entry each."""

    def __init__(self, rows: list[_Row]) -> None:
        for name in (*LINE, "per_step", "tokens", "past"):
            setattr(self, name, np.array([getattr(row.line, name) for row in rows]))
        self.evidence = {kind: np.array([row.line.evidence[kind] for row in rows]) for kind in rows[0].line.evidence}


def _curves(rows: list[_Row]) -> Any:
    """Decode curves of rows, one entry each; shorter ones are never read beyond their end."""
    width = max(2, *(columns["seconds"].shape[1] for columns, _ in (row.columns for row in rows)))
    found = {name: np.empty((len(rows), width)) for name in rows[0].columns[0]}
    for i, (columns, member) in enumerate(row.columns for row in rows):
        for name, values in columns.items():
            end = values.shape[1]
            found[name][i, :end] = values[member]
            found[name][i, end:] = values[member, -1]
    return CurvesAt(GRID[:width], found, np.arange(len(rows)))


def _aggregated(rows: list[_Row]) -> Served:
    """As :func:`tensorcast.serving.steady_state.aggregated`, of one engine; all rows cut their prompts or none does."""
    load = Load.together([row.load for row in rows])
    dp, depth = (np.array(values) for values in zip(*((r.ranks, r.run.options.mtp_depth) for r in rows), strict=True))
    one = Aggregated(load, rows[0].decode.engine, dp, depth, _curves(rows), _Lines(rows))
    limit = np.minimum(load.concurrency / dp, [row.fits for row in rows])
    return one.served(steady_batch(one.in_flight, limit, load.concurrency), load.concurrency)


def _disaggregated(rows: list[_Row]) -> Served:
    """As :func:`tensorcast.serving.steady_state.disaggregated`, rows of one engine."""
    load = Load.together([row.load for row in rows])
    numbers = ((r.ranks, r.lanes, r.run.options.mtp_depth, _hand_over_s(r)) for r in rows)
    ranks, lanes, depth, hand_over = (np.array(values) for values in zip(*numbers, strict=True))
    pools = Disaggregated(
        load, rows[0].decode.engine, ranks, lanes, depth, hand_over, _curves(rows), _Lines(rows)
    )
    limit = np.minimum(load.concurrency / ranks, [row.fits for row in rows])
    batch = steady_batch(lambda b: pools.in_flight(b, load.concurrency), limit, load.concurrency)
    return pools.served(batch, load.concurrency)


def _hand_over_s(row: _Row) -> float:
    return transfer_s(row.prefill, row.decode, row.load.input_len, sum(row.run.workers))
