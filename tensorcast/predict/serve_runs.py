"""Many runs served at once, as each would be alone: steps share their models' answers, loads are entries of arrays."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from tensorcast.deploy.deployment import Deployment, deploy
from tensorcast.deploy.encoder.encoder import EncodeStep
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.model_names import named_model
from tensorcast.deploy.options import Options, of_layout
from tensorcast.deploy.step.many import sums_of_many
from tensorcast.deploy.step.many_sums import Places
from tensorcast.deploy.step.sizes import GRID
from tensorcast.deploy.step.step import Asked
from tensorcast.errors import InputError
from tensorcast.predict.run_columns import Run
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.engine import EngineProfile
from tensorcast.profiles.model import ModelProfile
from tensorcast.serving.capacity import own_chunk, room_for, sequences_that_fit
from tensorcast.serving.curves import DecodeCurve, decode_columns, lasting, unevenly
from tensorcast.serving.encoder import with_images
from tensorcast.serving.full_cache import FullCache, starts_over
from tensorcast.serving.hand_over import hand_over_s
from tensorcast.serving.prefill_costs import PrefillCosts, PromptCut, cut_prompts, prefill_columns, prefill_costs
from tensorcast.serving.steady_state import Aggregated, Disaggregated
from tensorcast.serving.traffic import Array, ServingMetrics, Traffic

AT_ONCE = 32
"""Lengths of one deployment that are priced in one call: their arrays stay in the processor's cache."""

TOGETHER = 2048
"""Rows that are deployed and priced together: some hundred megabytes."""


@dataclass(frozen=True)
class _Row:
    """A run: what it deploys, what users send, how prompts are cut, and sequences that fill a rank's cache, if so."""

    run: Run
    traffic: Traffic
    prefill: Deployment
    decode: Deployment
    cut: PromptCut
    held: float = math.inf

    @property
    def decode_ranks(self) -> int:
        """Data-parallel ranks that decode."""
        return self.run.workers[1] * self.decode.layout.dp


def serve(
    runs: Sequence[Run], engine: Callable[[str], EngineProfile] | None = None, overflowing: set[int] | None = None
) -> list[ServingMetrics]:
    """What each of ``runs`` serves, per replica; a run that cannot be says why in ``problem``.

    ``engine``: the profile of an engine by its name, with ``==RELEASE`` where a run says one; the shipped (or the
    user's) if not given. ``overflowing``: positions of runs are put there whose sequences start over now and then.
    """
    found: dict[int, ServingMetrics] = {}
    deployed = _Deployed(engine or _engine)
    order = sorted(range(len(runs)), key=lambda i: (runs[i].device, runs[i].served_by))
    for start in range(0, len(order), TOGETHER):
        rows, most = list[_Row](), dict[int, float]()
        for i in order[start : start + TOGETHER]:
            run = runs[i]
            try:
                row = _row(run, deployed)
            except InputError as error:
                found[i] = unserved(run.concurrency / run.replicas, str(error))
                continue
            room, problem = room_for(row.prefill, row.decode, row.cut, row.traffic, run.mode == "disaggregated")
            if problem:
                found[i] = unserved(float(row.traffic.concurrency), problem)
                continue
            if overflowing is not None and _overflows(row, room):
                overflowing.add(i)
            # loads with an end begin together: those that overflow are replayed
            full = math.isinf(run.rounds) and float(room) < row.decode.most_sequences
            rows.append(replace(row, held=float(room)) if full else row)
            unasked = math.inf if run.unlimited else row.decode.unasked_sequences
            fits = min(float(room), run.max_sequences or unasked)
            most[i] = min(float(row.traffic.concurrency) / row.decode_ranks, fits)
        if rows:
            found |= zip(most, _served(rows, np.array([*most.values()])), strict=True)
        deployed.made.clear()
    return [found[i] for i in range(len(runs))]


