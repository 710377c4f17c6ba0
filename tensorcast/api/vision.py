"""Images through a model's vision tower, from Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tensorcast.api.deployments import device_profile
from tensorcast.arguments import python_names
from tensorcast.errors import InputError

if TYPE_CHECKING:
    from tensorcast.deploy.encoder.encoder import EncodeStep
    from tensorcast.search.compare import Comparison
    from tensorcast.search.search_task import SearchTask
    from tensorcast.serving.encoder_apart import EncodedServing, EncoderSplit


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


@python_names
def compare_encoders(comparison: Comparison, encoder_gpus: Sequence[int] | None = None) -> list[EncoderSplit]:
    """Encoders on GPUs of their own beside the tower on the GPUs that read prompts, of a :func:`compare` of prompts
    with images: for every device, engine and size that was asked about, by tokens per GPU of both together.

    ``encoder_gpus``: numbers to try; several up to half of the GPUs if not given. Raises
    :class:`tensorcast.InputError` for a comparison without images, and for one of pools of two devices.
    """
    if second := next((task.pools[-1].device.name for task in comparison.tasks if task.pools), ""):
        raise InputError(f"--encoder-gpus: compares servers of --device alone; leave out --decode-device {second}")
    if comparison.tasks[0].images is None:
        raise InputError("--encoder-gpus: is of prompts with images; say --images-per-request and --image-size")
    return [_split(comparison, task, encoder_gpus) for task in comparison.tasks]


ENCODERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Numbers of encoders that are tried."""
SERVERS = (1, 2, 4, 8)
"""Sizes of servers of which there are whole numbers on the other GPUs."""


def _split(comparison: Comparison, task: SearchTask, encoder_gpus: Sequence[int] | None) -> EncoderSplit:
    from tensorcast.serving.encoder_apart import EncoderPool, EncoderSplit, Wanted, best_with

    assert task.images is not None
    step = task.images.of_prompt(task.model, task.device, task.engine, 1)
    wanted = Wanted(
        output_len=int(task.load.output_len), ttft_s=task.ttft_s, tpot_s=task.tpot_s, request_rate=task.request_rate,
        users=task.users,
    )
    numbers = [n for n in ENCODERS if n <= task.gpus // 2] if encoder_gpus is None else encoder_gpus
    found: list[EncodedServing] = []
    for number in numbers:
        if not 0 < number < task.gpus:
            raise InputError(f"--encoder-gpus {number}: must be at least 1 and less than --world-size {task.gpus}")
        pool = EncoderPool(step=step, gpus=number)
        left = task.gpus - number
        sizes = {left // whole * whole for whole in SERVERS if left >= whole}  # whole servers may leave some
        rows = [row for size in sorted(sizes) for row in _rows(task, size, pool.added_s(0.0))]
        best = best_with(rows, wanted, pool, task.gpus)
        found += [] if best is None else [best]
    kept = comparison.kept
    own = (kept["device"] == task.device.name) & (kept["engine"] == task.engine.name) & (kept["gpus"] <= task.gpus)
    pool = EncoderPool(step=step, gpus=1)
    return EncoderSplit(
        device=task.device.name, engine=task.engine.name, gpus=task.gpus, encode_s=pool.seconds,
        hand_over_s=pool.hand_over_s, together=best_with(kept.where(own).records(), wanted),
        apart=tuple(sorted(found, key=lambda one: -one.tokens_per_s_per_gpu)),
    )


def _rows(task: SearchTask, gpus: int, added_s: float) -> list[dict[str, Any]]:
    """Candidates on ``gpus`` of the language model alone, whose first tokens leave ``added_s`` of the limit."""
    from tensorcast.search.search import search

    assert task.images is not None
    layouts = tuple([layout for layout in task.layouts if gpus % layout.world_size == 0])
    left = None if task.ttft_s is None else task.ttft_s - added_s
    if (task.layouts and not layouts) or (left is not None and left <= 0):
        return []
    alone = replace(
        task, images=replace(task.images, apart=True), gpus=gpus, layouts=layouts, ttft_s=left,
        objective="tokens_per_gpu", request_rate=None, users=None, budget=None, confidence=None,
    )
    found = search(alone).candidates
    return found.where(found["meets"].astype(bool)).records() if len(found) else []
