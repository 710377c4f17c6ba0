"""How far served times may be from the truth: the 80 % interval that every verb tells."""

from __future__ import annotations

import numpy as np

from tensorcast.cost.evidence import NORMAL_80
from tensorcast.profiles.engine import AXES, EngineProfile
from tensorcast.serving.traffic import Number

SERVING_ERROR = {"ttft_s": 0.2, "tpot_s": 0.06}
"""Relative median error that the serving model adds to the steps' (scheduling, launch options that nobody recorded), of
engines without runs that say it: with it four in five public runs lay in their intervals. ``make engines`` sets those
with runs so that of the models and devices that are left out of the fits in turn four in five runs do
(:func:`tensorcast.calibrate.engines.left_out.serving_errors`)."""

POOLS_ERROR = {"ttft_s": 0.4, "tpot_s": 0.1}
"""The same of pools of prefill and decode servers, set on the disaggregated runs there: what launchers do between pools
(routers, hand-overs, queues of either) is recorded of none of them."""


def served_interval(
    ttft_error: Number, tpot_error: Number, ttft_share: Number, *, engine: EngineProfile, pools: bool = False,
    new: int = AXES,
) -> dict[str, Number]:
    """By metric (``ttft_s, tpot_s, output_tokens_per_s``) the factor that four in five true values lie within: between
    ``value / factor`` and ``value * factor``.

    ``ttft_error, tpot_error``: relative median errors that kernels and engine overheads leave, as
    :class:`~tensorcast.serving.traffic.ServingMetrics` has them. ``ttft_share``: the first token's share of a
    request's time. ``engine``: whose scheduler serves. ``pools``: prompts and replies are served by a pool each.
    ``new``: how many of model, device and release are others than those of runs that it was fitted to
    (:func:`unserved`).
    """
    own = POOLS_ERROR if pools else SERVING_ERROR | (engine.fitted.beside_steps(new) if engine.fitted else {})
    ttft, tpot = np.hypot(ttft_error, own["ttft_s"]), np.hypot(tpot_error, own["tpot_s"])
    # a request's time is its first token's and the others', whose errors are independent
    request = np.hypot(ttft_share * ttft, (1 - ttft_share) * tpot)
    errors = {"ttft_s": ttft, "tpot_s": tpot, "output_tokens_per_s": request}
    return {metric: 1 + NORMAL_80 * error for metric, error in errors.items()}


def unserved(engine: EngineProfile, model: str, device: str) -> int:
    """Of model, device (profiles' names) and the release of ``engine`` how many are others than those of the nearest
    runs that it was fitted to."""
    return AXES if engine.fitted is None else engine.fitted.unserved(model, device, engine.version)
