"""Why requests break limits, from Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorcast.api.replays import replay
from tensorcast.arguments import python_names
from tensorcast.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tensorcast.deploy.option_types import DeploymentOptions
    from tensorcast.predict.steady_limits import SteadyLimits
    from tensorcast.scheduling.outcome import Outcome
    from tensorcast.scheduling.requests import Requests


@python_names
def explain_limits(
    model: str,
    *,
    device: str,
    layout: str,
    requests: Requests | None = None,
    users: float | None = None,
    input_len: int = 4096,
    output_len: int = 1024,
    engine: str = "vllm",
    ttft_s: float | None = None,
    tpot_s: float | None = None,
    request_s: float | None = None,
    prefill_chunk: int | None = None,
    **options: Unpack[DeploymentOptions],
) -> Outcome | SteadyLimits:
    """Which limits are broken and why: the queue, the own prompt, others' prompts, decoding, or starting over.

    Of ``requests`` each, as :func:`replay` has it (``.broken()`` is a row per request and limit); or, of ``users`` who
    are always there, the means, in closed form, as :func:`compare` has them. ``layout`` as of :func:`replay`.

    >>> import tensorcast as tc
    >>> why = tc.explain_limits("deepseek-v3", device="h200", layout="4 x tp8-ep8", users=300, ttft_s=0.5)
    >>> why.broken, why.because("ttft_s")  # doctest: +SKIP
    """
    from tensorcast.deploy.model_names import named_model
    from tensorcast.deploy.options import served_options
    from tensorcast.predict.steady_limits import steady_limits
    from tensorcast.scheduling.outcome import Limits

    limits = Limits(ttft_s=ttft_s, tpot_s=tpot_s, request_s=request_s)
    if all(limit is None for limit in vars(limits).values()):
        raise InputError("limits: none is given; one of --ttft, --tpot and --e2e is needed")
    if (requests is None) == (users is None):
        raise InputError("limits: need a load, either requests (--trace, --rate) or --users who are always there")
    if requests is not None:
        return replay(
            model, device=device, layout=layout, requests=requests, engine=engine, ttft_s=ttft_s, tpot_s=tpot_s,
            request_s=request_s, prefill_chunk=prefill_chunk, **options,
        )
    assert users is not None
    return steady_limits(
        model, device, engine, layout, users=users, input_len=input_len, output_len=output_len, limits=limits,
        chunk_tokens=prefill_chunk, options=served_options(options, named_model(model)[0]),
    )
