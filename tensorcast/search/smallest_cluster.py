"""The smallest cluster that holds a model, and what to say of it where a model does not fit."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from tensorcast.deploy.deployment import Deployment
from tensorcast.deploy.options import Options
from tensorcast.deploy.workload import Workload
from tensorcast.search.axes import Axes
from tensorcast.search.search_task import SearchTask
from tensorcast.search.space import space
from tensorcast.search.variant_prices import VariantPrices
from tensorcast.serving.traffic import Traffic


def smallest_cluster(task: SearchTask) -> int | None:
    """GPUs of the smallest cluster, in powers of two, that holds the model and one sequence; None: no size does."""
    size = 1
    while size <= min(task.device.world_limit, 4096):
        plain = Axes(
            exchange=("allgather_reducescatter",), dispatch=(None,), shared_expert_tp=(True,),
            external_shared_experts=(False,), redundant_experts=(False,), dual_batch_overlap=(False,),
            chunk_tokens=(min(task.axes.chunk_tokens),),
        )
        whole = replace(task, gpus=size, axes=plain, layouts=())
        tried = [v for v in space(whole, Counter()) if v.layout.world_size == size]
        if tried:
            prices = VariantPrices(whole.scenario, tried, plain.chunk_tokens)
            if prices.without_room < len(tried):
                return size
        size *= 2
    return None


def what_holds(deployment: Deployment, workload: Workload) -> str:
    """How many GPUs hold the model and one sequence, in the layout that takes the fewest."""
    options, device = deployment.options, deployment.device
    base = Options(quant=options.quant, kv_dtype=options.kv_dtype)
    load = Traffic(max(1, workload.length - 1), 1, 1)
    least = smallest_cluster(
        SearchTask(
            model=deployment.model, device=device, engine=deployment.engine, gpus=1, load=load, base=base,
            runnable_only=False,
        )
    )
    if least is None:
        return f"no number of {device.name} holds it"
    if least <= deployment.layout.world_size:
        fewer = "with fewer --redundant-experts, or " if options.redundant_experts else ""
        return f"{least} {device.name} hold it {fewer}in another layout (tensorcast compare finds it)"
    return f"it needs at least {least} {device.name}"
