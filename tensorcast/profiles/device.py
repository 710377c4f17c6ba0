"""What a device profile says: peaks, memory, interconnect tiers, and fitted kernel constants."""

from collections.abc import Callable
from typing import Literal

from pydantic import Field, field_validator, model_validator

from tensorcast.errors import InputError
from tensorcast.profiles.sourced import Figure, Frozen, Number

ComputeDtype = Literal["fp32", "tf32", "bf16", "fp16", "fp8", "int8", "fp4"]
"""Arithmetic that a device has a peak rate for; kernels' dtypes map onto one of these."""


class Tier(Frozen):
    """One level of the interconnect, innermost first."""

    name: str
    size: int = Field(ge=1, description="GPUs inside one domain of this tier")
    host_gpus: int | None = Field(default=None, ge=1, description="GPUs of one host, where a domain joins several")
    bandwidth_bytes_per_s: Figure = Field(description="per GPU and direction")
    latency_s: Figure = Field(description="one hop, software included")
    pairwise: bool = Field(
        default=False,
        description="each two GPUs have links of their own: a group of n uses (n - 1) / (size - 1) of the bandwidth",
    )

    def among(self, ranks: int) -> float:
        """Bytes per second that one GPU sends at most to the others of a group of ``ranks`` inside one domain."""
        speed = float(self.bandwidth_bytes_per_s)
        return speed * (ranks - 1) / (self.size - 1) if self.pairwise else speed

    @model_validator(mode="after")
    def _pairs(self) -> "Tier":
        if self.pairwise and self.size < 2:
            raise ValueError(f"pairwise links of tier {self.name!r} need a size of 2 or more, not {self.size}")
        return self


class ListPrice(Figure):
    """US dollars per GPU hour that a seller asks in public; what is really paid may be far less."""

    seller: str = Field(min_length=3)
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$", description="when the price was read")

    def __str__(self) -> str:
        return f"{self.value:.2f} USD per GPU hour (list price of {self.seller} on {self.date})"


class KernelConstants(Frozen):
    """Fitted constants of one kernel family and dtype: see ``cost/roofline.py`` for the formula they enter."""

    family: str
    dtype: str = "any"
    engine: str = "any"
    compute_efficiency: Number = Field(gt=0, le=1)
    memory_efficiency: Number = Field(gt=0, le=1)
    launch_s: Number = Field(ge=0)
    tile_s: Number = Field(default=0.0, ge=0, description="start and end of one tile")
    step_s: Number = Field(default=0.0, ge=0, description="least time of one step of a tile's inner dimension")
    split_s: Number = Field(default=0.0, ge=0, description="added where idle processors share a tile (split-K, -KV)")
    row_s: Number = Field(default=0.0, ge=0, description="per input or softmax row: work beside the matrix units")
    element_s: Number = Field(default=0.0, ge=0, description="per element of those rows")
    reduce_s: Number = Field(default=0.0, ge=0, description="added where a row is read before any of it is written")
    smoothing: Number = Field(default=2.0, ge=1, description="p of the p-norm joining compute and memory time")
    points: int = Field(default=0, ge=0, description="measured rows used in the fit")
    held_out: int = Field(default=0, ge=0, description="measured rows kept out of it; the errors are theirs")
    median_error: Number | None = Field(default=None, description="median |predicted/measured - 1| on rows held out")
    mean_error: Number | None = None
    p90_error: Number | None = None


class CollectiveConstants(Frozen):
    """Fitted constants of one collective on one tier: see ``cost/collectives.py`` for the formula they enter."""

    op: Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv"]
    tier: str
    algorithm: str = "any"
    engine: str = "any"
    latency_s: Number = Field(ge=0, description="fixed time per call of two ranks")
    step_latency_s: Number = Field(default=0.0, ge=0, description="added per rank beyond the second")
    pipeline_s: Number = Field(default=0.0, ge=0, description="chunk cost c: w s on the wire take 2*sqrt(c*w) more")
    bandwidth_efficiency: Number = Field(gt=0, le=1.2, description="of the tier's bandwidth per GPU and direction")
    points: int = Field(default=0, ge=0)
    held_out: int = Field(default=0, ge=0)
    median_error: Number | None = None
    mean_error: Number | None = None
    p90_error: Number | None = None


