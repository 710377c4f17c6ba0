"""The result of a simulation: typed totals, and every row of the step as a record or a pandas frame."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tensorcast.cost.evidence import interval
from tensorcast.deploy.engine_log import CacheLog, cache_log
from tensorcast.deploy.exchange_kernels import EXCHANGE_KERNELS
from tensorcast.deploy.plan.plan import Collective, Row
from tensorcast.deploy.step.price import RowPrice, StepPrice
from tensorcast.deploy.workload import Workload
from tensorcast.trace.table import Op

if TYPE_CHECKING:
    import pandas as pd

    from tensorcast.cost.memory import Memory
    from tensorcast.deploy.deployment import Deployment


@dataclass(frozen=True)
class Simulation:
    """The result of :func:`simulate`: typed totals, and the op table as a pandas frame."""

    deployment: Deployment
    workload: Workload
    price: StepPrice
    memory: Memory
    largest_batch: int
    notes: tuple[str, ...] = field(default=())

    @property
    def log(self) -> CacheLog:
        """What the engine would log of its cache, for the longest request that the model can take."""
        longest = self.deployment.model.max_positions
        return cache_log(self.deployment, longest or self.workload.length)

    @property
    def step_s(self) -> float:
        """Seconds of one step."""
        return float(self.price.seconds)

    @property
    def interval_s(self) -> tuple[float, float]:
        """Ends of an 80 % interval of the step time, from the errors of its kernels and of the engine's overhead."""
        return interval(self.step_s, float(self.price.error))

    @property
    def tokens(self) -> int:
        """New tokens that one step makes or reads, over all GPUs."""
        return self._sequences * self.workload.input_len

    @property
    def _sequences(self) -> int:
        """Of all data-parallel ranks, or of all groups that read prompts together."""
        d = self.deployment
        return self.workload.batch * d.layout.dp // (d.options.pcp if self.workload.phase == "prefill" else 1)

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.tokens / self.step_s / self.deployment.layout.world_size

    @property
    def mfu(self) -> float:
        """Share of the step in which one GPU's useful arithmetic would be done at the peak rate of its dtype."""
        return self._sum("ideal_compute_s") / self._passes / self.step_s

    @property
    def bandwidth_use(self) -> float:
        """Share of the device's memory bandwidth that one GPU uses over the step."""
        bandwidth = float(self.deployment.device.memory_bandwidth_bytes_per_s)
        return self._sum("bytes") / self._passes / bandwidth / self.step_s

    @property
    def _passes(self) -> float:
        """Rows are counted over all pipeline stages for one micro-batch; a GPU runs one stage for all of them."""
        return self.deployment.layout.pp / float(self.price.micro_batches)

    @property
    def _calls(self) -> list[tuple[RowPrice, int]]:
        """Rows, and how often each runs."""
        return [(p, int(n)) for p, n in self.price.calls]

    def _sum(self, name: str) -> float:
        return sum(float(getattr(p, name)) * n for p, n in self._calls)

    def time_by(self, key: str) -> dict[str, float]:
        """Kernel seconds over the step by ``evidence``, ``family`` or ``bound``."""
        found: dict[str, float] = {}
        for price, n in self._calls:
            name = bound(price) if key == "bound" else str(getattr(price, key))
            found[name] = found.get(name, 0.0) + float(price.seconds) * n
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def records(self) -> list[dict[str, Any]]:
        """One plain dict per row that runs, in step order: sizes, FLOPs, bytes and seconds over the step, evidence."""
        total = self._sum("seconds")
        return [_describe(p, n, total) for p, n in self._calls if n]

    @property
    def ops(self) -> pd.DataFrame:
        """:meth:`records` as a frame, costliest first."""
        import pandas as pd

        frame = pd.DataFrame(self.records()).drop(columns="kind")
        return frame.sort_values("seconds", ascending=False, kind="stable").reset_index(drop=True)

    def totals(self) -> dict[str, Any]:
        """The numbers of the step, units in the names; JSON-ready."""
        d, m = self.deployment, self.memory
        low, high = self.interval_s
        return {
            "model": d.model.name,
            "device": d.device.name,
            "engine": d.engine.name,
            "layout": str(d.layout),
            "world_size": d.layout.world_size,
            "tp": d.layout.tp,
            "dp": d.layout.dp,
            "ep": d.layout.ep,
            "etp": d.layout.etp if self.deployment.raw.facts.num_experts else 1,
            "pp": d.layout.pp,
            "phase": self.workload.phase,
            "batch_per_dp_rank": self.workload.batch,
            "batch_total": self._sequences,
            "input_len": self.workload.input_len,
            "context": self.workload.context,
            "quantization": d.quantization.describe(),
            "routing": d.options.routing,
            "redundant_experts": d.options.redundant_experts,
            "placement": d.options.placement,
            "fusion": d.options.fusion,
            "all2all": d.step.plan.all2all,
            "exchange_kernels": d.options.all2all if d.options.all2all in EXCHANGE_KERNELS else "",
            "dispatch_dtype": d.step.plan.dispatch.name,
            "combine_dtype": d.step.plan.combine.name,
            "experts_backend": d.step.plan.backend,
            "shared_expert_tp": d.options.shared_expert_tp,
            "fused_shared_experts": d.raw.facts.fused_experts,
            "external_shared_experts": d.options.external_shared_experts,
            "dual_batch_overlap": d.options.dual_batch_overlap,
            "mtp_depth": d.options.mtp_depth,
            "speculative_method": d.options.speculative_method,
            "draft_model": d.options.draft_model,
            "dcp": d.options.dcp,
            "pcp": d.options.pcp,
            "pp_partition": d.options.pp_partition,
            "chunk_tokens": d.options.chunk_tokens,
            "step_s": self.step_s,
            "step_low_s": low,
            "step_high_s": high,
            "overhead_s": float(self.price.overhead_s),
            "hidden_s": float(self.price.hidden_s),
            "hidden_comm_s": float(self.price.hidden_comm_s),
            "exposed_comm_s": float(self.price.exposed_comm_s),
            "tokens_per_step": self.tokens,
            "tokens_per_s_per_gpu": self.tokens_per_s_per_gpu,
            "micro_batches": self.price.micro_batches,
            "mfu": self.mfu,
            "memory_bandwidth_use": self.bandwidth_use,
            "memory_bytes": {
                "weights": m.weights,
                "kv_cache": m.kv_cache,
                "activations": m.activations,
                "communication": m.communication,
                "engine": m.engine,
                "total": m.total,
                "budget": m.budget,
                "capacity": m.capacity,
            },
            "fits": m.fits,
            "engine_log": self.log._asdict(),
            "largest_batch_per_dp_rank": self.largest_batch,
            "seconds_by_evidence": self.time_by("evidence"),
            "seconds_by_family": self.time_by("family"),
            "seconds_by_bound": self.time_by("bound"),
            "notes": list(self.notes),
        }