def _overflows(row: _Row, room: Array) -> bool:
    """Whether replies that grow beside one another fill the cache, so that some start over, which no steady load says:
    under engines that keep no room for them, as all begin together, where three quarters of every reply have none.
    Replies much shorter than prompts hardly grow. ``room``: sequences per rank in the mean of their replies."""
    engine, traffic = row.decode.engine, row.traffic
    expects = engine.scheduler is None or engine.scheduler.expected_reply is not None
    users = float(traffic.concurrency) / row.decode_ranks
    if engine.reserves_reply or expects or row.run.mode == "disaggregated" or row.run.images is not None:
        return False
    if 8 * traffic.output_len < traffic.input_len or 3 * users < 2 * room:
        return False
    held = sequences_that_fit(row.prefill, row.decode, row.cut, traffic.input_len, 1.5 * traffic.output_len)
    return bool(users > held)


def _served(rows: list[_Row], most: Array) -> list[ServingMetrics]:
    """What rows serve on whose ranks so many sequences decode at ``most``."""
    alike: dict[tuple[str, str, str, bool, float], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        steps = row.decode.engine.arrival_wait_steps
        alike[row.run.served_by, row.run.mode, row.run.frontend, row.cut.per_step <= 1, steps].append(i)
    costs, curves = _priced(rows, most)
    found: dict[int, ServingMetrics] = {}
    for (_, mode, *_), members in alike.items():
        at, some = np.array(members), [rows[i] for i in members]
        pools = mode == "disaggregated"
        model = (_disaggregated if pools else _aggregated)(some, costs.where(at), replace(curves, rows=at))
        users = np.asarray(model.traffic.concurrency)
        metrics = model.metrics(model.steady_batch(most[at], users), users)
        found |= {i: metrics.one(k) for k, i in enumerate(members)}
    return [found[i] for i in range(len(rows))]


def unserved(concurrency: float, why: str) -> ServingMetrics:
    """No numbers, and ``why``."""
    numbers = {field.name: math.nan for field in fields(ServingMetrics)} | {"concurrency": concurrency}
    return ServingMetrics(**numbers | {"evidence": {}, "problem": why})  # type: ignore[arg-type]


def _row(run: Run, deployed: _Deployed) -> _Row:
    mean = (1 + run.length_ratio) / 2
    traffic = Traffic(
        input_len=max(1, round(run.isl * mean)) + (0 if run.images is None else run.images.tokens(_model(run.model))),
        output_len=max(1, round(run.osl * mean)),
        concurrency=run.concurrency / run.replicas,
        prefix_cached=run.prefix_cached,
        mtp_acceptance=run.mtp_acceptance,
        spread=(1 - run.length_ratio) / (1 + run.length_ratio),
        rounds=run.rounds,
        wait_steps=run.wait_steps,
    )
    prefill = deployed(run, run.prefill, "prefill")
    decode = deployed(run, run.decode, "decode")
    cut = cut_prompts(traffic, run.chunk_tokens or own_chunk(prefill))
    return _Row(run, traffic, prefill, decode, cut)


class _Deployed:
    """Deployments by name, each laid out (or refused) once."""

    def __init__(self, engine: Callable[[str], EngineProfile]) -> None:
        self._engine = engine
        self.made: dict[tuple[Any, ...], Deployment | str] = {}
        """Deployments, or why there is none: an error would hold on to all that was there when it was raised."""
        self._served: dict[tuple[Any, ...], EngineProfile] = {}
        """Engines as they serve: one object for all that are the same, so that their steps are priced side by side."""

    def __call__(self, run: Run, layout: Layout, phase: str) -> Deployment:
        # drafting is the decode step's
        options = of_layout(run.options, layout) if run.mode == "disaggregated" else run.options
        options = replace(options, mtp_depth=0) if phase == "prefill" and options.mtp_depth else options
        drafts = run.draft_overlap, bool(run.options.mtp_depth), run.options.speculative_method
        served = run.served_by, run.mode, run.frontend, run.prefix_cache, run.record, *drafts
        key = run.model, run.device, *served, layout, phase, options, run.images
        if key not in self.made:
            whose = run.model if run.options.mtp_depth else "", *served
            self.made[key] = self._make(run, whose, layout, phase, options)
        found = self.made[key]
        if isinstance(found, str):
            raise InputError(found)
        return found

    def _make(
        self, run: Run, whose: tuple[Any, ...], layout: Layout, phase: str, options: Options
    ) -> Deployment | str:
        try:
            if whose not in self._served:
                self._served[whose] = engine_of(run, self._engine(run.served_by))
            served = self._served[whose]
            made = deploy(_model(run.model), _device(run.device), served, layout, phase, options=options)
            return made if run.images is None else run.images.held(made)
        except InputError as error:
            return str(error)


def engine_of(run: Run, profile: EngineProfile) -> EngineProfile:
    """The ``profile`` of the engine as it serves a run."""
    pools = profile.in_pools(run.frontend) if run.mode == "disaggregated" else profile
    found = pools if run.prefix_cache else pools.without_prefix_cache()
    found = found.in_records() if run.record else found
    if not run.options.mtp_depth:
        return found
    found = found.drafts_of(_model(run.model).config)
    return found.drafting(run.options.speculative_method, overlaps=run.draft_overlap)


def _profile(kind: str) -> Callable[[str], Any]:
    @functools.lru_cache(maxsize=256)
    def load(name: str) -> Any:
        from tensorcast import profiles

        return getattr(profiles, f"load_{kind}")(name.replace("_", "-") if kind == "device" else name)

    return load


@functools.lru_cache(maxsize=256)
def _model(name: str) -> ModelProfile:
    return named_model(name)[0]


_device, _engine = _profile("device"), _profile("engine")
load_engine_once: Callable[[str], EngineProfile] = _engine
"""An engine's profile by its name, read once."""


def load_profiles(run: Run) -> tuple[ModelProfile, DeviceProfile]:
    """Model and device of a run, each read once."""
    return _model(run.model), _device(run.device)


def _priced(rows: list[_Row], most: Array) -> tuple[PrefillCosts, DecodeCurve]:
    """Prefill costs and decode curves, an entry per row; no curve is read beyond ``most`` sequences, up to which it is
    priced. Rows of one deployment are priced together, and their kernels' fitted models asked once for both phases."""
    asked: list[Asked] = []
    prefills, decodes = (_parts(rows, of) for of in (lambda row: row.prefill, lambda row: row.decode))
    cuts = [[rows[i].cut for i in part] for part in prefills]
    for part, several in zip(prefills, cuts, strict=True):
        batch = np.array([cut.batches for cut in several])
        tokens, past = (np.array([[getattr(cut, name)] for cut in several]) for name in ("tokens", "past"))
        one = rows[part[0]].prefill
        asked.append((one.step if one.layout.pp == 1 else one.step.undivided, batch, tokens, past))
    # a step that decodes has a sequence, however few there are in the mean: fewer cost as much
    least = np.array([1 / rows[part[0]].decode.layout.dp for part in decodes])
    begin = np.maximum(np.searchsorted(GRID, least, side="right") - 1, 0)
    end = np.maximum(np.searchsorted(GRID, [most[part].max() for part in decodes]) + 1, begin + 1)
    for part, one, *span in zip(decodes, least, begin, end, strict=True):
        grid, contexts = np.maximum(GRID[slice(*span)], one), np.array([[rows[i].traffic.context] for i in part])
        step, pp = rows[part[0]].decode.step, rows[part[0]].decode.layout.pp
        lasts = [[lasting(rows[i].cut.per_step, reads=rows[i].run.mode != "disaggregated")] for i in part]
        asked.append((step, unevenly(grid, pp, np.array(lasts)), 1.0, contexts))
    priced = sums_of_many(asked)
    first, read = priced.first, len(prefills)
    prompts = _entries(prefills, first[:read], np.zeros(read, dtype=int), np.full(read, 3))
    replies = _entries(decodes, first[read:], begin, end)
    spent = [row.prefill.engine.overhead for row in rows]
    factor, error = (np.array([[getattr(one, f"prefill_{name}")] for one in spent]) for name in ("factor", "error"))
    cut = {name: np.array([getattr(row.cut, name) for row in rows]) for name in ("tokens", "per_step", "rises")}
    stages = np.array([float(row.prefill.layout.pp) for row in rows])
    costs = prefill_costs(prefill_columns(priced.at(prompts), factor, error), stages=stages, **cut)
    curves = DecodeCurve(GRID[: replies.shape[1]], decode_columns(priced.at(replies)), np.arange(len(rows)))
    return _with_images(costs, rows), curves


def _entries(parts: list[list[int]], first: Places, begin: Places, end: Places) -> Places:
    """By row which entries are its own, in columns from ``begin`` to ``end``: the first and the last one again where
    others have more. ``first``: the first entry of the first row of each of the ``parts``."""
    sizes = np.array(list(map(len, parts)))
    own, low, start = (np.repeat(values, sizes) for values in (end - begin, begin, first))
    among = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    columns = np.arange(max(2, end.max()))
    found = np.empty((len(own), len(columns)), dtype=int)
    found[np.concatenate(parts)] = (start + among * own)[:, None] + np.clip(columns - low[:, None], 0, own[:, None] - 1)
    return found


def _with_images(costs: PrefillCosts, rows: list[_Row]) -> PrefillCosts:
    """Costs of rows, with the images of those that have some."""
    steps: dict[int, EncodeStep] = {}
    seen = [i for i, row in enumerate(rows) if row.run.images is not None]
    for i in seen:
        images, one = rows[i].run.images, rows[i].prefill
        if images is not None and id(one) not in steps:  # the same for all rows of a deployment
            steps[id(one)] = images.of_prompt(one.model, one.device, one.engine, one.layout.tp)
    if not seen:
        return costs
    blind = [i for i, row in enumerate(rows) if row.run.images is None]
    whole = with_images(costs.where(seen), [steps[id(rows[i].prefill)] for i in seen])
    return PrefillCosts.joined([whole, costs.where(blind)]).where(np.argsort([*seen, *blind]))


def _parts(rows: list[_Row], deployment: Callable[[_Row], Deployment]) -> list[list[int]]:
    """Positions of rows of one deployment, at most :data:`AT_ONCE` together."""
    found: dict[int, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        found[id(deployment(row))].append(i)
    return [same[start : start + AT_ONCE] for same in found.values() for start in range(0, len(same), AT_ONCE)]


def _aggregated(rows: list[_Row], costs: PrefillCosts, curves: DecodeCurve) -> Aggregated:
    """Rows of one engine; all cut their prompts or none does."""
    traffic, engine = Traffic.together([row.traffic for row in rows]), rows[0].decode.engine
    depth, held = (np.array(one) for one in zip(*((float(r.run.options.mtp_depth), r.held) for r in rows), strict=True))
    full = starts_over(engine) and bool(np.any(np.isfinite(held)))
    return Aggregated(
        traffic=traffic,
        engine=engine,
        decode_ranks=np.array([float(row.decode_ranks) for row in rows]),
        depth=depth,
        decoding=curves,
        prompts=costs,
        full=FullCache.of(traffic, held, traffic.decode_steps(depth)) if full else None,
    )


def _disaggregated(rows: list[_Row], costs: PrefillCosts, curves: DecodeCurve) -> Disaggregated:
    """Rows of one engine, their pools."""
    hand_over = [
        hand_over_s(row.prefill, row.decode.layout.world_size, sum(row.run.workers), int(row.traffic.input_len))
        for row in rows
    ]
    return Disaggregated(
        traffic=Traffic.together([row.traffic for row in rows]),
        engine=rows[0].decode.engine,
        decode_ranks=np.array([float(row.decode_ranks) for row in rows]),
        prefill_ranks=np.array([float(row.run.workers[0] * row.prefill.layout.dp) for row in rows]),
        depth=np.array([float(row.run.options.mtp_depth) for row in rows]),
        hand_over_s=np.array([float(seconds) for seconds in hand_over]),
        decoding=curves,
        prompts=costs,
    )
