"""Attention and FFN on GPUs of their own, from Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorcast.api.deployments import device_profile
from tensorcast.arguments import python_names
from tensorcast.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tensorcast.deploy.ffn_apart import ApartPrice
    from tensorcast.deploy.option_types import DeploymentOptions
    from tensorcast.search.compare import Comparison
    from tensorcast.search.search_task import SearchTask
    from tensorcast.serving.ffn_splits import DecodeServer, Split


@python_names
def simulate_apart(
    model: str,
    *,
    device: str,
    ffn_gpus: int,
    tp: int = 1,
    dp: int = 1,
    batch: int = 1,
    context: int = 4096,
    engine: str = "vllm",
    micro_batches: int = 2,
    ffn_device: str | None = None,
    allow_oversize: bool = False,
    **options: Unpack[DeploymentOptions],
) -> ApartPrice:
    """Simulate a decode step with attention on ``tp * dp`` of ``device`` and the experts on ``ffn_gpus`` others.

    ``batch`` counts sequences per data-parallel rank of attention, which run as so many ``micro_batches`` in turn;
    ``ffn_device``: another device for the experts. ``options`` as of :func:`simulate`. What is modelled, and what not,
    is told in docs/ffn-apart.md. Raises :class:`tensorcast.InputError`, one line, on anything that cannot be.
    """
    from tensorcast.deploy.ffn_apart import deploy_apart
    from tensorcast.deploy.model_names import named_model
    from tensorcast.deploy.options import of_traffic, options_of
    from tensorcast.deploy.workload import Workload
    from tensorcast.profiles.store import load_engine

    profile, _ = named_model(model)
    workload = Workload("decode", batch, 1, context)
    workload.check_length(profile)
    apart = deploy_apart(
        profile, device_profile(device), load_engine(engine), tp=tp, dp=dp, ffn_gpus=ffn_gpus,
        options=of_traffic(options_of(options), profile), micro_batches=micro_batches,
        ffn_device=device_profile(ffn_device) if ffn_device else None,
    )
    if not allow_oversize:
        apart.check_room(batch, context)
    return apart.price(batch, context)


def compare_apart(comparison: Comparison) -> list[Split]:
    """Decode servers with attention and FFN apart beside the best whole one of a :func:`compare`, for every device,
    engine and size that was asked about, all by their steps alone.

    Whole servers are the comparison's decode pools, without drafts. Raises :class:`tensorcast.InputError` for a model
    without experts, and for a comparison of pools of two devices, whose decode pools are of another device.
    """
    from tensorcast.serving.ffn_splits import Split, Splitting, splits

    if second := next((task.pools[-1].device.name for task in comparison.tasks if task.pools), ""):
        raise InputError(f"--ffn-apart: compares decode servers of --device alone; leave out --decode-device {second}")
    return [
        Split(
            device=task.device.name, engine=task.engine.name, gpus=task.gpus, whole=_best_whole(comparison, task),
            apart=splits(Splitting(
                model=task.model, device=task.device, engine=task.engine, gpus=task.gpus, load=task.load,
                tpot_s=task.tpot_s, options=task.base,
            )),
        )
        for task in comparison.tasks
    ]  # fmt: skip


def _best_whole(comparison: Comparison, task: SearchTask) -> DecodeServer | None:
    """The best decode pool of the task within the limit, its steps without what pools wait for; None where there is
    none."""
    from tensorcast.serving.ffn_splits import DecodeServer

    kept = comparison.kept
    own = (kept["mode"] == "disaggregated") & (kept["mtp_depth"] == 0) & (kept["device"] == task.device.name)
    slower = float(task.engine.in_pools().overhead.pool_factor)
    found = []
    for row in kept.where(own & (kept["engine"] == task.engine.name)).records():
        gpus, step_s = int(row["tp"] * row["dp"] * row["pp"]), row["decode_step_s"] / slower
        if gpus <= task.gpus and step_s <= (task.tpot_s or float("inf")):
            found.append(DecodeServer(
                layout=row["layout"], gpus=gpus, batch=float(row["batch"]), step_s=step_s,
                tokens_per_s_per_gpu=row["batch"] * row["dp"] / step_s / gpus, exchange=str(row["all2all"]),
            ))  # fmt: skip
    return max(found, key=lambda one: one.tokens_per_s_per_gpu, default=None)