def bound(price: RowPrice) -> str:
    """What a row mostly waits for: ``compute``, ``memory``, ``network`` or ``latency``."""
    return max(price.parts, key=lambda part: float(price.parts[part]))


def _describe(price: RowPrice, count: int, total: float) -> dict[str, Any]:
    row = price.row
    name, shape, detail = _words(row, price.detail)
    seconds = float(price.seconds)
    return {
        "op": name,
        "kind": row.kind,
        "module": row.module,
        "shape": shape,
        "detail": detail,
        "count": count,
        "flops": float(price.flops) * count,
        "bytes": float(price.bytes) * count,
        "wire_bytes": float(price.wire_bytes) * count,
        "seconds_per_call": seconds,
        "seconds": seconds * count,
        "share": seconds * count / total if total else 0.0,
        "bound": bound(price),
        "family": price.family,
        "evidence": price.evidence,
        "error": price.error,
    }


def _words(row: Row, detail: str) -> tuple[str, str, str]:
    """Name, shape and detail of a row."""
    if isinstance(row, Collective):
        return row.op, row.label, detail
    labelled = row.name == "pointwise" and "label" in row.attrs
    name = f"pointwise:{row.attrs['label']}" if labelled else row.name
    return name, _shape(row), str(row.attrs.get("scheme", ""))


def _shape(op: Op) -> str:
    """Activation and weight shapes as formulas: ``[B, 7168] x [7168, 2112]``."""
    activations = [t for t in op.inputs if not t.weight][: 3 if op.name == "attention" else 1]
    weights = [t for t in op.inputs if t.weight and len(t.dims) > 1]
    if op.name in ("mm", "addmm") and weights:
        width = sum(t.dims[-1].coef for t in op.outputs)
        return f"{activations[0].shape()} x [{weights[0].dims[0]}, {width:g}]"
    return " x ".join(t.shape() for t in (*activations, *weights[:1]))
