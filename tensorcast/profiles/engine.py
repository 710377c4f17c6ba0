"""What an engine profile says: how a serving engine runs a traced step."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from tensorcast.profiles.config_values import is_one_of
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.kernels import (
    AllreduceNorm,
    AttentionKernels,
    ExpertKernels,
    FusedSharedExperts,
    Gather,
    GemmRule,
    Lacking,
    OwnGemms,
    SlicedBlocks,
)
from tensorcast.profiles.memory import (
    MIB,
    CacheDtype,
    CacheRules,
    MemoryCovers,
    PackedPages,
    PrefillGraphs,
    ProfiledStep,
    Reserve,
    Served,
    StateRule,
    StepTokens,
    is_latent,
)
from tensorcast.profiles.scheduler import PromptEnds, Scheduler, SerialDrafts, SerialPipeline
from tensorcast.profiles.sourced import Figure, Frozen, Number

Fusion = Annotated[
    str, Field(pattern=r"^(merged_gemm|pointwise|eager_norms|allreduce_norm|(norm|activation)_quant(:[a-z0-9_]+)?)$")
]
"""``merged_gemm``: linears that read the same activation run as one GEMM (QKV, gate+up). ``pointwise``: runs of
elementwise and row-wise ops become one kernel, with ``eager_norms`` but in norms by one plus the weight.
``allreduce_norm``: all-reduce, residual add and RMSNorm in one kernel.
``norm_quant``, ``activation_quant``: RMSNorm, SwiGLU write the quantised activation, of a dtype where one is named."""


Frontend = Literal["own", "dynamo"]
"""What takes requests to pools: the engine's own router, or NVIDIA Dynamo."""

AXES = 3
"""What a deployment is known by: model, device and release."""

LongerStages = Literal["first", "before_last", "last"]
PipelineSplit = LongerStages | tuple[tuple[int, ...], LongerStages]
"""Which stages of a pipeline have one more layer where layers do not divide: the first ones, those before the last
one (which has the head), or the last ones. Before it, layers of each stage in pipelines with as many stages."""


class Uncompiled(Frozen):
    """Model classes that run without the engine's compiler, and what is fused there."""

    architectures: tuple[str, ...] = Field(min_length=1, description="model classes")
    vendors: tuple[str, ...] = Field(default=(), description="of devices; else all")
    fusions: tuple[Fusion, ...]
    eager_exchanges: tuple[str, ...] = Field(default=(), description="exchanges that cannot be captured there")
    source: str = Field(min_length=3)


class HalvedSteps(Frozen):
    """From how many tokens of a rank on a step is cut in halves under dual-batch overlap, in which phases attention is
    two stages of a half's (what comes before the attention itself, and the rest), and whether shared experts run once
    their half's tokens are on their way back, beside the other half's experts; else they run with attention."""

    decode_tokens: float = Field(default=0.0, ge=0)
    prefill_tokens: float = Field(default=0.0, ge=0)
    two_stages: tuple[Literal["prefill", "decode"], ...] = ()
    shared_last: bool = False
    prompts_alone: tuple[str, ...] = Field(default=(), description="model classes whose decode steps are never halved")
    source: str = Field(min_length=3)


@dataclass(frozen=True)
class Overhead:
    """What a step takes beside its kernels, timed alone: seconds per step, per layer and per sequence, and how many
    times as long as they a step with prompts takes in a server under load (``prefill_factor``), and a decode step
    where prompts are another server's (``pool_factor``).

    Errors are medians: ``layer_error_s`` of the seconds per layer, ``prefill_error`` of the factor, relative.
    ``vendor``: whose devices it was measured on; nobody's where it is as published.
    """

    step_s: float
    request_s: float
    layer_s: float = 0.0
    layer_error_s: float = 0.0
    prefill_factor: float = 1.0
    prefill_error: float = 0.0
    pool_factor: float = 1.0
    vendor: str = ""


