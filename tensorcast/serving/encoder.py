"""Images of prompts, encoded on the GPUs that read the prompts: what that adds to a prefill step, and holds."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np

from tensorcast.deploy.deployment import Deployment
from tensorcast.deploy.encoder.encoder import TP_MODES, Encoder, EncodeStep, Images, deploy_encoder
from tensorcast.errors import InputError, unknown_name
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.engine import EngineProfile
from tensorcast.profiles.kept import same
from tensorcast.profiles.model import ModelProfile
from tensorcast.profiles.vision.images import parse_image_size
from tensorcast.profiles.vision.said import encoded_image
from tensorcast.serving.prefill_costs import PrefillCosts
from tensorcast.serving.traffic import Array


@dataclass(frozen=True, kw_only=True)
class PromptImages:
    """What comes with every prompt, and how a server's ranks share its tower.

    ``apart``: encoders have GPUs of their own; then servers of the language model hold no tower and wait for none.
    """

    images: Images
    tp_mode: str = "weights"
    apart: bool = False

    def tokens(self, model: ModelProfile) -> int:
        """Of a prompt, beside those of its text. Raises :class:`InputError` where the model takes no images."""
        return self.images.count * encoded_image(model, self.images.width, self.images.height).tokens

    def tower(self, model: ModelProfile, device: DeviceProfile, engine: EngineProfile, tp: int) -> Encoder:
        """The tower of a server of ``tp`` ranks; where its heads do not divide over them each has all of it, as vLLM
        0.33.0 falls back to (``models/vision.py``, ``is_vit_use_data_parallel``)."""
        made = functools.partial(
            deploy_encoder, model, device, engine, (self.images.width, self.images.height), ranks=tp
        )
        try:
            return made(tp_mode=self.tp_mode)
        except InputError:
            if self.tp_mode == "data" or tp == 1:
                raise
            return made(tp_mode="data")

    def held(self, server: Deployment) -> Deployment:
        """A server that holds its tower beside the language model, unless encoders are apart."""
        if self.apart:
            return replace(server, engine=without_tower(server.engine))
        tower = self.tower(server.model, server.device, server.engine, server.layout.tp)
        return replace(server, tower_bytes=tower.weight_bytes)

    def of_prompt(self, model: ModelProfile, device: DeviceProfile, engine: EngineProfile, tp: int) -> EncodeStep:
        """The images of one prompt through that tower."""
        return self.tower(model, device, engine, tp).price(float(self.images.count))


def without_tower(engine: EngineProfile) -> EngineProfile:
    """An engine whose servers hold no tower: it leaves no memory for one (SGLang 0.5.23, ``memory_hook.py``: not of a
    server that is ``language_only``)."""
    reserve = engine.reserve
    if reserve is None or reserve.vision is None:
        return engine
    return same(engine.model_copy(update={"reserve": reserve.model_copy(update={"vision": None})}))


def prompt_images(count: int | None, size: str | None, tp_mode: str | None) -> PromptImages | None:
    """Images as they are asked for: none where ``count`` is 0. Raises :class:`InputError` on half a question."""
    if count is None:
        if said := next((f"{flag} {value}" for flag, value in (("--image-size", size), ("--encoder-tp-mode", tp_mode))
                         if value is not None), ""):
            raise InputError(f"{said}: is of --images-per-request, and none is given")
        return None
    if size is None:
        raise InputError(f"--images-per-request {count}: say how large they are, as in --image-size 1280x720")
    width, height = parse_image_size(size)
    if count < 1:
        raise InputError(f"--images-per-request {count}: must be at least 1")
    if tp_mode not in (None, *TP_MODES):
        raise unknown_name("--encoder-tp-mode", str(tp_mode), TP_MODES)
    return PromptImages(images=Images(count=count, width=width, height=height), tp_mode=tp_mode or "weights")


def with_images(costs: PrefillCosts, steps: list[EncodeStep]) -> PrefillCosts:
    """``costs`` with the images of every prompt encoded before it is read, a step for each entry.

    They run with the prompt's first chunk; a server's other work waits for them as for the prompt.
    """
    seconds, error = (np.array([float(getattr(one, name)) for one in steps]) for name in ("kernels_s", "error"))
    several = costs.per_step > 1
    # of a prompt that takes several steps each has its part
    added: Array = seconds * np.minimum(costs.per_step, 1.0)
    whole = costs.step_s + added
    share = added / np.maximum(whole, 1e-30)
    said = [one.evidence() for one in steps]
    shares = {
        kind: np.array([one[kind] / max(sum(one.values()), 1e-30) if kind in one else 0.0 for one in said])
        for kind in costs.evidence
    }
    turn_s = costs.fixed_s + costs.prompt_s
    return replace(
        costs, fixed_s=costs.fixed_s + np.where(several, 0.0, added),
        passes=1 + (costs.passes - 1) * turn_s / (turn_s + added),  # the first stage alone encodes
        prompt_s=costs.prompt_s + np.where(several, seconds, 0.0), step_s=whole,
        error=(1 - share) * costs.error + share * error,
        evidence={kind: (1 - share) * value + share * shares[kind] for kind, value in costs.evidence.items()},
    )  # fmt: skip
