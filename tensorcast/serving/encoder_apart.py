"""Encoders on GPUs of their own (EPD): embeddings of images are made there and handed over to those that read prompts.

Each encoder is one GPU with the whole tower, which takes requests one by one, all their images at once (vLLM 0.33.0,
``--mm-encoder-only`` with an ``ec_producer``; SGLang 0.5.23, ``--encoder-only``). Servers of the language model hold no
tower and wait for none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tensorcast.deploy.encoder.encoder import EncodeStep

BUSY = 0.9
"""Share of its time that an encoder is planned to be busy at most, as prefill pools are."""


@dataclass(frozen=True, kw_only=True)
class EncoderPool:
    """``gpus`` encoders. ``step``: the images of one request on one of them."""

    step: EncodeStep
    gpus: int

    @property
    def seconds(self) -> float:
        """Of one request's images, without a queue."""
        return float(self.step.seconds)

    @property
    def most_per_s(self) -> float:
        """Requests per second of encoders that never wait."""
        return self.gpus / self.seconds

    @property
    def hand_over_s(self) -> float:
        """A request's embeddings on their way, from one GPU over the device's outermost tier: connectors of both
        engines send them over the network (Mooncake)."""
        tier = self.step.encoder.deployment.device.interconnect[-1]
        sent = float(self.step.images) * self.step.encoder.embedding_bytes
        return float(tier.latency_s) + sent / float(tier.bandwidth_bytes_per_s)

    def busy(self, rate: float) -> float:
        """Share of its time that an encoder works, at ``rate`` requests per second to all."""
        return rate / self.most_per_s

    def added_s(self, rate: float) -> float:
        """Seconds until a request's embeddings are where its prompt is read: a queue before one of the encoders (M/D/1,
        requests dealt out at random), its images, the way."""
        busy = self.busy(rate)
        wait = busy * self.seconds / (2 * (1 - busy)) if busy < 1 else float("inf")
        return wait + self.seconds + self.hand_over_s


@dataclass(frozen=True, kw_only=True)
class EncodedServing:
    """A way to serve prompts with images. ``encoder_gpus``: beside those that ``layout`` names; 0: encoded where
    prompts are read. ``encoder_busy``: of their time. Rates are of all GPUs, ``gpus`` with the encoders'."""

    layout: str
    mode: str
    gpus: int
    encoder_gpus: int
    requests_per_s: float
    concurrency: float
    ttft_s: float
    tpot_s: float
    tokens_per_s_per_gpu: float
    encoder_busy: float | None = None


@dataclass(frozen=True, kw_only=True)
class EncoderSplit:
    """Of one device, engine and number of GPUs: the best with each number of encoders apart, best first, and the best
    with none. ``encode_s``: of one request's images on one GPU."""

    device: str
    engine: str
    gpus: int
    encode_s: float
    hand_over_s: float
    apart: tuple[EncodedServing, ...]
    together: EncodedServing | None

    def record(self) -> dict[str, Any]:
        """Plain values, units in the names."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What must be kept: longest times, least requests per second and users, and the tokens of a reply."""

    output_len: int
    ttft_s: float | None = None
    tpot_s: float | None = None
    request_rate: float | None = None
    users: int | None = None

    def keeps(self, one: EncodedServing) -> bool:
        """Whether a way to serve does."""
        late = one.ttft_s > (self.ttft_s or float("inf")) or one.tpot_s > (self.tpot_s or float("inf"))
        return not late and one.requests_per_s >= (self.request_rate or 0) and one.concurrency >= (self.users or 0)


def best_with(
    rows: Iterable[Mapping[str, Any]], wanted: Wanted, pool: EncoderPool | None = None, most_gpus: int | None = None
) -> EncodedServing | None:
    """The way of ``rows`` (candidates of a search) that brings most tokens per GPU within what is wanted; None where
    none does.

    With a ``pool`` of encoders before it: every request is in flight so much longer, and no more come per second than
    the encoders take at :data:`BUSY`. The batch that decodes, and so the rate, stays.
    """
    found = []
    for row in rows:
        rate, encoders = row["output_tokens_per_s"] / wanted.output_len, 0 if pool is None else pool.gpus
        gpus = int(row["gpus"]) + encoders
        if (pool is not None and pool.busy(rate) > BUSY) or gpus > (most_gpus or gpus):
            continue
        added = 0.0 if pool is None else pool.added_s(rate)
        named = f"{row['prefill_workers']:.0f} x {row['prefill_layout']} > {row['decode_workers']:.0f} x " \
            if row["mode"] == "disaggregated" else f"{row['replicas']} x "
        one = EncodedServing(
            layout=f"{named}{row['layout']}", mode=row["mode"], gpus=gpus, encoder_gpus=encoders, requests_per_s=rate,
            concurrency=row["concurrency"] + rate * added, ttft_s=row["ttft_s"] + added, tpot_s=row["tpot_s"],
            tokens_per_s_per_gpu=row["output_tokens_per_s"] / gpus,
            encoder_busy=None if pool is None else pool.busy(rate),
        )  # fmt: skip
        if wanted.keeps(one):
            found.append(one)
    return max(found, key=lambda one: one.tokens_per_s_per_gpu, default=None)
