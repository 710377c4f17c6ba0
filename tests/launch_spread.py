"""Launch commands of every shipped model, engine and release, over a spread of layouts and options.

``python tests/launch_spread.py`` writes all of them as JSON lines (engine, release, model, case, command), for a run of
the engines' own parsers (``docs/launching.md``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from tensorcast.deploy.exchange_kernels import EXCHANGE_KERNELS
from tensorcast.deploy.layout import broken_rules, parse_layout
from tensorcast.deploy.options import Options
from tensorcast.errors import InputError
from tensorcast.launch.launch import launch, launch_encoder
from tensorcast.profiles.launch import load_launch_table
from tensorcast.profiles.model import ModelProfile
from tensorcast.profiles.store import list_models, load_device, load_model
from tensorcast.profiles.vision.said import sees

RELEASES = {name: load_launch_table(name).releases for name in ("vllm", "sglang")}


class Case(NamedTuple):
    """A layout, its options, which phase the server runs, and sequences per rank."""

    layout: str
    options: Options = Options()
    role: str | None = None
    batch: int = 64
    encoders: bool = False
    encoder_tp_mode: str | None = None


EXPERTS = (
    Case("tp8"), Case("tp8-ep8"), Case("tp16", batch=4), Case("dp8-ep8"), Case("tp2-dp4-ep8", batch=700),
    Case("tp8-pp2"), Case("tp8-ep8", Options(kv_dtype="fp8")), Case("tp8-pp2", Options(mtp_depth=1)),
    Case("dp16-ep16", Options(all2all="low_latency", dual_batch_overlap=True)),
    Case("dp16-ep16", Options(all2all="high_throughput", dual_batch_overlap=True), "prefill"),
    Case("dp32-ep32", Options(all2all="low_latency", redundant_experts=32, placement="eplb"), "decode"),
    Case("dp8-ep8", Options(all2all="allgather_reducescatter", placement="eplb")), Case("tp4", Options(mtp_depth=3)),
    Case("dp8-ep8", Options(all2all="low_latency", dispatch="fp8_block", mtp_depth=1)),
    Case("tp8", Options(quant="fp8")), Case("tp8-ep8", Options(quant="fp8_block")), Case("tp8", role="prefill"),
    Case("tp8-ep8", role="decode", batch=600), Case("tp8", Options(shared_experts_fusion=False)),
    Case("tp8-ep8", Options(redundant_experts=8)), Case("tp8-ep8", Options(placement="round_robin")),
    *(Case("dp8-ep8", Options(all2all=kind)) for kind in EXCHANGE_KERNELS),
    *(Case("tp8-ep8", Options(mtp_depth=2, speculative_method=method)) for method in ("eagle3", "ngram", "dspark")),
    Case("tp8-ep8", Options(dcp=8)), Case("tp8-ep8", Options(dcp=2)), Case("dp8-ep8", Options(state_dtype="float32")),
    Case("tp8", Options(cuda_graphs="piecewise", allreduce_fusion="off")), Case("tp8", Options(compiled=False)),
    Case("tp8", Options(cuda_graphs="none", custom_all_reduce=False)),
)  # fmt: skip
"""Of models with experts."""

SEEING = (
    Case("tp8", encoder_tp_mode="data"), Case("tp8", encoders=True), Case("tp4", role="prefill", encoders=True),
    Case("tp4", role="decode", encoder_tp_mode="weights"), Case("tp1", role="encode"),
)
"""Of models that take images, too."""

DENSE = (
    Case("tp8"), Case("tp4-dp2"), Case("tp8-pp2"), Case("tp16"), Case("tp1-dp8", batch=700), Case("tp2-pp2"),
    Case("tp8", Options(quant="fp8")), Case("tp4", Options(kv_dtype="fp8")), Case("tp8", role="prefill"),
    Case("tp8", role="decode"), Case("tp4", Options(mtp_depth=2)), Case("tp8", Options(quant="nvfp4")),
    *(Case("tp4", Options(mtp_depth=2, speculative_method=method)) for method in ("eagle3", "ngram", "dflash")),
    Case("tp16", Options(dcp=2)), Case("tp4", Options(state_dtype="bfloat16")),
    Case("tp4", Options(cuda_graphs="none", compiled=False)), Case("tp4", Options(allreduce_fusion="on")),
)  # fmt: skip
"""Of others."""


class Printed(NamedTuple):
    """A command, and what it starts."""

    engine: str
    release: str
    model: str
    case: str
    command: str


def printed(model: ModelProfile, engine: str, release: str, cases: tuple[Case, ...]) -> Iterator[Printed]:
    """Commands of the cases that the engine can run."""
    device = load_device("h200")
    for case in cases:
        if any(broken_rules(parse_layout(case.layout), model.stated_facts, device)):  # heads that do not divide
            continue
        try:
            sizes: dict[str, Any] = {"batch": case.batch, "input_len": 2048, "output_len": 512, "device": device}
            if case.role == "encode":
                found = launch_encoder(f"{engine}=={release}", model, **sizes)
            else:
                found = launch(
                    f"{engine}=={release}", model, parse_layout(case.layout), case.options, role=case.role,
                    encoders=case.encoders, encoder_tp_mode=case.encoder_tp_mode, **sizes,
                )  # fmt: skip
        except InputError:  # nothing that an engine could be asked for
            continue
        said = f"{case.layout} {case.role or ''} {case.options}"
        for command in found.commands:
            yield Printed(engine, release, model.name, said, command)


def every() -> Iterator[Printed]:
    for name in list_models():
        model = load_model(name)
        for engine, releases in RELEASES.items():
            for release in releases:
                own = SEEING if sees(model) else ()
                yield from printed(model, engine, release, (EXPERTS if model.num_experts else DENSE) + own)


def few(engine: str, release: str) -> Iterator[Printed]:
    """Every model with some of the cases, each case with some of the models."""
    for i, name in enumerate(list_models()):
        model = load_model(name)
        cases = EXPERTS if model.num_experts else DENSE
        first = 3 * i + 2 * RELEASES[engine].index(release)
        own = SEEING if sees(model) else ()
        yield from printed(model, engine, release, (*(cases[(first + step) % len(cases)] for step in range(2)), *own))


if __name__ == "__main__":
    for one in every():
        print(json.dumps(one))