class EngineFit(Frozen):
    """What :mod:`tensorcast.calibrate.engines.overheads` fitted to measured runs, in place of published figures.

    Errors are of the time per token: of runs left out of the fit (``left_out``), and of models of which no run was
    fitted to (``unseen``), by the published overhead and by the fitted one.
    """

    source: str = Field(min_length=3)
    rows: int = Field(ge=1, description="runs that steps were fitted to")
    models: int = Field(ge=1, description="different networks among them")
    dropped: dict[str, int] = Field(default={}, description="runs of this engine not fitted to, by reason")
    layer_s: Number = Field(ge=0, description="seconds per layer and step: gaps, kernels that no row stands for")
    layer_error_s: Number = Field(ge=0, description="median distance of a network's own from one drawn from others")
    prefill_factor: Number = Field(default=1.0, ge=1, description="steps with prompts under load over their kernels")
    prefill_error: Number = Field(default=0.0, ge=0, description="median distance of a network's own, over the factor")
    served: dict[str, tuple[str, ...]] = Field(default={}, description="models of all runs fitted to, by device")
    vendor: str = Field(default="NVIDIA", description="whose devices these are")
    first_token_s: Number | None = Field(default=None, ge=0)
    prompt_token_s: Number = Field(default=0.0, ge=0, description="per token of the prompt, on top of that")
    first_token_rows: int = Field(default=0, ge=0)
    hand_over_s: Number | None = Field(default=None, ge=0, description="behind Dynamo, as all runs it is fitted to")
    hand_over_rows: int = Field(default=0, ge=0)
    pool_factor: Number = Field(default=1.0, ge=1, description="decode steps where prompts are another server's")
    served_with: dict[str, dict[str, tuple[str, ...]]] = Field(
        default={}, description="profiles of models, by device and release, of aggregated runs fitted to"
    )
    serving_error: dict[str, Number | tuple[Number, ...]] = Field(
        default={}, description="by time (ttft_s, tpot_s) what serving errs by beside steps: relative median, by how "
        "many of model, device and release such runs were never fitted to with",
    )
    left_out_rows: int = 0
    left_out_before: Number | None = None
    left_out_error: Number | None = None
    unseen_before: Number | None = None
    unseen_error: Number | None = None

    def beside_steps(self, new: int) -> dict[str, float]:
        """What serving errs by beside steps, by time, where ``new`` of model, device and release are
        (:func:`unserved`)."""
        every = {name: one if isinstance(one, tuple) else (one,) for name, one in self.serving_error.items()}
        return {name: float(some[min(new, len(some) - 1)]) for name, some in every.items()}

    def unserved(self, model: str, device: str, release: str) -> int:
        """Of model, device and release (profiles' names) how many are others than those of the nearest runs that were
        fitted to; 3 where none were."""
        return min(
            (
                (model not in models) + (device != one) + (release != other)
                for one, releases in self.served_with.items() for other, models in releases.items()
            ),
            default=AXES,
        )


class Calibrated(Frozen):
    """Releases that constants were measured with."""

    kernels: str = Field(description="whose kernels the measured tables hold")
    steps: str = Field(description="of most runs that overheads are fitted to, of those whose rules were read")


