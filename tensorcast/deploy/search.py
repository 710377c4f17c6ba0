"""One question of a search: a model on so many GPUs of one device under one engine; all its candidates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorcast.deploy.blocks import has_shared
from tensorcast.deploy.evaluate import Scene, Workshop
from tensorcast.deploy.forms import aggregated, disaggregated, steady
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.options import Options, option_facts
from tensorcast.deploy.parallel import uncollected
from tensorcast.deploy.pareto import pareto
from tensorcast.deploy.points import Points
from tensorcast.deploy.price import WITHIN_80
from tensorcast.deploy.refine import finer
from tensorcast.deploy.runnable import engine_can_run
from tensorcast.deploy.serving import Load
from tensorcast.deploy.space import Axes, Variant, divisors, family, layouts, legal, variants
from tensorcast.deploy.tables import traced_table
from tensorcast.errors import InputError
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.engine import EngineProfile
from tensorcast.profiles.model import ModelProfile

if TYPE_CHECKING:
    import pandas as pd

FORMS = ("aggregated", "disaggregated")
NO_ROOM, NO_PACE = "batch fits memory", "prefill keeps pace"
"""Rules on candidates beside those on layouts: a sequence fits beside the weights; prompts are read as they come."""



@dataclass(frozen=True)
class Question:
    """What is asked of one device, engine and cluster size; a task of its own for a worker process."""

    model: ModelProfile
    device: DeviceProfile
    engine: EngineProfile
    gpus: int
    load: Load
    ttft_s: float | None = None
    tpot_s: float | None = None
    objective: str = "tokens_per_gpu"
    axes: Axes = field(default_factory=Axes)
    base: Options = field(default_factory=Options)
    layouts: tuple[Layout, ...] = ()
    """Only these; empty: all."""
    forms: tuple[str, ...] = FORMS
    request_rate: float | None = None
    price_per_hour: float | None = None
    runnable_only: bool = True

    @property
    def price(self) -> float | None:
        """US dollars per GPU hour: what was given, else the list price of the device, if any is known."""
        listed = self.device.price_per_hour_usd
        return float(listed) if self.price_per_hour is None and listed is not None else self.price_per_hour

    @property
    def scene(self) -> Scene:
        return Scene(self.model, self.device, self.engine, self.load)


@dataclass
class Answer:
    """Of one question: the candidates that may matter, the pools and variants behind them, and what fell away."""

    frame: pd.DataFrame
    variants: list[tuple[Variant, Variant]]
    """(prefill, decode) of every row."""
    pruned: Counter[str]
    examined: int


def space(question: Question, pruned: Counter[str]) -> list[Variant]:
    """Variants to try; layouts that no rule lets through are counted in ``pruned``."""
    scene, base = question.scene, question.base
    first = scene.deployment(Layout(1), "decode", Options(quant=base.quant, kv_dtype=base.kv_dtype))
    table = traced_table(question.model, "decode")
    facts = option_facts(table.facts, has_shared(table), question.model.config)
    facts |= {"quantized_dispatch": first.quantization.experts.quantizes_activation, "routing": base.routing}
    if question.layouts:
        tried = [one for one in question.layouts if question.gpus % one.world_size == 0]
    else:
        tried = [one for size in divisors(question.gpus) for one in layouts(size)]
    found = []
    node = question.device.interconnect[0].size
    for layout in _traceable(legal(tried, facts, question.device, pruned), question.model, pruned):
        every = variants(layout, facts, question.axes, base)
        if question.runnable_only:
            engine = question.engine.name
            problems = [
                engine_can_run(engine, layout, facts, v.prefill, node)
                or engine_can_run(engine, layout, facts, v.decode, node, v.prefill)
                for v in every
            ]
            if every and all(problems):
                pruned[f"{question.engine.name}: {problems[0].partition(':')[0]}"] += 1
            every = [v for v, problem in zip(every, problems, strict=True) if not problem]
        found += every
    return found


NARROW = "widths of a rank"
"""Rule on layouts beside those of their own: transformers' class runs with a tensor-parallel rank's sizes."""


def _traceable(layouts_: Sequence[Layout], model: ModelProfile, pruned: Counter[str]) -> Iterator[Layout]:
    """Those whose ranks can be traced; the others (OLMoE at tp > 1) are counted in ``pruned``."""
    runs = {1: True}  # a model that cannot be traced at all is an error
    for layout in layouts_:
        if layout.tp not in runs:
            try:
                runs[layout.tp] = bool(traced_table(model, "decode", layout.tp))
            except InputError:
                runs[layout.tp] = False
        if runs[layout.tp]:
            yield layout
        else:
            pruned[NARROW] += 1


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
    if fine := finer(workshop, parts, partial(_in_time, question, workshop)):
        between, more = _candidates(question, fine, Counter(), workshop.grid)
        every.append((fine, between))
        examined += more
    frames, behind = [], []
    for shop, found in every:
        for form, points in found.items():
            frames.append(_frame(question, shop, form, points))
            prefill = points.columns.get("prefill", points.variant).astype(int)
            behind += [(shop.variants[p], shop.variants[d]) for p, d in zip(prefill, points.variant, strict=True)]
    return Answer(stacked(frames), behind, pruned, examined)


def _candidates(
    question: Question, workshop: Workshop, pruned: Counter[str], known: Any = ()
) -> tuple[dict[str, Points], int]:
    """Points worth a row by form, and of how many; those at batches that are ``known`` left out."""
    limits, found, examined = (question.ttft_s, question.tpot_s), {}, 0
    for form in question.forms:
        points, slow = (
            aggregated(workshop, limits)
            if form == "aggregated"
            else disaggregated(workshop.in_pools(), question.gpus, limits)
        )
        pruned[NO_PACE] += slow
        if not len(points):
            continue
        points = points.where(~np.isin(points.columns["batch"], known))
        examined += len(points)
        kept = points.where(_kept(question, workshop, form, points))
        if form == "aggregated":
            inside = steady(workshop, kept)
            pruned[NO_PACE] += int((~inside).sum())
            kept = kept.where(inside)
        found[form] = kept
    return found, examined


def stacked(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    import pandas as pd

    frames = [frame for frame in frames if len(frame)]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=COLUMNS)


def _sizes(question: Question, workshop: Workshop, form: str, points: Points) -> tuple[Any, Any, Any]:
    """(replicas, GPUs of one replica or pool, GPUs) of every point."""
    size = workshop.layouts["world_size"][points.variant]
    if form == "disaggregated":
        prefill = workshop.layouts["world_size"][points.columns["prefill"].astype(int)]
        size = prefill * points.columns["prefill_workers"] + size * points.columns["decode_workers"]
    replicas = np.maximum(question.gpus // size, 1.0)
    if question.objective == "gpus" and question.request_rate:
        rate = points.columns["output_tokens_per_s"] / question.load.output_len
        replicas = np.ceil(question.request_rate / rate)
    return replicas, size, replicas * size


def _excess(question: Question, ttft_s: Any, tpot_s: Any, gpus: Any) -> dict[str, Any]:
    """How many times its limit each number is, by the limit's name."""
    asked = {"ttft": (ttft_s, question.ttft_s), "tpot": (tpot_s, question.tpot_s), "gpus": (gpus, question.gpus)}
    return {name: value / limit for name, (value, limit) in asked.items() if limit is not None}


