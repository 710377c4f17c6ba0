"""What an engine profile says of kernels: whose run a model's experts, with which tiles, and whose its attention."""

import math
from typing import Any, Literal

from pydantic import Field

from tensorcast.profiles.config_values import is_one_of
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.model import text_of
from tensorcast.profiles.sourced import Frozen

GatherOp = Literal["all_gather", "reduce_scatter", "all_reduce"]

GATHERS: tuple[GatherOp, GatherOp] = ("all_gather", "reduce_scatter")
"""What gathers tokens of data-parallel ranks and gives their results back, unless an engine does otherwise."""

WORDS = ("triton", "cutlass", "deepgemm", "trtllm", "marlin")
"""Libraries of experts' kernels that an engine can be asked for; ``trtllm``: those that TensorRT-LLM generated."""

ATTENTION_WORDS = ("triton", "trtllm", "flashinfer", "flash_attention")
"""Libraries of attention kernels that an engine can be asked for."""

ACTIVATIONS = ("hidden_act", "hidden_activation", "mlp_hidden_act")
"""Fields of a model's config that name the activation between an expert's matmuls."""


class Library(Frozen):
    """Whose kernels run where everything said here holds; what is not said holds always."""

    kernels: str = Field(min_length=3, description="as measured tables name them in `kernel_source`")
    devices: tuple[str, ...] = Field(default=(), description="device architectures, lower case")
    dtypes: tuple[str, ...] = ()
    architectures: tuple[str, ...] = Field(default=(), description="of the model's config")
    activations: tuple[str, ...] = ()
    spread: bool | None = Field(default=None, description="whether ranks hold whole experts of their own")
    attention_dp: bool | None = Field(default=None, description="whether attention is data-parallel")

    def holds(
        self, device: str, dtype: str, architectures: set[str], activation: str, *, spread: bool, attention_dp: bool
    ) -> bool:
        """Whether this is a model, dtype and device of the rule."""
        return (
            (not self.devices or device in self.devices)
            and (not self.dtypes or dtype in self.dtypes)
            and (not self.architectures or bool(architectures & set(self.architectures)))
            and (not self.activations or activation in self.activations)
            and self.spread in (None, spread)
            and self.attention_dp in (None, attention_dp)
        )


class Tile(Frozen):
    """Output tile of a Triton kernel, for steps of up to so many tokens (none said: of any)."""

    block: tuple[int, int, int] = Field(description="rows, columns, depth")
    tokens: int | None = Field(default=None, ge=1)
    tokens_per_expert: float | None = Field(default=None, gt=0, description="over the experts that a rank holds")


class TritonTiles(Frozen):
    """Tiles of an engine's Triton experts: its default ones by dtype, and for which sizes it ships tuned ones."""

    source: str = Field(min_length=3)
    default: dict[str, tuple[Tile, ...]] = Field(description="by dtype; the first whose limit is not exceeded")
    tuned: dict[str, dict[str, dict[int, tuple[int, ...]]]] = Field(
        default={}, description="device profile -> dtype -> experts that a rank holds -> widths of an expert on it"
    )


class ExpertKernels(Frozen):
    """An engine's choice of experts' kernels, as its source code makes it."""

    source: str = Field(min_length=3)
    libraries: tuple[Library, ...] = Field(default=(), description="the first that holds")
    names: dict[str, tuple[str, ...]] = Field(
        default={}, description="what measured tables call the libraries that can be asked for, the usual one first; "
        "WORD:DTYPE where it is another for experts in this dtype"
    )
    asked: str = Field(default="", description="a word of `names`: what runs, whatever the engine would choose")
    triton: TritonTiles | None = None

    def library(
        self, device: str, dtype: str, config: dict[str, Any], spread: bool, *, attention_dp: bool = False
    ) -> str:
        """Whose kernels run a model's experts on a device of this architecture; empty where nothing is said. What was
        asked for comes first.

        ``config`` as the model's publisher wrote it; ``spread``: ranks hold whole experts of their own;
        ``attention_dp``: each has requests of its own, too.
        """
        names, device = set(config.get("architectures") or ()), device.lower()
        text = text_of(config)
        activation = next((str(text[name]) for name in ACTIVATIONS if text.get(name)), "")
        found = (rule.kernels for rule in self.libraries
                 if rule.holds(device, dtype, names, activation, spread=spread, attention_dp=attention_dp))
        chosen, wanted = next(found, ""), self.names.get(f"{self.asked}:{dtype}", self.names.get(self.asked, ()))
        return chosen if chosen in wanted or not wanted else wanted[0]


