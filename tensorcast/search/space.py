"""What a search tries: every layout of a world size and of its divisors, times the options that matter there.

A *variant* is one engine instance: a layout and how it runs. Options that change nothing for a layout (how tokens
travel where every rank has them all) are not tried, so no two variants are the same deployment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache, partial
from itertools import product
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from tensorcast.deploy.engine_limits import Kernels, engine_can_run
from tensorcast.deploy.exchange_kernels import EXCHANGE_KERNELS
from tensorcast.deploy.layout import Layout, broken_context, broken_prompts, broken_rules, one_server
from tensorcast.deploy.options import EXCHANGES as ALL_TO_ALL
from tensorcast.deploy.options import Options, of_layout
from tensorcast.deploy.plan.plan import block_form, choose_all2all
from tensorcast.errors import InputError
from tensorcast.profiles.facts import ModelFacts
from tensorcast.profiles.memory import is_latent
from tensorcast.search.axes import EXCHANGES, Axes
from tensorcast.search.search_task import SearchTask
from tensorcast.serving.traffic import Rows
from tensorcast.trace.cache import NoTracer, traced, whole_model
from tensorcast.trace.moe import BlockForm


def space(task: SearchTask, pruned: Counter[str]) -> list[Variant]:
    """Variants to try; layouts that no rule lets through are counted in ``pruned``."""
    base, whole = task.base, whole_model(task.model, "decode", task.base.quant)
    facts, quantized = whole.facts, whole.stored.experts.quantizes_activation
    if task.layouts:
        tried = [one for one in task.layouts if task.gpus % one.world_size == 0]
    else:
        tried = [one for size in divisors(task.gpus) for one in layouts(size)]
    found = []
    node, latent = task.device.interconnect[0].size, task.axes.dcp != (1,) and is_latent(task.model.config)
    runs = {1: True}  # by tp; a model that cannot be traced at all is an error
    ruled, first = dict[int, tuple[Options, int]](), dict[Any, int]()
    engine = task.engine.name
    can = partial(
        engine_can_run, engine, facts=facts, gpus_per_node=node, cuts=whole.cuts, any_engine=not task.runnable_only,
        lifted=task.engine.lifted_rules,
        kernels=Kernels(task.engine.lacking, task.device.architecture, task.model.config, whole),
    )
    form = partial(block_form, engine=task.engine, device=task.device, config=task.model.config, whole=whole)
    both = {True, False} <= {*task.axes.shared_expert_tp}
    for layout in tried:
        if broken := next(broken_rules(layout, facts, task.device), None):
            pruned[broken[0]] += 1
            continue
        if task.axes.pcp == (1,) and one_server(layout, facts.num_experts)[1] > 1:
            pruned[REPLICAS] += 1
            continue
        every = variants(layout, facts, task.axes, base, quantized_dispatch=quantized, latent=latent)
        if both and layout.tp > 1:
            every = _told_apart(every, task, form)
        problems = _problems(every, partial(can, layout=layout), ruled, first)
        if every and all(problems):
            pruned[f"{engine}: {problems[0].partition(':')[0]}"] += 1
            continue
        if layout.tp not in runs:  # a rank is traced only where something would run on it
            try:
                runs[layout.tp] = bool(traced(task.model, "decode", layout.tp))
            except NoTracer:
                raise
            except InputError:
                runs[layout.tp] = False
        if not runs[layout.tp]:
            pruned[NARROW] += 1
            continue
        found += [v for v, problem in zip(every, problems, strict=True) if not problem]
    return found


def _told_apart(every: list[Variant], task: SearchTask, form: Callable[..., BlockForm]) -> list[Variant]:
    """Of one layout's variants those that run otherwise than one whose shared experts are cut: a slice's are whole
    either way."""
    other: dict[tuple[str, str, int], bool] = {}  # by all that it hangs on of what is searched
    for v in every:
        key = v.prefill.all2all, v.decode.all2all, v.decode.external_shared_experts
        if key not in other and not v.decode.shared_expert_tp:
            other[key] = any(
                form(o, v.layout, kind) != form(_with(o, (("shared_expert_tp", True),)), v.layout, kind)
                for o, phase in ((v.prefill, "prefill"), (v.decode, "decode"))
                for kind in (choose_all2all(
                    o.all2all, v.layout, task.engine, phase, split=o.split_tokens_over_tp
                ),)
            )
    return [
        v for v in every if v.decode.shared_expert_tp
        or other[v.prefill.all2all, v.decode.all2all, v.decode.external_shared_experts]
    ]


UNRULED = ("dispatch", "combine")
"""Options that no rule on engines reads: what tokens travel in."""

_ruled = attrgetter(*(option.name for option in fields(Options) if option.name not in UNRULED))


def _problems(
    every: list[Variant], can: Callable[..., str], ruled: dict[int, tuple[Options, int]], first: dict[Any, int]
) -> list[str]:
    """Why an engine cannot run each variant of a layout; asked once of all that are one to its rules.

    ``ruled``: of options that were met, by identity, the number of what its rules read of them, which ``first`` knows.
    """
    told: dict[tuple[int, int], str] = {}
    found = list[str]()
    for v in every:
        for one in (v.prefill, v.decode):
            if id(one) not in ruled:
                ruled[id(one)] = one, first.setdefault(_ruled(one), len(first))
        read, write = ruled[id(v.prefill)][1], ruled[id(v.decode)][1]
        if (read, write) not in told:
            if (read, read) not in told:
                told[read, read] = can(options=v.prefill)
            told[read, write] = told[read, read] or can(options=v.decode, prefill=v.prefill)
        found.append(told[read, write])
    return found


NARROW = "widths of a rank"
"""Rule on layouts beside those of their own: transformers' class runs with a tensor-parallel rank's sizes (OLMoE's
does not at tp > 1)."""


REPLICAS = "ranks are replicas"
"""Another: data-parallel ranks of a dense model are servers of their own, which are counted as replicas of one."""


@dataclass(frozen=True)
class Variant:
    """One engine instance: a layout, and the options of a deployment in each phase."""

    layout: Layout
    prefill: Options
    decode: Options


@dataclass(frozen=True)
class Structure:
    """What the members of a fleet share, in both phases."""

    tp: int
    graph_tokens: int
    exchange: tuple[str, str]
    blocks: tuple[BlockForm, BlockForm]
    common: tuple[Options, Options]


class Setting(NamedTuple):
    """What fleets take as further batches: it changes few rows, or the tokens of a step."""

    kv_dtype: str
    mtp_depth: int
    dual_batch_overlap: bool
    pp: int


Member = tuple[Layout, Options, Options]
"""A layout, of those that differ in pp the one with most stages, and what is not a setting of prefill's and decode's
options."""


class Group(dict[Member, dict[Setting, int]]):
    """Variants of one structure, by position."""

    @cached_property
    def of_caches(self) -> list[tuple[str, int, Rows, Rows, Rows, Rows]]:
        """By dtype of the cache and drafted tokens, whose memory hangs on them: members and stages of each deployment,
        which of these each variant is, and the variants' positions. Overlap changes no memory."""
        alike: dict[tuple[str, int], list[tuple[int, int, int]]] = {}
        for i, positions in enumerate(self.values()):
            for setting, at in positions.items():
                alike.setdefault((setting.kv_dtype, setting.mtp_depth), []).append((i, setting.pp, at))
        found = []
        for (kv, depth), each in alike.items():
            member, stages, position = np.array(each).T
            most = stages.max() + 1
            deployed, where = np.unique(member * most + stages, return_inverse=True)
            member, stages = np.divmod(deployed, most)
            found.append((kv, depth, member, stages, where, position))
        return found