def _score(question: Question, workshop: Workshop, form: str, points: Points) -> Any:
    """What the objective makes of every point: more is better."""
    _, size, gpus = _sizes(question, workshop, form, points)
    per_gpu = points.columns["output_tokens_per_s"] / size
    if question.objective == "latency":
        return -points.columns["request_s"]
    return -gpus + 1e-9 * per_gpu if question.objective == "gpus" else per_gpu


def _in_time(question: Question, workshop: Workshop, form: str, points: Points) -> Any:
    """The score; -inf where users wait too long."""
    c = points.columns
    late = (c["ttft_s"] > (question.ttft_s or np.inf)) | (c["tpot_s"] > (question.tpot_s or np.inf))
    return np.where(late, -np.inf, _score(question, workshop, form, points))


def _kept(question: Question, workshop: Workshop, form: str, points: Points) -> Any:
    """Positions worth a row: per layout and batch the best options, and the whole Pareto front."""
    c = points.columns
    _, size, gpus = _sizes(question, workshop, form, points)
    worst = np.max(list(_excess(question, c["ttft_s"], c["tpot_s"], gpus).values()), axis=0)
    layout_of = {layout: i for i, layout in enumerate(dict.fromkeys(v.layout for v in workshop.variants))}
    of_variant = np.array([layout_of[v.layout] for v in workshop.variants])
    keys = [of_variant[points.variant], np.log2(c["batch"]).round(3)]
    score = _score(question, workshop, form, points)
    order = np.lexsort((-score, worst > 1, *keys))
    found = [order[_firsts([key[order] for key in keys])]]
    order = np.lexsort((worst, *keys))  # the closest to the limits
    found.append(order[_firsts([key[order] for key in keys])])
    found.append(np.flatnonzero(pareto(1.0 / c["tpot_s"], c["output_tokens_per_s"] / size)))
    return np.unique(np.concatenate(found))