class Calibration(Frozen):
    """Generated part of a device profile. Never edited by hand."""

    provenance: str
    date: str
    dropped: dict[str, int] = Field(default={}, description="measured rows left out, by family and reason")
    kernels: tuple[KernelConstants, ...] = ()
    collectives: tuple[CollectiveConstants, ...] = ()
    lent_by: str = Field(default="", description="the device that it was measured on, where that is another; made here")
    other_chip: bool = Field(default=False, description="that device has another chip; made here")


class DeviceProfile(Frozen):
    """A GPU (or NPU, or CPU) and the machine around it."""

    name: str
    aliases: tuple[str, ...] = ()
    vendor: str
    architecture: str
    description: str
    sources: dict[str, str]
    processors: int = Field(ge=1, description="SMs, CUs or cores that run tiles side by side")
    kin: str = Field(
        default="", description="a device of this architecture whose kernels tell what one dtype takes by another"
    )
    same_chip: str = Field(
        default="", description="the device whose chip it is, with other memory or links: kernels go by its calibration"
    )
    like: str = Field(
        default="", description="a measured device of its architecture with another chip, balanced alike: estimates go "
        "by the fractions of peaks that kernels reach there"
    )
    whole_tiles: bool = Field(default=True, description="matmuls run in the tiles of GPU libraries, padded to them")
    peak_flops: dict[ComputeDtype, Figure] = Field(description="dense, no sparsity")
    memory_bytes: Figure
    memory_bandwidth_bytes_per_s: Figure
    interconnect: tuple[Tier, ...] = Field(min_length=1)
    graph_gap_s: Figure | None = Field(
        default=None, description="a kernel of a replayed graph takes so much longer than alone; else the engine's gap"
    )
    experts_held: tuple[Literal["activation", "unpermute"], ...] | None = Field(
        default=None, description="where experts' kernels were timed alone: what runs in them; else whole calls were"
    )
    price_per_hour_usd: ListPrice | None = None
    power_w: Figure | None = Field(default=None, description="most that the GPU draws, its memory included")
    calibration: Calibration | None = None

    @field_validator("interconnect")
    @classmethod
    def _tiers_grow(cls, tiers: tuple[Tier, ...]) -> tuple[Tier, ...]:
        sizes = [tier.size for tier in tiers]
        if sizes != sorted(set(sizes)):
            raise ValueError(f"tier sizes must grow from the innermost outwards, got {sizes}")
        return tiers

    @model_validator(mode="after")
    def _has_bf16_or_fp16(self) -> "DeviceProfile":
        if not {"bf16", "fp16"} & set(self.peak_flops):
            raise ValueError("peak_flops needs bf16 or fp16")
        return self

    @model_validator(mode="after")
    def _lends_once(self) -> "DeviceProfile":
        if self.same_chip and self.like:
            raise ValueError(f"same_chip ({self.same_chip}) and like ({self.like}) both name a lender; keep one")
        return self

    @property
    def timed_on(self) -> str:
        """The device that its kernels were timed on; empty where none were."""
        return (self.calibration.lent_by or self.name) if self.calibration is not None else ""

    @property
    def timed_on_other_chip(self) -> bool:
        """Whether that device has another chip (:attr:`like`), so that its kernels are an estimate."""
        return self.calibration is not None and self.calibration.other_chip

    @property
    def world_limit(self) -> int:
        """GPUs in the largest domain that the profile describes."""
        return self.interconnect[-1].size


