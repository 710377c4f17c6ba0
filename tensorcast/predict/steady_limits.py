"""What breaks limits on a deployment under a steady load: means in closed form, and what they go into."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tensorcast.deploy.deployment import deploy
from tensorcast.deploy.options import Options
from tensorcast.errors import InputError
from tensorcast.predict.cells import layout_cells
from tensorcast.predict.run_columns import Run, read_run
from tensorcast.predict.serve_runs import engine_of, load_engine_once, load_profiles, serve
from tensorcast.scheduling.outcome import CAUSES, MAY_CAUSE, Limits
from tensorcast.serving.capacity import own_chunk
from tensorcast.serving.traffic import Traffic


@dataclass(frozen=True, kw_only=True)
class SteadyLimits:
    """Of one deployment: requests in flight, of which so many are ``decoding``, and the mean times of a request by the
    names of :class:`~tensorcast.scheduling.outcome.Limits`, seconds. ``parts``: by the same names, what these go into,
    by :data:`~tensorcast.scheduling.outcome.CAUSES`. A request waits in the queue for steps under way, prompts before
    its own, a place, front ends and hand-overs."""

    layout: str
    gpus: int
    concurrency: float
    decoding: float
    limits: Limits
    times: dict[str, float]
    parts: dict[str, dict[str, float]]

    @property
    def broken(self) -> list[str]:
        """Limits that the mean breaks."""
        limits = vars(self.limits)
        return [name for name, took in self.times.items() if limits[name] is not None and took > limits[name]]

    def because(self, name: str) -> str:
        """What the mean time of a limit goes into most."""
        return max(self.parts[name], key=self.parts[name].__getitem__)


def steady_limits(
    model: str, device: str, engine: str, layout: str, *, users: float, input_len: int, output_len: int,
    limits: Limits, chunk_tokens: int | None = None, options: Options = Options(),
) -> SteadyLimits:
    """``layout``: one name, such as ``2 x tp8 > dp8-ep8``, under ``users`` who are always there, as ``compare`` has it.
    Raises :class:`InputError` where they cannot be served."""
    row = {"model": model, "device": device, "engine": engine, "isl": input_len, "osl": output_len}
    run = read_run({**row, "concurrency": users, **layout_cells(layout)})
    run = replace(run, options=options, chunk_tokens=chunk_tokens, rounds=math.inf)
    (served,) = serve([run])
    if served.problem:
        raise InputError(f"layout {layout}: {served.problem}")
    steps = float(_traffic(run).decode_steps(options.mtp_depth))
    stages = run.prefill.pp  # which a prompt's chunks pass one behind another
    own = min(float(served.prefill_step_s) * (_chunks(run) + stages - 1) / stages, float(served.ttft_s))
    ttft, tpot = float(served.ttft_s), float(served.tpot_s)
    writes = max(output_len - 1, 1)
    decoding = min(float(served.decode_step_s) * steps / writes, tpot)
    first = {"queue": ttft - own, "own prompt": own}
    token = {"others' prompts": tpot - decoding, "decoding": decoding}
    whole = first | {cause: seconds * (output_len - 1) for cause, seconds in token.items()}
    return SteadyLimits(
        layout=layout, gpus=run.gpus, concurrency=users, limits=limits,
        decoding=float(served.batch) * run.decode.dp * run.workers[1] * run.replicas,
        times={"ttft_s": ttft, "tpot_s": tpot, "request_s": float(served.request_s)},
        parts=_ordered({"ttft_s": first, "tpot_s": token, "request_s": whole}),
    )


def _ordered(parts: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {
        name: {cause: found[cause] for cause in CAUSES if cause in found and cause in MAY_CAUSE[name]}
        for name, found in parts.items()
    }


def _traffic(run: Run) -> Traffic:
    return Traffic(run.isl, run.osl, run.concurrency, mtp_acceptance=run.mtp_acceptance)


def _chunks(run: Run) -> int:
    """Steps that a prompt is read in."""
    if run.chunk_tokens:
        return math.ceil(run.isl / run.chunk_tokens)
    model, device = load_profiles(run)
    engine = engine_of(run, load_engine_once(run.served_by))
    prefill = deploy(model, device, engine, run.prefill, "prefill", options=replace(run.options, mtp_depth=0))
    return math.ceil(run.isl / own_chunk(prefill))
