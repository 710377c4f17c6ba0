"""One question of a search: a model on so many GPUs of one device under one engine; all its candidates."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorcast.deploy.deployment import Deployment
from tensorcast.deploy.options import Options
from tensorcast.deploy.workload import Workload
from tensorcast.parallel import uncollected
from tensorcast.search.axes import Axes
from tensorcast.search.candidate_arrays import Points
from tensorcast.search.candidate_table import candidate_frame, stacked
from tensorcast.search.candidates import aggregated, disaggregated, steady
from tensorcast.search.question import Question
from tensorcast.search.refine import finer
from tensorcast.search.selection import score_in_time, worth_a_row
from tensorcast.search.space import Variant, space
from tensorcast.search.variant_prices import Workshop
from tensorcast.serving.load import Load

if TYPE_CHECKING:
    import pandas as pd

NO_ROOM, NO_PACE = "batch fits memory", "prefill keeps pace"
"""Rules on candidates beside those on layouts: a sequence fits beside the weights; prompts are read as they come."""


@dataclass
class Answer:
    """Of one question: the candidates that may matter, the pools and variants behind them, and what fell away."""

    frame: pd.DataFrame
    variants: list[tuple[Variant, Variant]]
    """(prefill, decode) of every row."""
    pruned: Counter[str]
    examined: int


@uncollected()
def answer(question: Question) -> Answer:
    """Evaluate every candidate of one question. Tops: a few seconds for a large model and 32 GPUs.

    Every candidate's step is priced at the very batch that it stands at.
    """
    pruned: Counter[str] = Counter()
    tried = space(question, pruned)
    if not tried:
        return Answer(stacked([]), [], pruned, 0)
    workshop = Workshop(question.scene, tried, question.axes.chunk_tokens)
    workshop.price()
    none = workshop.without_room()
    if none:
        pruned[NO_ROOM] += none
    parts, examined = _candidates(question, workshop, pruned)
    examined += pruned[NO_PACE]
    every = [(workshop, parts)]
    if fine := finer(workshop, parts, partial(score_in_time, question, workshop)):
        between, more = _candidates(question, fine, Counter(), workshop.grid)
        every.append((fine, between))
        examined += more
    frames, behind = [], []
    for shop, found in every:
        for mode, points in found.items():
            frames.append(candidate_frame(question, shop, mode, points))
            prefill = points.columns.get("prefill", points.variant).astype(int)
            behind += [(shop.variants[p], shop.variants[d]) for p, d in zip(prefill, points.variant, strict=True)]
    return Answer(stacked(frames), behind, pruned, examined)


def _candidates(
    question: Question, workshop: Workshop, pruned: Counter[str], known: Any = ()
) -> tuple[dict[str, Points], int]:
    """Points worth a row by mode, and of how many; those at batches that are ``known`` left out."""
    limits, found, examined = (question.ttft_s, question.tpot_s), {}, 0
    for mode in question.forms:
        points, slow = (
            aggregated(workshop, limits)
            if mode == "aggregated"
            else disaggregated(workshop.in_pools(), question.gpus, limits)
        )
        pruned[NO_PACE] += slow
        if not len(points):
            continue
        points = points.where(~np.isin(points.columns["batch"], known))
        examined += len(points)
        kept = points.where(worth_a_row(question, workshop, mode, points))
        if mode == "aggregated":
            inside = steady(workshop, kept)
            pruned[NO_PACE] += int((~inside).sum())
            kept = kept.where(inside)
        found[mode] = kept
    return found, examined


def smallest_that_fits(question: Question) -> int | None:
    """GPUs of the smallest cluster, in powers of two, that holds the model and one sequence; None: no size does."""
    size = 1
    while size <= min(question.device.world_limit, 4096):
        plain = Axes(
            exchange=("allgather_reducescatter",), dispatch=(None,), shared_expert_tp=(True,),
            external_shared_experts=(False,), redundant_experts=(False,), dual_batch_overlap=(False,),
            chunk_tokens=(min(question.axes.chunk_tokens),),
        )
        whole = replace(question, gpus=size, axes=plain, layouts=())
        tried = [v for v in space(whole, Counter()) if v.layout.world_size == size]
        if tried:
            workshop = Workshop(whole.scene, tried, plain.chunk_tokens)
            workshop.price()
            if workshop.without_room() < len(tried):
                return size
        size *= 2
    return None


def enough(deployment: Deployment, workload: Workload) -> str:
    """How many GPUs hold the model and one sequence, in the layout that takes the fewest."""

    options, device = deployment.options, deployment.device
    base = Options(quant=options.quant, kv_dtype=options.kv_dtype)
    load = Load(max(1, workload.length - 1), 1, 1)
    least = smallest_that_fits(
        Question(deployment.model, device, deployment.engine, 1, load, base=base, runnable_only=False)
    )
    if least is None:
        return f"no number of {device.name} holds it"
    if least <= deployment.layout.world_size:
        fewer = "with fewer --redundant-experts, or " if options.redundant_experts else ""
        return f"{least} {device.name} hold it {fewer}in another layout (tensorcast compare finds it)"
    return f"it needs at least {least} {device.name}"
