"""What ``import tensorcast`` offers: names in, typed results out. Heavy imports happen inside the calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tensorcast.errors import InputError

if TYPE_CHECKING:
    from tensorcast.deploy.result import Simulation
    from tensorcast.profiles.device import DeviceProfile


def device_profile(name: str) -> DeviceProfile:
    """A device profile by name or path; ``cpu`` is this machine, measured at first use and cached."""
    if name.lower() == "cpu":
        from tensorcast.validate.host import host_profile

        return host_profile()
    from tensorcast.profiles import load_device

    return load_device(name)


def simulate(
    model: str,
    *,
    device: str,
    world_size: int = 1,
    tp: int | None = None,
    dp: int = 1,
    ep: int = 1,
    pp: int = 1,
    phase: str = "decode",
    batch: int = 1,
    input_len: int | None = None,
    context: int | None = None,
    engine: str = "vllm",
    quant: str | None = None,
    kv_dtype: str | None = None,
    routing: str = "balanced",
    fusion: str = "engine",
    all2all: str = "auto",
    dispatch: str | None = None,
    redundant_experts: int = 0,
    placement: str = "linear",
    experts_backend: str | Mapping[str, str] = "auto",
    shared_expert_tp: bool = True,
    external_shared_experts: int = 0,
    dual_batch_overlap: bool = False,
    mtp_depth: int = 0,
    chunk_tokens: int = 0,
    allow_oversize: bool = False,
) -> Simulation:
    """Simulate one step of ``model`` on ``world_size`` of ``device``.

    ``model``, ``device`` and ``engine`` are names, or paths of profiles; a model may be a directory with a Hugging
    Face ``config.json``. ``batch`` counts sequences per data-parallel rank. ``tp`` defaults to what dp and pp leave.
    Decode defaults to ``context=4096`` cached tokens, prefill to ``input_len=4096`` new ones. The choices from
    ``fusion`` to ``chunk_tokens`` are those of :class:`tensorcast.deploy.options.Options`.
    Raises :class:`tensorcast.InputError`, one line, on anything that cannot be.

    >>> import tensorcast as tc
    >>> run = tc.simulate("deepseek-v3", device="h200", world_size=32, dp=32, ep=32, batch=128)  # doctest: +SKIP
    >>> run.step_s, run.ops.head()  # doctest: +SKIP
    """
    from tensorcast.deploy.layout import Layout
    from tensorcast.deploy.options import Options
    from tensorcast.deploy.simulate import simulate as run
    from tensorcast.deploy.workload import Workload
    from tensorcast.profiles import load_engine, load_model

    if dp < 1 or pp < 1:
        raise InputError(f"layout: dp = {dp} and pp = {pp} must be at least 1")
    layout = Layout(world_size, tp if tp is not None else max(1, world_size // (dp * pp)), dp, ep, pp)
    default_new, default_past = (1, 4096) if phase == "decode" else (4096, 0)
    workload = Workload(
        phase,
        batch,
        default_new if input_len is None else input_len,
        default_past if context is None else context,
    )
    if not isinstance(experts_backend, str):  # by phase or sub-config; the empty key is all others
        experts_backend = ",".join(f"{key}={name}" for key, name in experts_backend.items())
    options = Options(
        fusion, quant, kv_dtype, routing, all2all, dispatch, redundant_experts, placement, experts_backend,
        shared_expert_tp, external_shared_experts, dual_batch_overlap, mtp_depth, chunk_tokens,
    )
    return run(
        load_model(model), device_profile(device), load_engine(engine), layout, workload, options, allow_oversize
    )
