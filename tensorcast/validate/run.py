"""One validation: what to measure, at which sizes, in which order; measured beside predicted as plain tables."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorcast.calibrate.constants.errors import median_error
from tensorcast.cost.collectives import collective_time
from tensorcast.deploy.deployment import Deployment, deploy
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.options import Options
from tensorcast.deploy.workload import Workload
from tensorcast.errors import InputError
from tensorcast.measure import environment as env
from tensorcast.measure.store import PARTIAL, Store, key_of, works_from
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.engine import EngineProfile
from tensorcast.profiles.model import ModelProfile, text_of
from tensorcast.validate.beside_measured import add_predictions

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from tensorcast.measure.replay import Templates

POINTS = {
    "cpu": {"decode": ((1, 3, 8, 24, 64), 512), "prefill": ((32, 128, 400), 0)},
    "cuda": {"decode": ((1, 8, 32, 128, 512), 4096), "prefill": ((256, 1024, 4096, 16384), 0)},
}
"""Where nothing else is asked: (batches of decode, their context), (prompt lengths of prefill, their context)."""

BACKEND = "prefill=grouped_mm,decode=grouped_mm"
"""Experts as one grouped GEMM in both phases: the package's own kernel."""

LISTS = (
    "layer_types", "mlp_layer_types", "no_rope_layers", "compress_ratios", "num_attention_heads_per_layer",
    "layers_block_type", "hybrid_override_pattern",
)
"""Lists and words of a config with one entry per layer."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Validation:
    """What was measured beside what was predicted. Frames have units in their column names."""

    title: str
    environment: dict[str, str]
    ops: pd.DataFrame
    layers: pd.DataFrame
    collectives: pd.DataFrame
    checks: pd.DataFrame
    fits: pd.DataFrame
    left_out: pd.DataFrame
    notes: tuple[str, ...]
    device: DeviceProfile
    calibrated: DeviceProfile | None = None

    def measurements(self) -> pd.DataFrame:
        """Everything that a calibration reads, one row per measurement."""
        import pandas as pd

        parts = [frame for frame in (self.ops, self.collectives) if len(frame)]
        frame = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
        said = {"device": self.environment.get("device", ""), "torch": self.environment.get("torch", ""),
                "date": self.environment.get("date", "")}
        return frame.assign(**said)


@dataclass
class Request:
    """What is asked for. ``phase`` None: both. ``layers`` 0: ops of the whole model, one layer per kind end to end."""

    model: ModelProfile
    device: DeviceProfile
    engine: EngineProfile
    tp: int = 1
    dp: int = 1
    ep: int = 1
    phase: str | None = None
    batch: Sequence[int] = ()
    input_len: Sequence[int] = ()
    context: int | None = None
    layers: int = 0
    quant: str | None = None
    shrink: bool = False
    effort: float = 1.0
    end_to_end: bool = True
    sizes: Sequence[int] = ()
    out: Path | None = None
    say: Say = field(default=lambda text: None)

    @property
    def device_type(self) -> str:
        """``cpu`` for this machine's own profile, else ``cuda``."""
        return "cpu" if self.device.name == "cpu" else "cuda"

    def workloads(self) -> list[Workload]:
        """Every phase and size to measure."""
        found = []
        for phase in ("decode", "prefill") if self.phase is None else (self.phase,):
            counts, past = POINTS[self.device_type][phase]
            past = past if self.context is None else self.context
            if phase == "decode":
                found += [Workload(phase, b, 1, past) for b in self.batch or counts]
            else:
                lengths = self.input_len or counts
                found += [Workload(phase, b, n, past) for b in self.batch or (1,) for n in lengths]
        return found


def cut(model: ModelProfile, layers: int) -> ModelProfile:
    """The model's first ``layers`` layers."""
    config = copy.deepcopy(model.config)
    text = text_of(config)
    name = next((n for n in ("num_hidden_layers", "n_layers", "n_layer") if n in text), None)
    if name is None:
        own = f"; of a class of one's own set its argument ({', '.join(text)})" if model.model else ""
        raise InputError(f"--layers {layers}: no field of {model.name}'s config is known as its number of layers{own}")
    if not 1 <= layers <= text[name]:
        raise InputError(f"--layers {layers}: {model.name} has {text[name]} layers")
    for key in LISTS:
        if isinstance(text.get(key), list | str) and len(text[key]) == text[name]:
            text[key] = text[key][:layers]
    if isinstance(text.get("mlp_only_layers"), list):
        text["mlp_only_layers"] = [i for i in text["mlp_only_layers"] if i < layers]
    text[name] = layers
    return model.model_copy(update={"config": config})


