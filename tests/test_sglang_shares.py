"""``--mem-fraction-static`` as our commands print it, beside what SGLang's release works out of the same flags.

Expected numbers by hand from the released functions: 0.5.23, arg_groups/memory_hook.py (handle_gpu_memory_settings and
what it calls) and cuda_graph_hook.py (what captures no prompts); 0.5.14, server_args.py. The commands of the
spread were given to the functions themselves, taken out of the wheels, on H200, B200, H100, L40S and RTX 4090 on
2026-11-30: they agree to the third digit.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import tensorcast as tc
from tensorcast.deploy.deployment import deploy
from tensorcast.deploy.layout import parse_layout
from tensorcast.deploy.options import Options
from tensorcast.launch.launch import launch
from tensorcast.profiles.memory import MIB, Served
from tensorcast.profiles.store import load_device, load_engine, load_model

PLAIN = 512 + 1.5 * 8192 + 1024
"""Of eight ranks in MiB: what is always there, a chunk of 8192 tokens, and an eighth of a GiB a rank."""

DUAL = Options(all2all="low_latency", dual_batch_overlap=True)


def printed(model: str, layout: str, options: Options, release: str, role: str | None = None, **more: Any) -> float:
    sizes: dict[str, Any] = {"batch": 64, "input_len": 2048, "output_len": 512, "device": load_device("h200")} | more
    found = launch(f"sglang=={release}", load_model(model), parse_layout(layout), options, role=role, **sizes)
    assert not found.problem
    share = re.search(r"--mem-fraction-static (\S+)", found.commands[0])
    assert share is not None
    return float(share[1])


@pytest.mark.parametrize(
    ("release", "model", "layout", "options", "left_mib"),
    [
        # captured sizes of prompts: 58 up to 8192; with DeepEP 38 multiples of 8 up to 2048, and 1 GiB beside them
        ("0.5.23", "qwen3-235b-a22b", "tp8", Options(), PLAIN + 2 * 64 + 8 * 58),
        ("0.5.23", "qwen3-235b-a22b", "dp8-ep8", Options(all2all="low_latency"),
         PLAIN + 64 * (2 + 3 * 8) + 8 * 38 + 1024 + 2048),
        # none in halved steps, with other exchanges' kernels, under decode context parallelism, with no graphs at all
        ("0.5.23", "qwen3-235b-a22b", "dp8-ep8", DUAL, PLAIN + 64 * (2 + 3 * 8) + 2048),
        ("0.5.23", "deepseek-v3", "dp8-ep8", Options(all2all="nixl_ep"), PLAIN + 64 * (2 + 3 * 8)),
        ("0.5.23", "deepseek-v3", "tp8-ep8", Options(dcp=8), PLAIN + 2 * 64),
        ("0.5.23", "deepseek-v3", "tp8", Options(cuda_graphs="none"), PLAIN),
        ("0.5.23", "deepseek-v3", "dp8-ep8", Options(cuda_graphs="none", all2all="low_latency"), PLAIN + 64 * 3 * 8),
        # sees only if told to, so that its prompts are captured
        ("0.5.23", "llama-4-scout", "tp8", Options(), PLAIN + 2 * 64 + 8 * 58),
        # up to the length of sequences that it is told: 2560 tokens, 40 sizes; none where experts are moved
        ("0.5.14", "qwen3-235b-a22b", "tp8", Options(), PLAIN + 2 * 64 + 8 * 40),
        ("0.5.14", "qwen3-235b-a22b", "tp8-ep8", Options(placement="eplb", redundant_experts=8), PLAIN + 2 * 64),
        ("0.5.14", "deepseek-v3", "tp8-ep8", Options(), PLAIN + 2 * 64 + 1536),
        ("0.5.14", "deepseek-v3", "tp8", Options(cuda_graphs="none"), PLAIN + 2 * 64),  # counted all the same
    ],
)
def test_the_share_is_what_the_release_sets(
    release: str, model: str, layout: str, options: Options, left_mib: float
) -> None:
    capacity = float(load_device("h200").memory_bytes) / MIB
    assert printed(model, layout, options, release) == round((capacity - left_mib) / capacity, 3)


@pytest.mark.parametrize(
    ("model", "factor"),
    [
        ("kimi-k2.5", 0.95 * (1.1 - 0.1 * 27 * 1152**2 / (24 * 1024**2))),
        # their classes keep width and depth by names that SGLang does not look for: a tower of the usual size
        ("kimi-k3", 0.95), ("step-3.7-flash", 0.95), ("llama-4-scout", 1.0), ("mistral-small-24b", 1.0),
    ],
)  # fmt: skip
def test_towers_as_the_release_reads_them(model: str, factor: float) -> None:
    capacity, plain = float(load_device("h200").memory_bytes) / MIB, PLAIN + 2 * 64
    latent, text = model.startswith("kimi"), model in ("llama-4-scout", "mistral-small-24b")
    captured = 0.0 if model in ("kimi-k3", "step-3.7-flash") else 1536 if latent else 8 * 58 * text
    expected = round((capacity - plain - captured) / capacity, 3) * factor
    assert printed(model, "tp8", Options(), "0.5.23") == round(expected, 3)


def test_prompts_that_no_server_captures_are_launched_one_by_one() -> None:
    """Priced as the engine runs them: beside the same steps of a server that captures."""
    gpu, engine, tokens = load_device("h200"), load_engine("sglang"), np.array([64.0, 512.0])
    for model, layout, options in (
        ("qwen3-235b-a22b", "dp8-ep8", Options(all2all="nixl_ep")), ("deepseek-v3", "tp8", Options(cuda_graphs="none")),
    ):  # fmt: skip
        one = deploy(load_model(model), gpu, engine, parse_layout(layout), "prefill", options=options)
        assert one.step.pricer.graph_tokens == 0
    for options, captured in ((Options(all2all="high_throughput"), 1024), (Options(all2all="nixl_ep"), 0), (DUAL, 0)):
        one = deploy(load_model("qwen3-235b-a22b"), gpu, engine, parse_layout("dp8-ep8"), "prefill", options=options)
        assert one.step.pricer.graph_tokens == captured and np.all(one.step.seconds(1.0, tokens, 0.0) > 0)
    rule = engine.prefill_graphs
    assert rule is not None
    aligned = {-(-size // 8) * 8 for size in (*range(4, 33, 4), *range(48, 257, 16), *range(288, 513, 32),
                                              *range(576, 1025, 64), *range(1280, 2049, 256))}  # fmt: skip
    assert rule.count(16384, "low_latency") == len(aligned) == 38
    assert not rule.run_with(Served(pcp=2)) and rule.run_with(Served("flashinfer_nvlink_one_sided"))


def test_chunks_of_several_ranks_are_counted_by_gpu() -> None:
    """SGLang counts a chunk before it deals it out: 16 ranks of 8192 tokens would leave 192 GiB of 140 free. What is
    counted is a GPU's own step, at least what the engine takes unasked."""
    layout, options = "dp16-ep16", Options(all2all="high_throughput")
    own = printed("deepseek-v3", layout, options, "0.5.23")
    assert printed("deepseek-v3", layout, options, "0.5.23", chunk_tokens=8192) == own
    more = printed("deepseek-v3", layout, options, "0.5.23", chunk_tokens=16384)
    capacity = float(load_device("h200").memory_bytes) / MIB
    assert own - more == pytest.approx(1.5 * 8192 / capacity, abs=2e-3)


@pytest.mark.parametrize("layout", ["tp8", "dp8-ep8"])
def test_what_was_compared_fits_into_the_share_of_its_command(layout: str) -> None:
    """Weights and the cache of the largest batch at every chunk, beside what the printed share leaves free."""
    model, gpu = "qwen3-235b-a22b", load_device("h200")
    found = tc.compare(
        model, device="h200", world_size=8, input_len=4000, output_len=500, engine="sglang", layouts=[layout],
        modes=["aggregated"], all2all=["auto"],
    ).candidates
    assert set(found["chunk_tokens"]) >= {2048, 16384}
    largest = found[found["batch"] == found["largest_batch"]]
    for row in largest.to_dict("records"):
        share = printed(
            model, layout, Options(), "0.5.23", batch=int(row["batch"]), chunk_tokens=int(row["chunk_tokens"])
        )
        assert row["weights_bytes"] + row["kv_cache_bytes"] <= (share + 5e-4) * float(gpu.memory_bytes)
    assert largest.groupby("chunk_tokens")["batch"].max().is_monotonic_decreasing
