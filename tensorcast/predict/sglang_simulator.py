"""Our step times under SGLang's real scheduler: a predictor for SGLang's simulator.

SGLang's simulator (``tools/sglang-simulator`` of its repository; not on PyPI) runs the engine's own scheduler and asks
an ``InferTimePredictor`` what every batch takes. :func:`install` adds one by the name ``tensorcast`` to those that it
knows, so that its configuration file may say::

    "predictor": {"name": "tensorcast", "model": "qwen3-235b-a22b", "device": "h200", "kv_dtype": "fp8"}

``model`` and ``device`` as in ``tensorcast simulate``, ``engine`` by default ``sglang``, ``most_sequences`` per
data-parallel rank by default 512; the rest are options of a deployment. The layout is the host's: ``tp_size`` counts
all ranks of a stage, as SGLang's does. Its scheduler may be spawned: ``install()`` is then called in a
``sitecustomize.py`` on ``PYTHONPATH``. Host modules are imported by :func:`install` alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

from tensorcast.deploy.deployment import deploy
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.model_names import named_model
from tensorcast.deploy.options import served_options
from tensorcast.errors import InputError
from tensorcast.profiles.store import load_device, load_engine
from tensorcast.scheduling.step_times import step_times

NAME = "tensorcast"
HOST = "sglang_simulator"
MOST_SEQUENCES = 512
LONGEST = 1 << 17
"""Tokens of the longest sequence where a model does not say."""


class HostRequest(Protocol):
    """A request of a batch: new tokens of this step, and tokens that are cached."""

    extend_length: int
    past_kv_length: int


class HostBatch(Protocol):
    """A batch that the host's scheduler has composed."""

    @property
    def reqs(self) -> Sequence[HostRequest]:
        """Requests of one data-parallel rank."""
        ...

    def is_decode(self) -> bool:
        """Whether every request makes one token."""
        ...


class StepTimePredictor:
    """Seconds of a batch, from tables that are priced once. Has the methods of the host's ``InferTimePredictor``.

    ``said``: the predictor's section of the host's configuration, without its name. Raises :class:`InputError`.
    """

    name = NAME

    def __init__(self, model: Any, hw: Any, config: Any, /, **said: Any) -> None:
        self.model, self.hw, self.config = model, hw, config
        wanted, device = said.pop("model", None), said.pop("device", None) or getattr(hw, "name", None)
        if not wanted or not device:
            lacking = "model" if not wanted else "device"
            raise InputError(f"predictor {NAME}: its section must name a {lacking}, as in tensorcast simulate")
        engine = load_engine(said.pop("engine", "sglang"))
        most = float(said.pop("most_sequences", MOST_SEQUENCES))
        profile, _ = named_model(str(wanted))
        layout = layout_of(config)
        options = served_options(said, profile)
        prefill, decode = (
            deploy(profile, load_device(str(device)), engine, layout, phase, options=options)
            for phase in ("prefill", "decode")
        )
        self._stages = layout.pp  # of each of which tables have the time
        chunk = engine.tokens_per_step(prefill.device, layout.dp, prefill.step.plan.all2all)
        self._times = step_times(
            prefill, decode, most_sequences=most, chunk_tokens=chunk, longest=profile.max_positions or LONGEST
        )

    def predict_infer_time(self, batch: HostBatch) -> float:
        """Seconds of a batch of one data-parallel rank; the others are taken to have as many tokens."""
        if not batch.reqs:
            return 0.0
        decoding = [r for r in batch.reqs if batch.is_decode() or r.extend_length <= 1]
        prompts = [(r.extend_length, r.past_kv_length) for r in batch.reqs if r not in decoding]
        context = sum(r.past_kv_length for r in decoding) / max(1, len(decoding))
        if not prompts:
            return self._stages * self._times.decoding(len(decoding), context, len(decoding))
        beside = len(decoding) * self._times.tokens_each
        tokens = sum(new for new, _ in prompts) + beside
        times, ends = self._times, self._times.seen_at_ends(prompts, beside)
        return self._stages * (times.own(prompts, len(decoding), context) + times.shared(tokens, beside, ends))

    def get_metrics(self) -> dict[str, Any]:
        """Nothing: predictions count nothing."""
        return {}

    def reset_metrics(self) -> None:
        """Nothing to forget."""


def layout_of(config: Any) -> Layout:
    """The layout of a host's ``SchedulerConfig``. Raises :class:`InputError` for what is not modelled."""
    sizes = {name: int(getattr(config, f"{name}_size", 1) or 1) for name in ("tp", "dp", "ep", "pp", "cp")}
    ranks, dp = sizes["tp"], sizes["dp"]
    if sizes["cp"] > 1:
        raise InputError(f"predictor {NAME}: cp_size = {sizes['cp']}: attention context parallelism is not modelled")
    if ranks % dp:
        raise InputError(f"predictor {NAME}: tp_size = {ranks} counts all ranks, dp_size = {dp} must divide it")
    return Layout(ranks * sizes["pp"], tp=ranks // dp, dp=dp, ep=sizes["ep"], pp=sizes["pp"])


def install() -> None:
    """Let the host's configuration name this predictor. Raises :class:`InputError` where the host is not installed."""
    try:
        manager = importlib.import_module(f"{HOST}.simulation.manager.config").ConfigManager
        base = importlib.import_module(f"{HOST}.time_predictor.base").InferTimePredictor
    except ImportError as reason:
        raise InputError(f"SGLang's simulator is not installed ({reason}): see tools/sglang-simulator there") from None
    theirs = manager.get_inference_time_predictor
    if getattr(theirs, "of", None) == NAME:
        return
    base.register(StepTimePredictor)

    def chosen(cls: Any, model: Any, hw: Any, sched_config: Any) -> Any:
        section = dict(cls._get_raw_config().get("predictor", {}))
        if section.pop("name", None) != NAME:
            return theirs(model, hw, sched_config)
        return StepTimePredictor(model, hw, sched_config, **section)

    chosen.of = NAME  # type: ignore[attr-defined]
    manager.get_inference_time_predictor = classmethod(chosen)