class AttentionRule(Frozen):
    """Whose attention kernels run models of these classes on devices of these architectures."""

    kernels: str = Field(min_length=3, description="one of `ATTENTION_WORDS`")
    devices: tuple[str, ...] = Field(min_length=1, description="device architectures, lower case")
    architectures: tuple[str, ...] = Field(min_length=1, description="model classes")


class AttentionKernels(Frozen):
    """An engine's choice of attention kernels, as its source code makes it; of latents' none is told."""

    source: str = Field(min_length=3)
    usual: dict[str, str] = Field(description="device architecture -> what runs where no rule says otherwise")
    libraries: tuple[AttentionRule, ...] = Field(default=(), description="the first that holds")
    as_cached: tuple[str, ...] = Field(default=(), description="those that multiply in FP8 where the cache is")
    over_latents: dict[str, tuple[str, ...]] = Field(
        default={}, description="libraries that attend to latents as to one head of keys in decode, as to all expanded "
        "ones in prompts, and architectures of devices where those kernels of theirs were timed"
    )
    asked: str = Field(default="", description="what runs, whatever the engine would choose")

    def library(self, device: str, config: dict[str, Any]) -> str:
        """Whose kernels run a model's attention on a device of this architecture; empty where nothing is said."""
        architecture = device.lower()
        found = (rule.kernels for rule in self.libraries
                 if architecture in rule.devices and is_one_of(rule.architectures, config))
        return self.asked or next(found, self.usual.get(architecture, ""))

    def unusual(self, device: str, config: dict[str, Any]) -> str:
        """The same where it is not the usual one, which the tables' plain kernels are; else empty."""
        library = self.library(device, config)
        return "" if library == self.usual.get(device.lower(), "") else library


class Lacking(Frozen):
    """What no kernel of an engine does on some devices, or what it refuses on any: all that is named here together."""

    rule: str = Field(min_length=3, description="the limit of the launch table that it is")
    devices: tuple[str, ...] = Field(default=(), description="architectures of devices; else all")
    attention: Literal["", "latent", "sparse"] = Field(default="", description="over latents; over chosen ones of them")
    cache: Literal["", "fp8"] = ""
    models: tuple[str, ...] = Field(default=(), description="model classes; else all")
    but_models: tuple[str, ...] = Field(default=(), description="model classes that it does not hold for")
    methods: tuple[str, ...] = Field(default=(), description="quant_method of a checkpoint; else any")
    linear: tuple[str, ...] = Field(default=(), description="schemes of matmuls outside experts; else any")
    experts: tuple[str, ...] = Field(default=(), description="schemes of routed experts; else any")
    exchanges: tuple[str, ...] = Field(default=(), description="between experts; else any")
    over_nodes: bool = Field(default=False, description="over several nodes alone")
    drafts: tuple[str, ...] = Field(default=(), description="methods of drafting; else any, and none")
    in_pipeline: bool = Field(default=False, description="with pipeline stages alone")
    least_stages: int = Field(default=1, ge=1, description="with so many of them, or more")
    halved: bool = Field(default=False, description="of halved steps alone (dual-batch overlap)")
    shared_choices: bool = Field(default=False, description="where layers take what an earlier indexer chose")
    says: str = Field(min_length=3)
    way: str = Field(min_length=3, description="what to choose instead")


class SlicedBlocks(Frozen):
    """Where each tensor-parallel rank takes its slice of the tokens through a MoE block, its router included."""

    exchanges: tuple[str, ...]
    architectures: tuple[str, ...] = Field(default=(), description="model classes that do; else all")
    least_dp: int = Field(default=1, ge=1, description="data-parallel ranks from which on")
    scatters: bool = Field(default=False, description="slices are made by the sum before the block (reduce-scatter)")
    source: str = Field(min_length=3)


class OwnGemms(Frozen):
    """Projections that read what others read, but run as a GEMM of their own group, by the modules' last names."""

    groups: tuple[tuple[str, ...], ...]
    source: str = Field(min_length=3)