class EngineProfile(Frozen):
    """vLLM, SGLang, TensorRT-LLM: which fusions they have and what a step costs beside its kernels."""

    name: str
    aliases: tuple[str, ...] = ()
    version: str
    releases: tuple[str, ...] = Field(default=(), description="whose rules were read, newest first")
    days: dict[str, str] = Field(default={}, description="when the releases' wheels were made")
    remark: str = Field(default="", description="to be said of an older release that constants are not of; made here")
    frontend: Frontend = Field(default="own", description="what takes requests to pools")
    calibrated: Calibrated | None = Field(default=None, description="releases that constants were measured with")
    description: str
    sources: dict[str, str]
    fusions: tuple[Fusion, ...]
    own_gemms: OwnGemms | None = Field(default=None, description="what `merged_gemm` leaves apart")
    gemms: tuple[GemmRule, ...] = Field(default=(), description="which run kernels of their own; the first that holds")
    graph_captured_phases: tuple[Literal["prefill", "decode"], ...] = Field(
        description="phases whose kernels are replayed from a captured graph"
    )
    decode_graphs: Literal["full", "piecewise"] = Field(
        default="full", description="whether decode replays whole steps, or pieces with attention launched in between"
    )
    graph_break_s: Figure | None = Field(default=None, description="per layer, what passes between two such pieces")
    custom_all_reduce: bool = Field(default=True, description="its own kernels run where they are the faster ones")
    all_reduce_over_hosts: bool = Field(
        default=False, description="also between hosts that one domain joins, not only where a norm is joined"
    )
    compiles: bool = Field(default=False, description="whether torch.compile makes fusions and pieces of graphs")
    eager_exchanges: tuple[str, ...] = Field(
        default=(), description="exchanges between experts that cannot be captured: all of their steps run eagerly"
    )
    uncompiled: Uncompiled | None = Field(default=None, description="models for which fusions and captures are others")
    host_tables: bool = Field(default=False, description="whether rows of n-grams' tables stay in the host's memory")
    scores_within: tuple[str, ...] = Field(
        default=(), description="device architectures on which indexers score no more than blocks chosen before"
    )
    prompt_ends: PromptEnds | None = Field(default=None, description="where it runs layers on the ends of prompts")
    halved_steps: HalvedSteps | None = Field(default=None, description="else every step is halved that is asked to be")
    graph_launch_gap_s: Figure = Field(description="gap between two kernels inside a captured graph")
    eager_launch_gap_s: Figure = Field(description="least time between two kernels launched one by one")
    host_launch_s: Figure | None = Field(default=None, description="the host's time for each, where it may be late")
    step_overhead_s: Figure = Field(description="scheduling, sampling and input preparation per step, as published")
    request_overhead_s: Figure | None = Field(default=None, description="the same, per sequence in the batch")
    serial_drafts: SerialDrafts | None = Field(default=None, description="drafts that leave the GPU waiting")
    serial_pipeline: SerialPipeline | None = Field(default=None, description="pipelines that leave it waiting")
    memory_fraction: Figure = Field(description="share of device memory that the engine takes, without a `reserve`")
    memory_covers: MemoryCovers = Field(default="everything", description="what that share holds")
    reserve: Reserve | None = Field(default=None, description="what it leaves free instead of a fixed share")
    profiled_step: ProfiledStep | None = Field(default=None, description="what it runs to see what a step takes")
    reserved_bytes: Figure = Field(description="context, workspace and captured graphs, outside weights and KV cache")
    collective_bytes: Figure | None = Field(
        default=None, description="communicators and all-reduce buffers, on top of that where a server has several GPUs"
    )
    cache_rules: CacheRules | None = Field(default=None, description="copies of states, and cache of windows")
    packed_pages: PackedPages | None = None
    states: StateRule | None = Field(default=None, description="precision of recurrent states; none: the model's")
    state_copies: Figure | None = Field(
        default=None, description="states moved per sequence and layer to keep the accepted one of a step that drafts"
    )
    max_tokens_per_step: int = Field(ge=1, description="default chunked-prefill budget in tokens")
    step_tokens: StepTokens | None = Field(default=None, description="where that default is another")
    prefill_graphs: PrefillGraphs | None = Field(default=None, description="prefill steps that are captured in pieces")
    pipeline_split: PipelineSplit = Field(default="first", description="which stages have one more layer")
    lacking: tuple[Lacking, ...] = Field(default=(), description="what it has no kernels for, by device")
    lifted_rules: tuple[str, ...] = Field(default=(), description="limits of its launch table that are none any more")
    all2all: dict[Literal["prefill", "decode"], str] = Field(description="default MoE exchange per phase, dp > 1")
    gather: Gather | None = Field(default=None, description="how tokens are gathered where no exchange sends them")
    sliced_blocks: SlicedBlocks | None = Field(default=None, description="where tp ranks slice tokens before a router")
    fused_shared_experts: FusedSharedExperts | None = Field(default=None, description="where one runs as a routed one")
    experts_backend: dict[Literal["prefill", "decode"], str] = Field(
        default={}, description="how expert matmuls run per phase (grouped_mm if not said), unless the exchange decides"
    )
    experts: ExpertKernels | None = Field(default=None, description="whose experts' kernels it runs, with which tiles")
    attention: AttentionKernels | None = Field(default=None, description="whose attention kernels it runs")
    pads_hidden: bool = Field(default=True, description="experts' hidden size is padded as their kernels want (MXFP4)")
    masked_gemm: Literal["skips", "pads"] = Field(
        default="skips", description="whether a masked grouped GEMM leaves out tiles without rows or computes capacity"
    )
    allreduce_norm: AllreduceNorm | None = Field(default=None, description="where it runs; else everywhere")
    shared_expert_stream_tokens: Figure | None = Field(
        default=None, description="most tokens of a captured step whose shared expert runs on a stream of its own"
    )
    prefill_alone: bool = Field(default=False, description="whether prompts run in steps without decoding sequences")
    cache_dtypes: tuple[CacheDtype, ...] = Field(default=(), description="of caches that nobody asked for")
    reserves_reply: bool = Field(
        default=False, description="whether a request is admitted only if its cache has room for the whole reply"
    )
    arrival_wait_steps: Number = Field(
        default=1.0, ge=0, description="steps that pass before the step that a new request rides in, in a closed loop"
    )
    scheduler: Scheduler | None = Field(default=None, description="how requests are put into steps; for replays")
    first_token_overhead_s: Figure | None = Field(
        default=None, description="per request, outside the GPU and before its first token; fits are for public records"
    )
    hand_over_overhead_s: Figure | None = Field(
        default=None, description="disaggregated: per request beside the bytes: routing, two workers meeting, set-up"
    )
    fitted: EngineFit | None = Field(default=None, description="overheads fitted to served runs; they come first")

    def tokens_per_step(self, device: DeviceProfile | None = None, dp: int = 1, exchange: str = "") -> int:
        """Default chunked-prefill budget of a data-parallel rank on ``device``."""
        found, rule = self.max_tokens_per_step, self.step_tokens
        if rule is None:
            return found
        if device is not None:
            memory = float(device.memory_bytes) / MIB
            found = next((rule.from_mib[size] for size in sorted(rule.from_mib, reverse=True) if memory >= size), found)
            found = next((tokens for word, tokens in rule.devices.items() if word in device.name), found)
        if rule.over_dp:
            found = max(1, found // dp)
        return min(found, rule.exchanges.get(exchange, found))

    def prefill_graph_tokens(
        self, device: DeviceProfile, dp: int, pp: int, config: dict[str, Any], served: Served = Served(), *,
        most: int | None = None, set_aside: bool = False,
    ) -> int:
        """Tokens of the largest prefill step that is captured in pieces, of steps of ``most`` tokens (the engine's own
        where not given); 0: none is. ``set_aside``: that memory is set aside for, of a whole server's steps."""
        rule, names = self.prefill_graphs, set(config.get("architectures") or ())
        if rule is None or (rule.one_replica and dp > 1) or (rule.one_stage and pp > 1) or not rule.run_with(served):
            return 0
        if rule.text_only and self._sees(config) and not names & set(rule.seeing):
            return 0
        if not set_aside and rule.left(device.architecture.lower(), names):
            return 0
        if (rule.vendors and device.vendor not in rule.vendors) or names & set(rule.not_architectures):
            return 0
        most = most or self.tokens_per_step(device, 1 if set_aside else dp)
        return rule.largest(most, device.architecture.lower(), names, served, latent=is_latent(config))

    def _sees(self, config: dict[str, Any]) -> bool:
        """Whether it runs the model's encoders, too, unasked."""
        vision = self.reserve.vision if self.reserve is not None else None
        told = vision is not None and bool(vision.not_architectures) and is_one_of(vision.not_architectures, config)
        return not told and ("text_config" in config or "vision_config" in config)

    def in_pools(self, frontend: Frontend | None = None) -> "EngineProfile":
        """The profile of a server that runs one phase, the other being another's; it keeps no prompts' beginnings.
        ``frontend``: what takes requests to both; the profile's if not given."""
        changes: dict[str, Any] = {} if frontend in (None, self.frontend) else {"frontend": frontend}
        if self.prefill_graphs is not None and not self.prefill_graphs.pools:
            changes["prefill_graphs"] = None
        if self.reserve is not None and self.reserve.by_role:
            changes["reserve"] = self.reserve.model_copy(update={"pooled": True})
        if self.cache_rules is not None and not self.cache_rules.pools:
            changes["cache_rules"] = self.cache_rules.in_pools()
        return self.model_copy(update=changes) if changes else self

    def drafts_of(self, config: dict[str, Any]) -> "EngineProfile":
        """The profile as it drafts for a model with this ``config``."""
        serial = self.serial_drafts
        if serial is None or not serial.overlapping or not is_one_of(serial.overlapping, config):
            return self
        return self.model_copy(update={"serial_drafts": None})

    def drafting(self, method: str, *, overlaps: bool = False) -> "EngineProfile":
        """The profile of a server that drafts by ``method``; ``overlaps``: its scheduler was asked to work ahead."""
        changes: dict[str, Any] = {"serial_drafts": None} if overlaps else {}
        if self.prefill_graphs is not None and not self.prefill_graphs.drafting:
            changes["prefill_graphs"] = None
        if not overlaps and self.serial_drafts is not None and method in self.serial_drafts.methods:
            changes["arrival_wait_steps"] = 1.0  # a reply that ends is known before the next step is planned
        return self.model_copy(update=changes) if changes else self

    def without_prefix_cache(self) -> "EngineProfile":
        """The profile of a server that keeps no prompts' beginnings, nor copies of their states."""
        if self.cache_rules is None:
            return self
        return self.model_copy(update={"cache_rules": self.cache_rules.without_copies()})

    def halves_of(self, config: dict[str, Any]) -> "EngineProfile":
        """The profile for the model with this ``config``: whether its decode steps are ever halved."""
        halved = self.halved_steps
        if halved is None or not halved.prompts_alone or not is_one_of(halved.prompts_alone, config):
            return self
        return self.model_copy(update={"halved_steps": halved.model_copy(update={"decode_tokens": math.inf})})

    def with_stages(self, layers: tuple[int, ...]) -> "EngineProfile":
        """The profile of an engine told how many ``layers`` each stage of a pipeline has."""
        split = self.pipeline_split
        return self.model_copy(update={"pipeline_split": (layers, split[1] if isinstance(split, tuple) else split)})

    @property
    def overhead(self) -> Overhead:
        """Of a step: as published, with what was fitted beside."""
        published = Overhead(float(self.step_overhead_s), float(self.request_overhead_s or 0.0))
        if self.fitted is None:
            return published
        fitted = ("layer_s", "layer_error_s", "prefill_factor", "prefill_error", "pool_factor", "vendor")
        return replace(published, **{name: getattr(self.fitted, name) for name in fitted})

    def first_token_s(self, input_len: Any) -> Any:
        """Seconds of a request outside the GPU and before its first token, of so long a prompt (a number or arrays)."""
        if self.first_token_overhead_s is not None or self.fitted is None or self.fitted.first_token_s is None:
            return float(self.first_token_overhead_s or 0.0)
        return self.fitted.first_token_s + self.fitted.prompt_token_s * input_len

    def in_records(self) -> "EngineProfile":
        """The profile of a server in public records, to which first tokens were fitted."""
        return self.model_copy(update={"first_token_overhead_s": None}) if self.first_token_overhead_s else self

    @property
    def hand_over_s(self) -> float:
        """Seconds of a request between two pools, beside the bytes that move and the steps in which each of them looks.
        What was fitted belongs to Dynamo, which plans every request and starts both legs of it."""
        fitted = self.fitted.hand_over_s if self.fitted and self.frontend == "dynamo" else None
        return float(self.hand_over_overhead_s or 0.0) if fitted is None else fitted