def torch_device(request: Request) -> torch.device:
    """Where kernels run. Raises :class:`InputError` where the machine has no such device."""
    import torch

    if request.device_type == "cpu":
        from tensorcast.measure.environment import threads

        torch.set_num_threads(threads())
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(f"--device {request.device.name}: this machine has no CUDA device to run kernels on; use cpu")
    return torch.device("cuda", torch.cuda.current_device())


def validate(request: Request) -> Validation | None:
    """Measure, predict, compare. Under torchrun every rank must call it; ranks above 0 get None.

    With ``request.out`` measurements are kept there as they come, and a run that was interrupted goes on from them.
    """
    import pandas as pd

    device = torch_device(request)
    collectives: list[dict[str, Any]] = []
    ranks = env.launched()
    if ranks > 1:
        collectives, rank = _in_parallel(request, device)
        if rank > 0:
            return None
    found = env.environment(device.type)
    crowding = env.Crowding(int(found.get("threads", "1")))
    store = Store(request.out / PARTIAL if request.out else None)
    notes = [] if ranks > 1 else ["Collectives were not measured: one process. Run under torchrun to measure them."]
    ops, layers, checks = _measure(request, device, store, env.fingerprint(found), notes)
    found["other processes"] = f"took {crowding.share:.0%} of the cores that were wanted"
    found["device profile"] = request.device.sources.get("host", request.device.name)
    result = Validation(
        title=f"{request.model.name} on {found['device']}", environment=found, ops=pd.DataFrame(ops),
        layers=pd.DataFrame(layers), collectives=pd.DataFrame(collectives), checks=pd.DataFrame(checks),
        fits=pd.DataFrame(), left_out=pd.DataFrame(), notes=tuple(notes), device=request.device,
    )
    store.finish()
    return _with_fits(result, request)


def _deployment(request: Request, model: ModelProfile, phase: str) -> Deployment:
    layout = Layout(request.tp * request.dp, request.tp, request.dp, request.ep, 1)
    options = Options(quant=request.quant)
    try:
        own = replace(options, experts_backend=BACKEND)
        return deploy(model, request.device, request.engine, layout, phase, options=own)
    except InputError as reason:
        if "no experts" not in str(reason):
            raise
        return deploy(model, request.device, request.engine, layout, phase, options=options)


