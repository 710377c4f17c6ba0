"""Images through a model's vision tower, from Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorcast.api.deployments import device_profile
from tensorcast.arguments import python_names

if TYPE_CHECKING:
    from tensorcast.deploy.encoder.encoder import EncodeStep


@python_names
def simulate_encoder(
    model: str,
    *,
    device: str,
    image_size: str,
    images: int = 1,
    tp: int = 1,
    encoder_tp_mode: str = "weights",
    engine: str = "vllm",
    fusion: str = "engine",
) -> EncodeStep:
    """Simulate ``images`` of ``image_size`` pixels (``"1280x720"``, width first) through the vision tower of ``model``.

    ``tp`` GPUs work together: the tower is cut over them (``encoder_tp_mode="weights"``), or each has all of it and
    images of its own (``"data"``). What is modelled, and what not, is told in docs/vision.md. Raises
    :class:`tensorcast.InputError`, one line, for a model that takes no images and on anything that cannot be.

    >>> import tensorcast as tc
    >>> step = tc.simulate_encoder("qwen3-vl-30b-a3b", device="h200", image_size="1280x720")  # doctest: +SKIP
    >>> step.seconds, step.encoder.image.tokens  # doctest: +SKIP
    """
    from tensorcast.deploy.encoder.encoder import Images, deploy_encoder
    from tensorcast.deploy.model_names import named_model
    from tensorcast.deploy.options import options_of
    from tensorcast.profiles.store import load_engine
    from tensorcast.profiles.vision.images import parse_image_size

    profile, _ = named_model(model)
    asked = Images(count=images, **dict(zip(("width", "height"), parse_image_size(image_size), strict=True)))
    encoder = deploy_encoder(
        profile, device_profile(device), load_engine(engine), (asked.width, asked.height), ranks=tp,
        tp_mode=encoder_tp_mode, options=options_of({"fusion": fusion}),
    )
    encoder.check_room(asked.count)
    return encoder.price(float(asked.count))