class GemmRule(Frozen):
    """GEMMs that run a kernel which no table of their precision holds, where everything said here holds."""

    kernel: Literal["one_tile", "routed_tiles", "fp32"] = Field(
        description="Triton's at its only tile, 128 x 128 by 128 deep; triton_kernels' of experts, 256 columns wide; "
        "cuBLAS's of FP32, to which input and weights are widened"
    )
    devices: tuple[str, ...] = Field(min_length=1, description="device architectures, lower case")
    schemes: tuple[str, ...] = Field(default=(), description="of weights; else any")
    modules: tuple[str, ...] = Field(default=(), description="last names of modules; else any")
    architectures: tuple[str, ...] = Field(default=(), description="model classes; else all")
    tuned: tuple[tuple[int, int], ...] = Field(default=(), description="columns and depth that tiles are shipped for")
    least_columns: int = Field(default=1, ge=1, description="narrower ones, as gates, are in no block of a checkpoint")
    source: str = Field(min_length=3)

    def holds(self, architecture: str, config: dict[str, Any]) -> bool:
        """Whether it may be of GEMMs of a model with this ``config`` on devices of an ``architecture``."""
        return architecture.lower() in self.devices and is_one_of(self.architectures, config)

    @property
    def of_experts(self) -> bool:
        """Whether it is of routed experts' GEMMs, else of the others."""
        return self.kernel == "routed_tiles"

    def runs(self, module: str, columns: int, depth: int) -> bool:
        """Whether it is of a GEMM of ``module``, ``[M, depth] x [depth, columns]``, where it :meth:`holds`."""
        named = not self.modules or module.rpartition(".")[-1] in self.modules
        return named and columns >= self.least_columns and (columns, depth) not in self.tuned


class Gather(Frozen):
    """How data-parallel ranks' tokens come together at experts without an exchange of these, and their results go back:
    by an all-gather, as experts read them, and a reduce-scatter, but for what is said here."""

    bf16: bool = Field(default=False, description="tokens are gathered before they are quantised")
    prompts: tuple[GatherOp, GatherOp] = Field(
        default=GATHERS, description="of prefill steps, whose ranks have unlike numbers"
    )
    source: str = Field(min_length=3)


class AllreduceNorm(Frozen):
    """Where the kernel runs that all-reduces and normalises, and up to which size."""

    architectures: tuple[str, ...] = Field(description="of devices")
    models: tuple[str, ...] = Field(default=(), description="model classes that it is switched on for; else all")
    one_replica: bool = Field(default=False, description="not under data-parallel attention")
    over_hosts: bool = Field(default=False, description="also between hosts that one domain joins (MNNVL)")
    max_tokens: int | None = None
    max_bytes: dict[str, dict[int, int]] = Field(default={}, description="architecture -> ranks -> largest tensor")
    device_max_bytes: dict[str, dict[int, int]] = Field(
        default={}, description="the same by a word in the device's name, which comes first"
    )
    source: str = Field(min_length=3)

    def limit_bytes(self, device: DeviceProfile, ranks: int, token_bytes: float) -> float:
        """Largest all-reduce that is fused on this device in a group of ``ranks``; 0 where none is."""
        architecture, near = device.architecture.lower(), device.interconnect[0]
        most = near.size if self.over_hosts else near.host_gpus or near.size
        if architecture not in self.architectures or ranks > most:
            return 0.0
        largest = math.inf if self.max_tokens is None else self.max_tokens * token_bytes
        if self.max_bytes:
            usual = self.max_bytes.get(architecture, {})
            own = next((limits for word, limits in self.device_max_bytes.items() if word in device.name), usual)
            largest = min(largest, own.get(ranks, 0))
        return largest


class FusedModels(Frozen):
    """Model classes whose shared expert runs as one more routed one, and where."""

    architectures: tuple[str, ...] = Field(min_length=1, description="model classes")
    num_experts: tuple[int, ...] = Field(default=(), description="of a layer; else any number")
    devices: tuple[str, ...] = Field(min_length=1, description="architectures of devices")
    spread: bool = Field(default=False, description="also where ranks hold whole experts of their own, each a copy")


class FusedSharedExperts(Frozen):
    """Where a shared expert, as wide as a routed one, runs in their grouped GEMM, as one more choice of every token."""

    models: tuple[FusedModels, ...]
    not_kernels: tuple[str, ...] = Field(default=(), description="experts' kernels that take no such expert")
    source: str = Field(min_length=3)

    def holds(
        self, config: dict[str, Any], num_experts: int, *, architecture: str, spread: bool, kernels: str
    ) -> bool:
        """Whether it does for a model on devices of an ``architecture``. ``spread``, ``kernels``: as experts run."""
        return kernels not in self.not_kernels and any(
            is_one_of(one.architectures, config) and num_experts in (one.num_experts or (num_experts,))
            and architecture.lower() in one.devices and one.spread >= spread
            for one in self.models
        )
