"""How far served times may be from the truth: the 80 % interval that every verb tells."""

from __future__ import annotations

import numpy as np

from tensorcast.cost.evidence import NORMAL_80
from tensorcast.serving.traffic import Number

SERVING_ERROR = {"ttft_s": 0.31, "tpot_s": 0.1}
"""Relative median error that the serving model adds to the steps' (scheduling, launch options that nobody recorded).
Set so that about four in five of the runs behind ``reports/serving.md`` lie in their intervals, on all of them, none
left out: the report says how many do."""


def served_interval(ttft_error: Number, tpot_error: Number, ttft_share: Number) -> dict[str, Number]:
    """By metric (``ttft_s, tpot_s, output_tokens_per_s``) the factor that four in five true values lie within: between
    ``value / factor`` and ``value * factor``.

    ``ttft_error, tpot_error``: relative median errors that kernels and engine overheads leave, as
    :class:`~tensorcast.serving.traffic.ServingMetrics` has them. ``ttft_share``: the first token's share of a
    request's time.
    """
    ttft = np.hypot(ttft_error, SERVING_ERROR["ttft_s"])
    tpot = np.hypot(tpot_error, SERVING_ERROR["tpot_s"])
    # a request's time is its first token's and the others', whose errors are independent
    request = np.hypot(ttft_share * ttft, (1 - ttft_share) * tpot)
    errors = {"ttft_s": ttft, "tpot_s": tpot, "output_tokens_per_s": request}
    return {metric: 1 + NORMAL_80 * error for metric, error in errors.items()}
