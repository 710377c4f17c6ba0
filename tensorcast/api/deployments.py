"""Deployments from Python: simulated, compared, explained. Heavy imports happen inside the calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tensorcast.arguments import python_names
from tensorcast.errors import InputError
from tensorcast.parallel import note, spread, uncollected

if TYPE_CHECKING:
    import pandas as pd
    from typing_extensions import Unpack

    from tensorcast.deploy.deployment import Deployment
    from tensorcast.deploy.expert_study import ExpertStudy
    from tensorcast.deploy.explain import Explanation
    from tensorcast.deploy.option_types import DeploymentOptions, SearchedOptions
    from tensorcast.deploy.result import Simulation
    from tensorcast.deploy.workload import Workload
    from tensorcast.profiles.device import DeviceProfile
    from tensorcast.scheduling.outcome import Outcome
    from tensorcast.search.compare import Comparison

    Noted = TypeVar("Noted", Simulation, Comparison, Explanation, Outcome, ExpertStudy)

def noted(found: Noted, *said: str) -> Noted:
    """``found`` with what is said, but for empty lines, among its notes."""
    return replace(found, notes=(*found.notes, *filter(None, said)))


def device_profile(name: str) -> DeviceProfile:
    """A device profile by name or path; ``cpu`` is this machine, measured at first use and cached."""
    if name.lower() == "cpu":
        from tensorcast.calibrate.constants.this_machine import host_profile

        return host_profile()
    from tensorcast.profiles.store import load_device

    return load_device(name)


def _what_holds(deployment: Deployment, workload: Workload) -> str:
    """:func:`tensorcast.search.smallest_cluster.what_holds`, with the whole search, where a model does not fit."""
    from tensorcast.search.smallest_cluster import what_holds

    return what_holds(deployment, workload)


@python_names
def simulate(
    model: str,
    *,
    device: str,
    world_size: int | None = None,
    tp: int | None = None,
    dp: int = 1,
    ep: int = 1,
    pp: int = 1,
    phase: str = "decode",
    batch: int = 1,
    input_len: int | None = None,
    context: int | None = None,
    engine: str = "vllm",
    pooled: bool = False,
    allow_oversize: bool = False,
    **options: Unpack[DeploymentOptions],
) -> Simulation:
    """Simulate one step of ``model`` on ``world_size`` of ``device``.

    ``model``, ``device`` and ``engine`` are names, or paths of profiles; a model may be a directory with a Hugging
    Face ``config.json``, or a shipped one's checkpoint by a name that says its precision. ``batch`` counts sequences
    per data-parallel rank. ``tp`` defaults to what dp and pp leave, ``world_size`` to what they make. Decode defaults
    to ``context=4096`` cached tokens, prefill to ``input_len=4096`` new ones. ``pooled``: on a server of one phase, as
    disaggregated serving has them, whose memory and cache engines lay out otherwise. ``options`` are the fields of
    :class:`tensorcast.deploy.options.Options`: ``quant``, ``kv_dtype``, ``routing``, ``all2all``, ``mtp_depth``, ...
    Raises :class:`tensorcast.InputError`, one line, on anything that cannot be.

    >>> import tensorcast as tc
    >>> run = tc.simulate("deepseek-v3", device="h200", world_size=32, dp=32, ep=32, batch=128)  # doctest: +SKIP
    >>> run.step_s, run.ops.head()  # doctest: +SKIP
    """
    from tensorcast.deploy.layout import Layout
    from tensorcast.deploy.model_names import named_model
    from tensorcast.deploy.options import of_traffic, options_of
    from tensorcast.deploy.simulate import simulate as run
    from tensorcast.deploy.workload import Workload
    from tensorcast.profiles.store import load_engine

    if dp < 1 or pp < 1:
        raise InputError(f"layout: dp = {dp} and pp = {pp} must be at least 1")
    each = tp or 1 if world_size is None else max(1, world_size // (dp * pp)) if tp is None else tp
    layout = Layout(each * dp * pp if world_size is None else world_size, each, dp, ep, pp)
    default_new, default_past = (1, 4096) if phase == "decode" else (4096, 0)
    new, past = default_new if input_len is None else input_len, default_past if context is None else context
    profile, read_as = named_model(model)
    alone = load_engine(engine)
    served = alone.in_pools() if pooled else alone
    parts = profile, device_profile(device), served, layout, Workload(phase, batch, new, past)
    chosen = of_traffic(options_of(options), profile)
    found = run(*parts, options=chosen, allow_oversize=allow_oversize, enough=_what_holds)
    longer = float(served.overhead.pool_factor) if pooled and phase == "decode" else 1.0
    apart = f"in pools decode steps take {longer:.2f} times as long, which is not in here" if longer > 1 else ""
    return noted(found, read_as, apart)


@python_names
def compare(
    model: str,
    *,
    device: str | Sequence[str],
    world_size: int | Sequence[int],
    input_len: int,
    output_len: int,
    ttft_s: float | None = None,
    tpot_s: float | None = None,
    objective: str = "tokens_per_gpu",
    engine: str | Sequence[str] = "vllm",
    layouts: Sequence[str] | None = None,
    modes: Sequence[str] = ("aggregated", "disaggregated"),
    request_rate: float | None = None,
    users: int | None = None,
    budget: float | None = None,
    confidence: float | None = None,
    prices: Mapping[str, float] | None = None,
    prefix_cached: int = 0,
    mtp_acceptance: float | str = 0.8,
    full: bool = False,
    runnable_only: bool = True,
    jobs: int = 1,
    executor: str | None = None,
    decode_device: str | None = None,
    decode_world_size: int | None = None,
    images_per_request: int | None = None,
    image_size: str | None = None,
    encoder_tp_mode: str | None = None,
    **options: Unpack[SearchedOptions],
) -> Comparison:
    """Compare every legal layout of ``model`` on ``world_size`` of ``device``, with every option that matters.

    Users send prompts of ``input_len`` tokens (``prefix_cached`` of them cached) and read ``output_len``; ``ttft_s``
    and ``tpot_s`` are the longest mean time to first token and per output token that they accept. ``objective``:
    ``tokens_per_gpu``, ``throughput`` and ``users`` (most of all GPUs), ``latency``, ``cost`` (of ``prices``, US
    dollars per GPU hour by device) or ``gpus`` (fewest that serve what is asked). ``request_rate`` and ``users`` are
    the least requests per second and in flight that must be served, ``budget`` the most US dollars per hour; with a
    ``confidence`` such as 0.8 each limit must be kept with that chance, and lower bounds decide. ``device``, ``engine``
    and ``world_size`` may be several. ``layouts``: only these, such as ``tp8-ep8``. ``options``: ``quant``,
    ``state_dtype``, ``routing`` (typical unless said), ``placement`` and whose ``experts_kernels`` and
    ``attention_kernels`` run hold for all; of ``kv_dtype``, ``mtp_depth``,
    ``all2all``, ``dispatch``, ``combine`` and ``chunk_tokens`` the given values alone are searched; ``full`` also
    searches KV dtypes and depths of drafting. ``runnable_only``: only what ``engine`` can run. ``mtp_acceptance``:
    chance that a drafted token is accepted, or a task of published tables. ``decode_device``: of pools alone that read
    prompts on ``device``; ``world_size`` is of both, beside a ``decode_world_size`` of ``device`` alone.
    ``images_per_request`` of ``image_size`` (``"1280x720"``) come with every prompt, their tokens beside ``input_len``;
    their tower is cut over a server's ``tp`` ranks, or whole on each (``encoder_tp_mode="data"``): docs/vision.md.

    Raises :class:`tensorcast.InputError` on what cannot be: with ``exit_code`` 3 where no layout keeps the limits, the
    message saying which one binds and how close the best came.

    >>> import tensorcast as tc
    >>> found = tc.compare("deepseek-v3", device="h200", world_size=32, input_len=4096, output_len=1024,
    ...                    ttft_s=2, tpot_s=0.05)  # doctest: +SKIP
    >>> found.best["layout"], found.best["tokens_per_s_per_gpu"]  # doctest: +SKIP
    """
    question = dict(locals())
    with uncollected():  # modules that are read leave no garbage
        from tensorcast.deploy.model_names import named_model
        from tensorcast.deploy.options import SERVED_ROUTING
        from tensorcast.profiles.store import load_engine
        from tensorcast.search.compare import compare as decide
        from tensorcast.search.search import search
        from tensorcast.search.search_task import SEARCHED, search_tasks

    devices = [device] if isinstance(device, str) else list(device)
    images, said = None, (images_per_request, image_size, encoder_tp_mode)
    if any(said):
        from tensorcast.serving.encoder import prompt_images

        images = prompt_images(*said)
    profile, read_as = named_model(model)
    tasks = search_tasks(
        profile, [device_profile(name) for name in devices],
        [load_engine(name) for name in ([engine] if isinstance(engine, str) else engine)],
        [world_size] if isinstance(world_size, int) else list(world_size),
        input_len=input_len, output_len=output_len, prefix_cached=prefix_cached, mtp_acceptance=mtp_acceptance,
        ttft_s=ttft_s, tpot_s=tpot_s, objective=objective, layouts=layouts, modes=modes, request_rate=request_rate,
        users=users, budget=budget, confidence=confidence,
        prices={device_profile(name).name: value for name, value in (prices or {}).items()},
        full=full, runnable_only=runnable_only, quant=options.get("quant"), state_dtype=options.get("state_dtype"),
        routing=options.get("routing", SERVED_ROUTING), placement=options.get("placement", "linear"),
        speculative_method=options.get("speculative_method", "mtp"), draft_model=options.get("draft_model"),
        pp_partition=options.get("pp_partition"), experts_kernels=options.get("experts_kernels", "engine"),
        attention_kernels=options.get("attention_kernels", "engine"),
        searched={axis: dict[str, Any](options).get(name) for axis, name in SEARCHED.items()},
        decode_device=None if decode_device is None else device_profile(decode_device), decode_gpus=decode_world_size,
        images=images,
    )  # fmt: skip
    found = noted(decide(tasks, spread(search, tasks, jobs, executor)), read_as, note(len(tasks), jobs, executor))
    return replace(found, question=question)


@python_names
def explain(
    model: str,
    *,
    device: str,
    world_size: int,
    layout: str,
    versus: str,
    phase: str = "decode",
    batch: int | None = None,
    context: int | None = None,
    input_len: int | None = None,
    engine: str = "vllm",
    **options: Unpack[DeploymentOptions],
) -> Explanation:
    """Two layouts side by side at the same load: which groups of ops moved and why, and what would help each.

    Of several servers (``2 x tp8``) one is looked at, of pools (``tp8 > dp8-ep8``) the one that the phase is for.
    ``batch`` counts sequences per data-parallel rank of ``layout``; ``versus`` gets as many in all. By default it is
    the largest that fits in both. Decode defaults to ``context=4096`` cached tokens, prefill to ``input_len=4096`` new.
    ``options``, as of :func:`simulate`, hold for both, as far as they apply to ``versus``; ``routing`` is typical
    unless said.

    >>> import tensorcast as tc
    >>> why = tc.explain("deepseek-v3", device="h200", world_size=32, layout="tp1-dp32-ep32",
    ...                  versus="tp8-dp4-ep32")  # doctest: +SKIP
    >>> why.groups, why.elasticities  # doctest: +SKIP
    """
    from tensorcast.deploy.explain import explain as run
    from tensorcast.deploy.model_names import named_model
    from tensorcast.deploy.options import served_options
    from tensorcast.profiles.store import load_engine
    from tensorcast.scheduling.pools import layout_for

    gpu, (profile, read_as) = device_profile(device), named_model(model)
    one, other = (layout_for(phase, name, world_size, gpu) for name in (layout, versus))
    new, past = (1, 4096) if phase == "decode" else (4096, 0)
    new, past = new if input_len is None else input_len, past if context is None else context
    found = run(
        profile, gpu, load_engine(engine), one, versus=other, phase=phase, batch=batch, new=new, past=past,
        options=served_options(options, profile),
    )
    return noted(found, read_as)


@python_names
def experts(
    model: str,
    *,
    device: str,
    world_size: int,
    layout: str,
    phase: str = "decode",
    batch: int | None = None,
    context: int | None = None,
    input_len: int | None = None,
    engine: str = "vllm",
    copies: Sequence[int] | None = None,
    others: Sequence[str] = (),
    log: str | None = None,
    **options: Unpack[DeploymentOptions],
) -> ExpertStudy:
    """What balancing experts would bring a layout, by recorded routing.

    ``routing`` is the recording, ``recorded:FILE`` or ``recorded:NAME`` (``recorded:deepseek-r1`` unless said).
    ``copies``: redundant experts to try. ``others``: recordings by which the placement might have been made instead.
    ``log``: a server's log, whose balancedness is set beside. The rest as of :func:`explain`; ``batch`` is the most
    that fits in all placements unless given.

    >>> import tensorcast as tc
    >>> found = tc.experts("deepseek-r1", device="h200", world_size=32, layout="dp32-ep32",
    ...                    engine="sglang")  # doctest: +SKIP
    >>> found.best.copies, found.gain, found.after.max(axis=1)  # doctest: +SKIP
    """
    from tensorcast.cost.recordings.formats import read_balancedness
    from tensorcast.deploy.expert_study import expert_study
    from tensorcast.deploy.layout import parse_layout
    from tensorcast.deploy.model_names import named_model
    from tensorcast.deploy.options import options_of
    from tensorcast.profiles.store import load_engine

    new, past = (1, 4096) if phase == "decode" else (4096, 0)
    logged = () if log is None else tuple(one.balancedness for one in read_balancedness(Path(log)))
    profile, read_as = named_model(model)
    found = expert_study(
        profile, device_profile(device), load_engine(engine), parse_layout(layout, world_size), phase=phase,
        new=new if input_len is None else input_len, past=past if context is None else context, batch=batch,
        options=options_of({"routing": "recorded:deepseek-r1", **options}), copies=copies, others=others,
    )
    return noted(replace(found, logged=logged), read_as)


def predict_kernels(frame: pd.DataFrame, *, device: str, engine: str | None = None) -> pd.DataFrame:
    """Kernel times of a frame of shapes: see :func:`tensorcast.cost.kernels.frames.predict_kernels`.

    >>> import pandas as pd, tensorcast as tc
    >>> rows = pd.DataFrame({"family": ["gemm"], "m": [64], "n": [7168], "k": [2048], "dtype": ["fp8_block"]})
    >>> tc.predict_kernels(rows, device="h200", engine="sglang")["seconds"]  # doctest: +SKIP
    """
    from tensorcast.cost.kernels.frames import predict_kernels as predict

    return predict(frame, device=device, engine=engine)