def _firsts(keys: list[Any]) -> Any:
    """Mask of sorted entries that differ from the one before."""
    changed = np.ones(len(keys[0]), dtype=bool)
    changed[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    return changed


COLUMNS = tuple(
    "candidate form device engine layout family tp dp ep etp pp replicas world_size gpus prefill_layout prefill_workers"
    " decode_workers batch concurrency all2all dispatch combine kv_dtype redundant_experts external_shared_experts"
    " shared_expert_tp dual_batch_overlap mtp_depth chunk_tokens ttft_s ttft_low_s ttft_high_s tpot_s tpot_low_s"
    " tpot_high_s request_s output_tokens_per_s tokens_per_s_per_gpu tokens_per_s_per_user decode_step_s prefill_step_s"
    " exposed_comm_s hidden_comm_s memory_bytes weights_bytes kv_cache_bytes activations_bytes capacity_bytes"
    " largest_batch share_measured share_calibrated share_datasheet meets limit pareto cost_per_million_tokens".split()
)
"""Columns of :attr:`Comparison.candidates`; units in the names."""


def _frame(question: Question, workshop: Workshop, form: str, points: Points) -> pd.DataFrame:
    """Rows of :data:`COLUMNS`; candidates are named, and the front drawn, once all questions are answered."""
    import pandas as pd

    c, n = points.columns, len(points)
    chosen = [workshop.variants[i] for i in points.variant]
    replicas, size, gpus = _sizes(question, workshop, form, points)
    memory = workshop.memory(points)
    excess = _excess(question, c["ttft_s"], c["tpot_s"], gpus)
    names, ratios = list(excess), np.array(list(excess.values()))
    over = ratios.max(axis=0) > 1
    experts = bool(traced_table(question.model, "decode").facts["num_experts"])
    every = dict.fromkeys(v.layout for v in workshop.variants)  # thousands of rows, few layouts
    called = {layout: str(layout) for layout in every}
    families = {layout: family(layout, experts) for layout in every}
    pools = form == "disaggregated"
    prefill = [workshop.variants[int(i)] for i in c["prefill"]] if pools else chosen
    kv = workshop.cache_dtypes
    tokens = c["output_tokens_per_s"] * replicas
    price = question.price
    nothing = np.full(n, np.nan)
    return pd.DataFrame({
        "candidate": "",
        "form": form,
        "device": question.device.name,
        "engine": question.engine.name,
        "layout": [called[v.layout] for v in chosen],
        "family": [families[v.layout] for v in chosen],
        **{
            name: [getattr(v.layout, name) if name != "etp" or experts else 1 for v in chosen]
            for name in ("tp", "dp", "ep", "etp", "pp")
        },
        "replicas": replicas.astype(int),
        "world_size": size.astype(int),
        "gpus": gpus.astype(int),
        "prefill_layout": [called[v.layout] for v in prefill] if pools else None,
        "prefill_workers": c["prefill_workers"] if pools else nothing,
        "decode_workers": c["decode_workers"] if pools else nothing,
        "batch": c["batch"],
        "concurrency": c["concurrency"] * replicas,
        "all2all": [workshop.exchange(v) for v in chosen],
        "dispatch": [v.decode.dispatch or "" for v in chosen],
        "combine": [v.decode.combine or "" for v in chosen],
        "kv_dtype": [kv[v.decode.kv_dtype] for v in chosen],
        "redundant_experts": [v.decode.redundant_experts for v in chosen],
        "external_shared_experts": [v.decode.external_shared_experts for v in chosen],
        "shared_expert_tp": [v.decode.shared_expert_tp for v in chosen],
        "dual_batch_overlap": [v.decode.dual_batch_overlap for v in chosen],
        "mtp_depth": [v.decode.mtp_depth for v in chosen],
        "chunk_tokens": nothing if pools else c["chunk_tokens"],
        **{
            f"{what}{end}_s": c[f"{what}_s"] * (1 + WITHIN_80 * c[f"{what}_error"]) ** sign
            for what in ("ttft", "tpot")
            for end, sign in (("", 0.0), ("_low", -1.0), ("_high", 1.0))
        },
        "request_s": c["request_s"],
        "output_tokens_per_s": tokens,
        "tokens_per_s_per_gpu": tokens / gpus,
        "tokens_per_s_per_user": 1.0 / c["tpot_s"],
        **{name: c[name] for name in ("decode_step_s", "prefill_step_s", "exposed_comm_s", "hidden_comm_s")},
        "memory_bytes": memory["total"],
        "weights_bytes": memory["weights"],
        "kv_cache_bytes": memory["kv_cache"],
        "activations_bytes": memory["activations"],
        "capacity_bytes": float(question.device.memory_bytes),
        "largest_batch": c["largest_batch"],
        **{f"share_{kind}": c[f"share_{kind}"] for kind in ("measured", "calibrated", "datasheet")},
        "meets": ~over,
        "limit": np.where(over, np.array(names)[ratios.argmax(axis=0)], ""),
        "pareto": False,
        "cost_per_million_tokens": nothing if price is None else gpus * price / 3600.0 / tokens * 1e6,
    })[list(COLUMNS)]


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