BALANCE = (0.6, 1.7)
"""bf16 FLOPs per byte of memory traffic, over the lender's, between which fractions of peaks are lent to another chip.
Where arithmetic was cut and memory was not, they are others: H20's FP8 GEMMs in blocks reach 0.96 of its peak and 0.47
of its bandwidth, H100's 0.71 and 0.83 (alibaba/InferSim, aiconfigurator-core 0.12.0); MI308X's 0.83 and 0.64, MI300X's
0.33 and 0.33 (ROCm/aiter)."""

MOST_TIMED = 64
"""Devices that are kept with what was timed on another."""

_timed: dict[tuple[int, int], tuple[DeviceProfile, DeviceProfile, DeviceProfile]] = {}
"""By identities of a device and of its lender, which stay alive here."""


def timed_as(device: DeviceProfile, read: Callable[[str], DeviceProfile]) -> DeviceProfile:
    """A device that no kernel was timed on, with what was on its lender, which is ``read`` by its name: the one whose
    chip it has (:attr:`~DeviceProfile.same_chip`), or one that it is ``like``. Itself where
    it names none or has a calibration of its own. The same object every time.

    Raises :class:`InputError` for a lender that there is no profile of, or no calibration, or, with another chip, of
    another architecture or :data:`BALANCE`.
    """
    if device.calibration is not None or not (device.same_chip or device.like):
        return device
    field, name = ("same_chip", device.same_chip) if device.same_chip else ("like", device.like)
    try:
        lender = read(name)
    except InputError as error:
        raise InputError(f"device {device.name}: {field}: {error}") from None
    if lender.calibration is None:
        raise InputError(f"device {device.name}: {field}: {lender.name} has no calibration; name one that has")
    if field == "like":
        _check_alike(device, lender)
    key = id(device), id(lender)
    if key not in _timed:
        while len(_timed) >= MOST_TIMED:
            del _timed[next(iter(_timed))]
        _timed[key] = device, lender, lent(device, lender, other_chip=field == "like")
    return _timed[key][-1]


def lent(device: DeviceProfile, lender: DeviceProfile, *, other_chip: bool) -> DeviceProfile:
    """The device with its lender's calibration: fractions of its own peaks and bandwidths. Links are not the chip's:
    those of another chip are left out."""
    assert lender.calibration is not None
    chip = "another chip of its architecture" if other_chip else "the same chip"
    changes = {
        "provenance": f"as on {lender.name}, {chip}: {lender.calibration.provenance}",
        "lent_by": lender.name, "other_chip": other_chip,
    } | ({"collectives": ()} if other_chip else {})
    calibration = lender.calibration.model_copy(update=changes)
    return device.model_copy(update={"calibration": calibration, "experts_held": lender.experts_held})


def balance(device: DeviceProfile) -> float:
    """bf16 FLOPs per byte of memory traffic at the device's peaks."""
    flops = device.peak_flops.get("bf16") or device.peak_flops["fp16"]
    return float(flops) / float(device.memory_bandwidth_bytes_per_s)


def balanced_alike(device: DeviceProfile, lender: DeviceProfile) -> bool:
    """Whether fractions of one's peaks say something about the other's: within :data:`BALANCE`."""
    return BALANCE[0] <= balance(device) / balance(lender) <= BALANCE[1]


def _check_alike(device: DeviceProfile, lender: DeviceProfile) -> None:
    if device.architecture != lender.architecture:
        raise InputError(
            f"device {device.name}: like: {lender.name} is of another architecture ({lender.architecture}, not "
            f"{device.architecture}); name one of its own"
        )
    if not balanced_alike(device, lender):
        raise InputError(
            f"device {device.name}: like: {balance(device):.0f} bf16 FLOPs per byte of memory traffic, {lender.name} "
            f"{balance(lender):.0f}; name one with {balance(device) / BALANCE[1]:.0f} to "
            f"{balance(device) / BALANCE[0]:.0f}, or none"
        )
