"""What is said beside the numbers of a comparison: what they rest on, what fell away and why, how much it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from tensorcast.cost.routing import SAID
from tensorcast.cost.stages import stated_stages
from tensorcast.deploy.engine_limits import ANY_ENGINE, Kernels, engine_can_run
from tensorcast.deploy.layout import Layout, broken_rules
from tensorcast.deploy.options import idle_note
from tensorcast.deploy.plan.remarks import not_counted, on_hosts, stored_otherwise, uncut
from tensorcast.profiles.drafting import published, said_of
from tensorcast.search.axes import FULL, Axes
from tensorcast.search.candidate_table import NONE, Candidates
from tensorcast.search.search import NO_PACE, NO_ROOM
from tensorcast.search.search_task import SearchTask
from tensorcast.search.space import space
from tensorcast.serving.traffic import Traffic
from tensorcast.trace.cache import traced, whole_model

COUNTED = {"layouts": "layouts", "variants": "layouts with their options", "candidates": "candidates"}
"""What rules count, with the words for it: layouts; variants, which are layouts with options; candidates, which are
variants at a batch."""


def notes(tasks: Sequence[SearchTask], kept: Candidates) -> tuple[str, ...]:
    """What the numbers rest on and a reader may not expect."""
    first = tasks[0]
    whole = whole_model(first.model, "decode", first.base.quant)
    found = [f"left out: {text}" for text in (*left_out(tasks, kept), *_undivided(tasks))]
    found += [*not_counted(whole.stored), *stored_otherwise(first.model, first.base.quant, first.device.vendor)]
    if first.engine.remark:
        found.append(first.engine.remark)
    if idle := _idle(first, kept):
        found.append(idle_note(idle))
    if first.axes.kv_dtype == (None,) and first.base.kv_dtype is None:
        found.append(f"KV cache in {kept['kv_dtype'][0]}, as the model ships; --kv-dtype bf16,fp8 compares both")
    facts = whole.facts
    found += facts.remarks if first.images is None else _of_images(first)
    found += on_hosts(traced(first.model, "decode"), first.engine)
    modules = facts.mtp_modules or first.base.speculative_method != "mtp"
    if modules and first.axes.mtp_depth == (0,):
        found.append("no drafted tokens, though the model can; --mtp 0,1,2 compares depths at --mtp-acceptance")
    elif modules and max(first.axes.mtp_depth) > 0:
        found += _of_drafts(first)
    cut = [int(tp) for tp in sorted({*kept["tp"].tolist()}) if tp > 1]
    if cut and (said := uncut(traced(first.model, "decode", min(cut)))):
        found.append(said)
    if facts.num_experts:
        found.append(f"{SAID[first.base.routing]}; --routing uniform or zipf:1 shows what less or more skew does")
    if "disaggregated" in first.modes:
        between = "; caches go from device to device over the slower of both networks" if first.pools else ""
        found.append(f"disaggregated pools use as many GPUs as match, which may be fewer than there are{between}")
    unsure = kept["share_datasheet"][kept["meets"] | ~kept["meets"].any()]
    if len(unsure) and unsure.max() > 0.2:
        most = f"up to {100 * unsure.max():.0f} % of a candidate's time"
        found.append(f"{most} rests on figures of datasheets, as those of the network between nodes are")
    listed = {one.device.name: one.device.price_per_hour_usd for task in tasks for one in task.pools or (task,)
              if one.price_per_hour is None}
    if prices := [f"{name} {price}" for name, price in listed.items() if price is not None]:
        found.append(f"costs at list prices; --price sets yours: {', '.join(prices)}")
    if not first.runnable_only:
        found.append("layouts that no engine may be able to run are among them")
    return tuple(found)


def _of_images(task: SearchTask) -> list[str]:
    """What prompts are made of, and what their images cost the GPUs that read them."""
    images, model = task.images, task.model
    if images is None:
        return []
    size, each = images.images, images.tokens(model) // images.images.count
    text = int(task.load.input_len) - images.tokens(model)
    step = images.of_prompt(model, task.device, task.engine, 1)
    where = "on GPUs of their own" if images.apart else "before each prompt, on its GPUs"
    return [
        f"prompts are {text} tokens of text and {size.count} x {each} of images ({size.width}x{size.height}), which "
        f"take one {task.device.name} {in_seconds(float(step.kernels_s))}: encoded {where}; none is seen twice"
    ]


def _of_drafts(task: SearchTask) -> list[str]:
    """Which acceptance of drafted tokens is counted on, and what is published of it."""
    found = [f"drafted tokens are accepted with a chance of {task.load.mtp_acceptance:g} each: an assumption"]
    method = task.base.speculative_method
    said = said_of(published(task.model.name, method))
    return [*found, f"{method}: {said}"] if said else found


def _idle(task: SearchTask, kept: Candidates) -> dict[str, str]:
    """Options asked for that no candidate has a use for, with the reason."""
    asked, usual = task.axes, (Axes(), FULL, Axes().for_one_exchange(), FULL.for_one_exchange())
    stay = (kept["all2all"] == "none").all()
    reasons = {
        "exchange": ("--all2all", stay, ""),
        "dispatch": ("--dispatch", (kept["dispatch"] == "").all(), "experts take their tokens in bf16"),
        "combine": ("--combine", (kept["combine"] == "").all(), "no candidate's exchange can send it"),
    }
    found = {
        flag: "no tokens travel to other GPUs" if stay else why
        for axis, (flag, unused, why) in reasons.items()
        if unused and getattr(asked, axis) not in [getattr(axes, axis) for axes in usual]
    }
    if task.base.placement != "linear" and (kept["ep"] == 1).all():
        found["--placement"] = "experts are in one group"
    stages = len(stated_stages(task.base.pp_partition)) if task.base.pp_partition else 0
    if stages and not (kept["pp"] == stages).any():
        found["--pp-partition"] = f"no candidate has {stages} pipeline stages"
    if 1 not in asked.dcp and not (kept["dcp"] > 1).any():
        found["--dcp"] = "no layout has as many GPUs that would hold copies of a sequence's cache"
    if task.load.mtp_acceptance != Traffic.mtp_acceptance and max(asked.mtp_depth) == 0:
        found["--mtp-acceptance"] = "no tokens are drafted: see --mtp"
    return found


def warning(task: SearchTask, kept: Candidates, ttft_s: float, tpot_s: float) -> str:
    """That no limit holds the best back, where none does; from where on limits can be kept. Else empty."""
    limits = {"ttft": (task.ttft_s, ttft_s), "tpot": (task.tpot_s, tpot_s)}
    free = [name for name, (limit, _) in limits.items() if limit is None]
    if not free or task.objective == "latency":
        return ""
    inside = kept.where(kept["meets"])
    waits = {"ttft": "for a first token", "tpot": "for each of the others"}
    here = " and ".join(f"{in_seconds(limits[name][1])} {waits[name]}" for name in free)
    ways = " and ".join(f"--{name} (from {in_seconds(inside[f'{name}_s'].min())} up)" for name in free)
    names = " or ".join(name.upper() for name in free)
    return f"No limit on {names}: the busiest batch wins however long users wait, here {here}. Set {ways}."


def left_out(tasks: Sequence[SearchTask], kept: Candidates) -> Iterator[str]:
    """Each layout that was asked for and has no candidate, and why: ``tp6 breaks rule 'heads per rank': ...``."""
    for task in tasks:
        pools = task.pools or (task,)
        own = kept.where(kept["device"] == " > ".join([one.device.name for one in pools]))
        there = {str(name).partition("@")[0] for name in {*own["layout"], *own["prefill_layout"]}}
        several = len({one.device.name for one in (*tasks, *pools)}) > 1
        of = {layout: one for one in pools for layout in one.layouts}
        of |= {layout: one for one in pools for layout in one.layouts if one.gpus % layout.world_size == 0}
        for layout, pool in of.items():
            if str(layout) not in there:
                where = f" on {pool.device.name}" if several else ""
                yield f"{layout}{where} {_why_not(pool, layout)}"


def _undivided(tasks: Sequence[SearchTask]) -> list[str]:
    """Sizes of clusters that none of the layouts asked for divides."""
    return list(dict.fromkeys(
        f"{one.gpus} {one.device.name}: no layout asked for divides as many" for task in tasks
        for one in task.pools or (task,)
        if one.layouts and all(one.gpus % layout.world_size for layout in one.layouts)
    ))


def _why_not(task: SearchTask, layout: Layout) -> str:
    if task.gpus % layout.world_size:
        return f"takes {layout.world_size} GPUs, which does not divide {task.gpus}"
    pruned: Counter[str] = Counter()
    if space(replace(task, layouts=(layout,)), pruned):
        return "holds no sequence beside the weights, or reads prompts more slowly than they come"
    name = next(iter(pruned), "")
    whole = whole_model(task.model, "decode", task.base.quant)
    for rule, problem in broken_rules(layout, whole.facts, task.device):
        if rule == name:
            return f"breaks rule '{name}': {problem}"
    engine, _, limit = name.partition(": ")
    if limit in ANY_ENGINE:
        return f"cannot be run by {engine}: {_never(task, layout)}"
    return f"cannot be run by {engine} ({limit}); --any-engine compares it all the same"


def _never(task: SearchTask, layout: Layout) -> str:
    """Why the engine cannot run a layout with whatever options; empty if it can."""
    whole = whole_model(task.model, "decode", task.base.quant)
    kernels = Kernels(task.engine.lacking, task.device.architecture, task.model.config, whole)
    return engine_can_run(
        task.engine.name, layout, whole.facts, task.base, cuts=whole.cuts, any_engine=True, kernels=kernels
    )


def nothing_left(tasks: Sequence[SearchTask], pruned: Counter[str]) -> str:
    """Why there is no candidate at all: layouts that cannot be, or a model that takes more GPUs, and how many."""
    from tensorcast.search.smallest_cluster import smallest_cluster

    first = tasks[0]
    needed, sizes = list[tuple[int, str, str]](), ", ".join(dict.fromkeys(map(_cluster, tasks)))
    tasks = [one for task in tasks for one in task.pools or (task,)]
    if not pruned[NO_ROOM] and not pruned[NO_PACE]:
        asked = list(dict.fromkeys(left_out(tasks, NONE)))
        if not asked and (problem := _never(first, Layout(1))):  # of the device, not of a layout
            asked = [f"{first.engine.name} {first.engine.version} cannot run it: {problem}"]
        rules = ", ".join(f"{rule} {number}" for rule, number in pruned.most_common())
        return f"no layout is left to compare on {sizes}: {'; '.join(asked) or 'pruned by rule: ' + rules}"
    apart, counted = first.modes == ("disaggregated",), sum(one.gpus for one in first.pools) == first.gpus
    for task in {task.device.name: task for task in sorted(tasks, key=lambda task: task.gpus)}.values():
        size = smallest_cluster(task)
        if size is not None:
            least = 2 * size if apart and not first.pools else size  # two pools on one device
            flag = "--decode-world-size" if task in first.pools[1:] else "--world-size"
            multiple = f" (and {flag} a multiple of {size})" if size > 1 and least <= task.gpus else ""
            needed.append((size, f"{least} {task.device.name}", multiple))
    length = first.load.input_len + first.load.output_len
    hint = "no number of them holds it"
    if needed and first.pools and not counted:  # GPUs of both together, of which a pool's servers take a divisor
        largest = max(size for size, *_ in needed)
        said = f"--world-size {2 * largest} or another multiple of {largest}"
        hint = f"it needs at least {' and '.join(text for _, text, _ in needed)}: {said}"
    elif needed:
        hint = f"it needs at least {(' and ' if first.pools else ' or ').join(text + more for _, text, more in needed)}"
    if first.layouts:
        hint = f"none of the layouts asked for holds it; {hint}"
    return f"{first.model.name} does not fit on {sizes} with a sequence of {length} tokens: {hint}; or quantise"


def _cluster(task: SearchTask) -> str:
    """``32 h100-sxm``; of two devices ``16 h100-sxm > 8 h200-sxm``, or ``24 h100-sxm > h200-sxm`` of both together."""
    pools = task.pools or (task,)
    if sum(one.gpus for one in pools) == task.gpus:
        return " > ".join(f"{one.gpus} {one.device.name}" for one in pools)
    return f"{task.gpus} {' > '.join(one.device.name for one in pools)}"


def in_seconds(value: float) -> str:
    """``1.5 s``, ``30 ms``."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