@dataclass(frozen=True)
class Place:
    """Where an axis may matter. ``spread``: tokens of several data-parallel ranks go to the same experts; ``sent``:
    one by one (else all of them are gathered); ``quantized_dispatch``: experts read them in fewer bits than bf16;
    ``drafts``: there is something to draft tokens with."""

    layout: Layout
    facts: ModelFacts
    spread: bool
    sent: bool
    routing: str
    quantized_dispatch: bool
    drafts: bool


@dataclass(frozen=True)
class Relevance:
    """Where an axis changes a deployment."""

    axis: str
    holds: Callable[[Place], bool]


RELEVANT = (
    Relevance("dispatch", lambda at: at.spread and at.quantized_dispatch),
    Relevance("combine", lambda at: at.spread),
    Relevance("kv_dtype", lambda at: True),
    Relevance("shared_expert_tp", lambda at: at.facts.shared_experts and at.layout.tp > 1),
    # k + 1 ranks at least, so that one of k + 1 copies of a token gives the shared expert's ranks what the others have
    Relevance(
        "external_shared_experts", lambda at: at.facts.shared_experts and at.sent and at.layout.ep > at.facts.top_k
    ),
    # copies help where the load is uneven: by the routing, or because experts do not divide
    Relevance(
        "redundant_experts",
        lambda at: at.layout.ep > 1
        and (at.routing not in ("balanced", "uniform") or at.facts.num_experts % at.layout.ep > 0),
    ),
    Relevance("dual_batch_overlap", lambda at: at.sent),
    Relevance("mtp_depth", lambda at: at.drafts),
    Relevance("dcp", lambda at: at.layout.tp > 1),
    Relevance("pcp", lambda at: at.layout.dp > 1),
)
"""The options' side of :func:`tensorcast.deploy.layout.broken_rules`: an axis is searched where it changes anything."""