def _measure(
    request: Request, device: torch.device, store: Store, belongs: str, notes: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the op level, of the layer and step level, and of the comparison with transformers."""
    from tensorcast.measure.operands import Buffers
    from tensorcast.measure.ops import OpRunner, record, rows_of

    model = cut(request.model, request.layers) if request.layers else request.model
    deployments = {phase: _deployment(request, model, phase) for phase in {w.phase for w in request.workloads()}}
    runner = OpRunner(device, Buffers(device), store, belongs, request.effort)
    ops: list[dict[str, Any]] = []
    watch = _watcher(request, model)
    every = {w: rows_of(deployments[w.phase], w, watch) for w in request.workloads()}
    if not request.shrink:
        from tensorcast.measure.operands import free_bytes
        from tensorcast.measure.ops import check_memory

        check_memory([row for rows in every.values() for row in rows], free_bytes(device))
    for workload, rows in every.items():
        def say(text: str, at: Workload = workload) -> None:
            request.say(f"{at.phase} batch {at.batch}, {text}")

        for row, at, measured in runner.run(rows, request.shrink, say):
            ops.append(record(row, at, measured))
            pricer = deployments[workload.phase].step.pricer
            priced = pricer.seconds(row.op, at, pricer.works(row.op, at, pricer.corrections))
            add_predictions(ops[-1], priced, works_from(ops[-1]["works"]), device.type)
    runner.buffers = None  # type: ignore[assignment]  # its pools' memory, for the layers
    layers, checks = _end_to_end(
        request, model, deployments, device, store, belongs=belongs, ops=ops, notes=notes
    )
    return ops, layers, checks


def _watcher(request: Request, model: ModelProfile) -> Callable[[Workload], Templates]:
    """How small ops are called at a workload's sizes; the meta model is built once."""
    from tensorcast.measure.replay import watch_step
    from tensorcast.modeling.build import build
    from tensorcast.modeling.config import hf_config, narrow

    config = narrow(hf_config(model), request.tp)
    meta = build(config)
    return lambda w: watch_step(meta, config, w.phase, w.batch, new=w.input_len, past=w.context)


def _end_to_end(
    request: Request, model: ModelProfile, deployments: dict[str, Deployment], device: torch.device, store: Store,
    *, belongs: str, ops: list[dict[str, Any]], notes: list[str],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Layers and the step, and the rewritten layers against transformers' own; a note says why not, where not."""
    from tensorcast.validate.end_to_end import check_rows, layer_rows

    if not request.end_to_end:
        return [], []
    any_phase = next(iter(deployments.values()))
    if request.tp * request.dp > 1:
        notes.append("Layers were not run end to end: this is one rank's shard. Under torchrun the MoE layer is.")
        return [], []
    kinds = any_phase.raw.layer_kinds
    needed = max(kinds.index(kind) for kind in set(kinds)) + 1
    small = cut(model, needed) if needed < len(kinds) and not model.model else model
    problem: list[str] = []
    checks = check_rows(small, any_phase.raw, device, store, belongs=belongs, problem=problem, say=request.say)
    layers = layer_rows(
        small, any_phase.raw, request.workloads(), device, store, belongs=belongs, ops=ops,
        effort=request.effort, problem=problem, say=request.say,
    )
    if any(d.quantization.linear.name != "bf16" or d.quantization.experts.name != "bf16" for d in deployments.values()):
        problem.append("Layers run in bf16 end to end, whatever the quantisation of the ops above.")
    notes += problem
    return layers, checks


def _in_parallel(request: Request, device: torch.device) -> tuple[list[dict[str, Any]], int]:
    """Collectives and the expert-parallel layer on all ranks of torchrun."""
    from tensorcast.measure import collectives as c
    from tensorcast.measure.moe_layer import random_block

    with c.process_group(device) as (rank, ranks):
        repeats = max(3, round(c.REPEATS * request.effort))
        rows = c.measure_collectives(device, request.sizes or c.SIZES, repeats)
        for row in rows:
            if not row["problem"]:
                time = collective_time(row["op"], row["payload_bytes"], (ranks,), request.device, custom=False)
                row |= {"predicted_s": float(time.seconds), "evidence": time.evidence,
                        "error": float(time.seconds) / row["seconds"] - 1.0}
        rows = [{**row, "works": "[]", "key": key_of("collective", row["op"], row["shape"])} for row in rows]
        import torch

        torch.manual_seed(0)  # every rank draws the same weights
        with contextlib.suppress(InputError):  # a model without experts
            dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
            block, hidden = random_block(request.model, dtype, device)
            tokens = sorted({w.batch * w.input_len for w in request.workloads()})
            ep = request.ep if request.ep > 1 else ranks
            rows += c.measure_expert_parallel(block, request.tp, ep, tokens, hidden, repeats=repeats)
        return rows, rank


def _with_fits(result: Validation, request: Request) -> Validation:
    """The result with the constants that its measurements would give, and their error on shapes left out."""
    from tensorcast.calibrate.constants import from_validation as cal

    frame = result.measurements()
    if not len(frame):
        return result
    before = cal.left_out_errors(frame, request.device, request.engine.name)
    try:
        device, fits = cal.calibrate(request.device, frame, request.engine.name)
    except InputError as reason:
        return replace(result, notes=(*result.notes, f"Calibration: {reason}."))
    after = cal.left_out_errors(frame, device, request.engine.name)
    left_out = before.rename(columns={"error": "error_before"}).assign(error=after.error)
    return replace(result, fits=cal.fits_frame(fits), left_out=left_out, calibrated=device)


def summary(result: Validation) -> dict[str, Any]:
    """The few numbers to print: ops, failures, median error, and before and after calibration on shapes left out."""
    ops = result.ops.drop_duplicates("key") if len(result.ops) else result.ops
    measured = ops[ops.problem == ""] if len(ops) else ops
    found: dict[str, Any] = {"ops": len(ops), "measured": len(measured)}
    if len(measured):
        found["median_error"] = median_error(measured.error)
    if len(result.left_out):
        found["left_out"] = len(result.left_out)
        found["left_out_before"] = median_error(result.left_out.error_before)
        found["left_out_after"] = median_error(result.left_out.error)
    if len(result.checks):
        found["relative_error"] = float(result.checks.relative_error.max())
    return found
