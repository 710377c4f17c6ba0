"""The vision tower of a server: what its images cost, and what it holds on each rank.

``weights``: the tower is cut over the ranks as the language model is (vLLM's and SGLang's default); ``data``: every
rank has all of it and images of its own, whose embeddings are gathered (vLLM 0.33.0 ``--mm-encoder-tp-mode data``,
SGLang 0.5.23 ``--mm-enable-dp-encoder``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from tensorcast.cost.collectives import collective_time, group_extent
from tensorcast.cost.evidence import LEVELS, interval
from tensorcast.cost.memory import Memory
from tensorcast.cost.work import Size
from tensorcast.deploy.deployment import Deployment, deploy
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.options import Options
from tensorcast.deploy.plan.plan import Row
from tensorcast.deploy.step.price import RowPrice, StepPrice
from tensorcast.errors import InputError, unknown_name
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.engine import EngineProfile
from tensorcast.profiles.model import ModelProfile
from tensorcast.profiles.vision.attention import measured_attention
from tensorcast.profiles.vision.images import EncodedImage
from tensorcast.profiles.vision.said import encoded_image, vision_of
from tensorcast.trace.table import Op

TP_MODES = ("weights", "data")
EMBEDDING_BYTES = 2.0
"""A number of an embedding, in bf16."""

NOTES = (
    "the processor's work on the CPU (decoding, resizing) is not in it",
    "the tower runs in bf16, its kernels launched one by one",
)


@dataclass(frozen=True, kw_only=True)
class Images:
    """What comes with a prompt: ``count`` images of ``width`` x ``height`` pixels."""

    count: int
    width: int
    height: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"--images {self.count}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """The tower of a server of ``ranks`` GPUs. ``deployment``: of what one rank runs; ``image``: of each that comes;
    ``width``: numbers of an embedding."""

    deployment: Deployment
    ranks: int
    tp_mode: str
    image: EncodedImage
    width: int

    @property
    def weight_bytes(self) -> float:
        """On each rank."""
        return float(self.deployment.held(np.zeros(()), 0)[0])

    @property
    def embedding_bytes(self) -> float:
        """Of one image."""
        return EMBEDDING_BYTES * self.width * self.image.embeddings

    def price(self, images: Size) -> EncodeStep:
        """A step of ``images`` on all ranks: a number, or an array of them."""
        shared = self.ranks if self.tp_mode == "data" else 1
        same = not self.deployment.raw.facts.block  # pictures of one size, which are dealt out one by one
        steps = []
        for view in self.image.views:
            own: Size = 1.0 * images * view.number
            if shared > 1:
                own = np.ceil(own / shared) if same else view.number * np.ceil(images / shared)
            steps.append(self.deployment.step.price(own, view.patches, 0.0))
        gather_s: Size = 0.0
        if shared > 1:
            device = self.deployment.device
            extent = group_extent(shared, 1, device)
            gather_s = collective_time(
                "all_gather", images * self.embedding_bytes, extent, device, engine=self.deployment.engine.name
            ).seconds
        return EncodeStep(encoder=self, images=images, views=tuple(steps), gather_s=gather_s)

    def memory(self, images: int) -> Memory:
        """Of a rank that holds nothing but the tower, the fullest view of ``images`` at once."""
        view = max(self.image.views, key=lambda one: one.number * one.patches)
        return self.deployment.memory(images * view.number, view.patches, 0)


    def check_room(self, images: int) -> None:
        """Raise :class:`InputError` where a rank of nothing but the tower has no room for so many at once."""
        memory = self.memory(images)
        if not memory.fits:
            need = (memory.total - memory.kv_cache) / 1e9
            raise InputError(
                f"--images {images}: {need:.1f} GB on each GPU, over the budget of {float(memory.budget) / 1e9:.1f} GB "
                f"of {self.deployment.device.name}; fewer at once"
            )


@dataclass(frozen=True, kw_only=True)
class EncodeStep:
    """Images on their way through a tower. ``views``: a step for each kind of picture that an image is cut into."""

    encoder: Encoder
    images: Size
    views: Sequence[StepPrice]
    gather_s: Size

    @property
    def kernels_s(self) -> Size:
        """Seconds without what the engine spends on a step: beside a prefill step that is spent already."""
        return sum((view.seconds - view.overhead_s for view in self.views), 0.0) + self.gather_s

    @property
    def seconds(self) -> Size:
        """Seconds of a step of its own."""
        return self.kernels_s + self.views[0].overhead_s

    @cached_property
    def error(self) -> Size:
        """Relative, a median: of kernels of the views alike."""
        every = sum((view.error * view.seconds for view in self.views), 0.0)
        return every / sum((view.seconds for view in self.views), 0.0)

    @property
    def interval_s(self) -> tuple[float, float]:
        """Ends of an 80 % interval from :attr:`error` alone."""
        return interval(float(self.seconds), float(self.error))

    @property
    def calls(self) -> list[tuple[RowPrice, float]]:
        """Rows of all views, and how often each runs."""
        return [(row, float(n)) for view in self.views for row, n in view.calls]

    @property
    def flops(self) -> float:
        """Of all rows on one rank."""
        return sum(float(row.flops) * n for row, n in self.calls)

    def evidence(self) -> dict[str, float]:
        """Kernel seconds by what stands behind them."""
        found: dict[str, float] = {str(level): 0.0 for level in reversed(LEVELS)}
        for row, n in self.calls:
            found[str(row.evidence)] += float(row.seconds) * n
        return {name: value for name, value in found.items() if value}

    def rows(self) -> list[dict[str, Any]]:
        """One plain dict per row, the costliest first."""
        found = []
        for row, n in self.calls:
            name = getattr(row.row, "name", None) or getattr(row.row, "op", "")
            found.append({
                "op": name, "module": row.row.module, "count": n, "seconds": float(row.seconds) * n,
                "flops": float(row.flops) * n, "bytes": float(row.bytes) * n, "evidence": row.evidence,
            })  # fmt: skip
        return sorted(found, key=lambda one: -one["seconds"])

    def totals(self) -> dict[str, Any]:
        """The numbers of the step, units in the names; JSON-ready."""
        e, images = self.encoder, int(self.images)
        d, (low, high), memory = e.deployment, self.interval_s, e.memory(int(self.images))
        return {
            "model": d.model.name, "device": d.device.name, "engine": d.engine.name, "phase": "encode",
            "world_size": e.ranks, "tp": e.ranks, "encoder_tp_mode": e.tp_mode, "images": images,
            "patches_per_image": e.image.patches, "tokens_per_image": e.image.tokens,
            "embeddings_per_image": e.image.embeddings,
            "views": [{"pictures": view.number, "patches": view.patches} for view in e.image.views],
            "step_s": float(self.seconds), "step_low_s": low, "step_high_s": high,
            "kernels_s": float(self.kernels_s), "overhead_s": float(self.views[0].overhead_s),
            "gather_s": float(self.gather_s), "images_per_s_per_gpu": images / float(self.seconds) / e.ranks,
            "flops_per_gpu": self.flops, "parameters": d.raw.total_params(),
            "embedding_bytes_per_image": e.embedding_bytes,
            "memory_bytes": {
                "weights": float(memory.weights), "activations": float(memory.activations),
                "total": float(memory.total), "budget": float(memory.budget),
            },
            "seconds_by_evidence": self.evidence(), "notes": list(NOTES),
        }  # fmt: skip


def _as_measured(tower: Deployment) -> Deployment:
    """With its attention as it was measured on that device under that engine, where it was."""
    rows = list[Row]()
    for row in tower.step.plan.rows:
        if isinstance(row, Op) and row.name == "attention":
            width = row.inputs[0].dims[-1].coef
            if known := measured_attention(tower.device.name, tower.engine.name, width):
                row = row.but(attrs={**row.attrs, "measured": tuple(known)})
        rows.append(row)
    return replace(tower, step=replace(tower.step, plan=replace(tower.step.plan, rows=tuple(rows))))


def deploy_encoder(
    model: ModelProfile, device: DeviceProfile, engine: EngineProfile, image: tuple[int, int], *, ranks: int = 1,
    tp_mode: str = "weights", options: Options = Options(),
) -> Encoder:
    """The tower on ``ranks`` GPUs that work together, for images of ``image`` (width, height) pixels.

    Raises :class:`InputError`, one line, where the model takes none, or the tower is not cut so.
    """
    if tp_mode not in TP_MODES:
        raise unknown_name("--encoder-tp-mode", tp_mode, TP_MODES)
    if ranks < 1:
        raise InputError(f"--tp {ranks}: must be at least 1")
    said = vision_of(model)
    cut = encoded_image(model, *image)
    tp = ranks if tp_mode == "weights" else 1
    own = Options(fusion=options.fusion)  # no other is of a tower
    try:
        made = deploy(model, device, engine, Layout(tp, tp=tp), "encode", options=own)
    except InputError as problem:
        if tp == 1 or "heads" not in str(problem):
            raise
        raise InputError(f"{problem}; --encoder-tp-mode data gives each rank the whole tower") from None
    made = _as_measured(made)
    levels = 1 + len(said.vision_config.get("deepstack_visual_indexes") or ())
    return Encoder(
        deployment=made, ranks=ranks, tp_mode=tp_mode, image=cut, width=said.hidden_size * levels
    )