COUNTED = "recorded:"
"""How a routing law begins by which engines' balancers can place experts: the search then tries that."""


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def layouts(world_size: int) -> Iterator[Layout]:
    """Every tp x dp x pp of ``world_size`` with every ep that divides tp*dp, legal for some model or not."""
    for tp in divisors(world_size):
        for dp in divisors(world_size // tp):
            for ep in divisors(tp * dp):
                yield Layout(world_size, tp, dp, ep, world_size // (tp * dp))


def variants(
    layout: Layout, facts: ModelFacts, axes: Axes, base: Options = Options(), *, quantized_dispatch: bool = False,
    latent: bool = False,
) -> list[Variant]:
    """Every combination of the options that matter for ``layout``; ``base`` holds what is not searched.

    ``quantized_dispatch``: the model's experts read tokens in fewer bits than bf16. ``latent``: latents are cached.
    """
    base = of_layout(base, layout)
    spread = layout.dp > 1 and facts.num_experts > 0
    whole = spread and layout.ep == layout.stage_ranks
    exchanges = [name for name in axes.exchange if whole or name not in SENDING]
    if not spread:
        exchanges = ["auto"]
    drafts = facts.mtp_modules > 0 or base.speculative_method != "mtp"
    found = []
    for name in exchanges or ["allgather_reducescatter"]:
        sent = whole and name in SENDING
        at = Place(layout, facts, spread, sent, base.routing, quantized_dispatch, drafts)
        tried: dict[str, Any] = {
            r.axis: getattr(axes, r.axis) if r.holds(at) else _FIXED[r.axis] for r in RELEVANT
        }
        if axes.dcp != (1,):  # contexts are cut over ranks that would hold copies; others keep them whole
            tried["dcp"] = [n for n in tried["dcp"] if not broken_context(n, layout, facts, latent=latent)] or [1]
        if axes.pcp != (1,):  # what decodes is the same whatever reads its prompts
            tried["pcp"] = dict.fromkeys([1, *(n for n in tried["pcp"] if not broken_prompts(n, layout))])
        values = tuple([(axis, tuple(values)) for axis, values in tried.items()])
        pairs = _combined(base, name, values, ep=layout.ep, experts=facts.num_experts, top_k=facts.top_k)
        found += [Variant(layout, prefill, decode) for prefill, decode in pairs]
    return list(dict.fromkeys(found)) if "logfmt10" in axes.combine else found


@lru_cache(maxsize=1024)
def _combined(
    base: Options, exchange: str, tried: tuple[tuple[str, tuple[Any, ...]], ...], *, ep: int, experts: int, top_k: int
) -> list[tuple[Options, Options]]:
    """Options of prefill and decode in every combination of what is ``tried``, by axis; many layouts share them."""
    found, axes = list[tuple[Options, Options]](), dict(tried)
    for values in product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        # ranks of their own have as many rows as others: one of a token's k + 1 copies goes there
        external = max(1, round(ep / (top_k + 1))) if chosen["external_shared_experts"] else 0
        if external and not chosen["shared_expert_tp"] and True in axes["shared_expert_tp"]:
            continue  # ranks of their own hold it whole either way
        chosen["external_shared_experts"] = external
        ranks, balances = ep - external, chosen["redundant_experts"]
        placed = [(base.placement, copies(experts, ranks) if balances else base.redundant_experts)]
        if balances and base.placement == "linear" and base.routing.startswith(COUNTED):
            placed = [("eplb", placed[0][1])]  # counts say what to copy, and where; nothing is copied blindly
            if experts % ranks == 0:
                placed.append(("eplb", 0))
        for chosen["placement"], chosen["redundant_experts"] in placed:
            found.append(_both_phases(base, exchange, tuple(chosen.items())))
    return found


@lru_cache(maxsize=4096)
def _both_phases(base: Options, exchange: str, chosen: tuple[tuple[str, Any], ...]) -> tuple[Options, Options]:
    """Options of prefill and decode; many layouts share them."""
    found = list[Options]()
    # prompts are read without drafts, replies written by ranks that hold a context each
    for phase, own in (("prefill", {"mtp_depth": 0}), ("decode", {"pcp": 1})):
        values: dict[str, Any] = {**dict(chosen), **own, "all2all": EXCHANGES[exchange][phase]}
        if values["combine"] == "logfmt10" and values["all2all"] != "low_latency":  # ten-bit logarithms are its alone
            values["combine"] = None
        found.append(_with(base, tuple(values.items())))
    return found[0], found[1]


@lru_cache(maxsize=4096)
def _with(base: Options, values: tuple[tuple[str, Any], ...]) -> Options:
    """``base`` with other values; one object for all that are equal."""
    return _once(replace(base, **dict(values)))


@lru_cache(maxsize=4096)
def _once(options: Options) -> Options:
    """One object for all that are equal."""
    return options


_FIXED: dict[str, tuple[Any, ...]] = {
    "dispatch": (None,), "combine": (None,), "kv_dtype": (None,), "shared_expert_tp": (True,),
    "external_shared_experts": (False,), "redundant_experts": (False,),
    "dual_batch_overlap": (False,), "mtp_depth": (0,), "dcp": (1,), "pcp": (1,),
}
"""Where an axis changes nothing."""


SENDING = frozenset(
    name for name, kinds in EXCHANGES.items() if {*kinds.values()} <= {*ALL_TO_ALL, *EXCHANGE_KERNELS}
)
"""Exchanges that send tokens to their experts in every phase; what ``auto`` does is the engine's choice."""


def copies(experts: int, ranks: int) -> int:
    """Redundant experts that leave every rank the same number: one more than even shares rounded down."""
    return (experts // ranks + 1) * ranks - experts


def family(layout: Layout, experts: bool = True) -> str:
    """A layout in a word or two: how attention and experts are spread; ``PP`` in front where there are stages."""
    attention = [name for name, size in (("TP", layout.tp), ("DP", layout.dp)) if size > 1]
    spread = [] if layout.stage_ranks == 1 or not experts else ["EP"] if layout.ep > 1 else ["TP"]
    if spread == ["EP"] and layout.etp > 1:
        spread = ["EPxTP"]
    if layout.dp == 1 and spread == ["TP"]:
        spread = []
    words = (["PP"] if layout.pp > 1 else []) + attention + spread
    return "+".join(words) or "1 GPU"
