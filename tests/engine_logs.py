"""What engines logged of weights and cache in public threads, beside what is worked out here: ``--write PAGE``."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from tensorcast.deploy.deployment import Deployment, deploy
from tensorcast.deploy.engine_log import cache_log
from tensorcast.deploy.layout import parse_layout
from tensorcast.deploy.model_names import named_model
from tensorcast.deploy.options import Options
from tensorcast.profiles.releases import nearest_release
from tensorcast.profiles.store import load_device, load_engine

GIB = float(1 << 30)
SORTED_LOGIT_BYTES = 37
"""Of a logit while top-p sorted it, before github.com/vllm-project/vllm/pull/33538, which measured 1.25 GB for 256
sequences of a vocabulary of 131,072."""


@dataclass(frozen=True)
class Log:
    """A line of a log: what it says (``weights``, ``room`` in GiB, ``tokens``) and under which settings.

    ``thread``: on GitHub, or an address. ``release``: of the engine that it names. ``share``: 0.0 is the engine's own.
    ``step_tokens``: max_num_batched_tokens; 0: the engine's own. ``sorts``: a release that sorted logits. ``marlin``:
    of MXFP4 experts, as the log says, or its release without triton_kernels (vllm 0.11, quantization/mxfp4.py), where
    0.24.0 has another kernel. ``kv``: cache precision, if not the checkpoint's. ``stage``: of the first pipeline stage.
    ``unreached``: why the figure is not met.
    """

    thread: str
    model: str
    device: str
    layout: str
    release: str
    what: str
    logged: float
    share: float = 0.9
    step_tokens: int = 0
    sorts: bool = False
    marlin: bool = False
    kv: str = ""
    stage: bool = False
    length: int = 0
    unreached: str = ""


QWEN3_235B = ("vllm-project/vllm/issues/21348", "qwen3-235b-a22b-fp8", "h100", "tp4")
GPT_OSS = ("gpt-oss-120b", "h100", "tp1")
QWEN3_30B = ("sgl-project/sglang/pull/17392", "qwen3-30b-a3b", "h20-141gb", "tp1-dp4-ep4", "sglang 0.5")
LLAMA_8B = ("vllm-project/vllm/issues/10517", "llama-3.1-8b", "rtx-3090", "tp1", "vllm 0.6")
A100_PAGE = "https://myoceane.fr/index.php/ai-vllm-a100-gemma-4"
GPT_OSS_20B = (A100_PAGE, "gpt-oss-20b", "a100", "tp1", "vllm 0.19")
GEMMA_26B = (A100_PAGE, "gemma-4-26b-a4b", "a100", "tp1", "vllm 0.19")
OTEL = "farbodtavakkoli/OTel/blob/eefe56453d2136439072dda5c90e8c109883643a/inference/tensorrtllm/llm/README.md"

LOGS = (
    Log(*QWEN3_235B, "vllm 0.10", "room", 8.11, sorts=True),
    Log(*QWEN3_235B, "vllm 0.10", "tokens", 178_880, sorts=True, length=40_960),
    Log(*QWEN3_235B, "sglang 0.4", "tokens", 367_404, share=0.93, length=40_960),
    Log("vllm-project/vllm/issues/27508", *GPT_OSS, "vllm 0.11", "room", 1.71, share=0.95, step_tokens=1024,
        sorts=True, marlin=True),
    Log("vllm-project/vllm/issues/27508", *GPT_OSS, "vllm 0.11", "room", -2.28, sorts=True, marlin=True),
    Log("vllm-project/vllm/issues/23278", *GPT_OSS, "vllm 0.10", "weights", 65.9651, sorts=True, marlin=True),
    Log("vllm-project/vllm/issues/23278", *GPT_OSS, "vllm 0.10", "room", -2.14, sorts=True, marlin=True),
    Log("vllm-project/vllm/issues/33155", *GPT_OSS, "vllm 0.14", "weights", 64.4, sorts=True),
    Log(*GPT_OSS_20B, "weights", 13.72, share=0.65),
    Log(*GPT_OSS_20B, "room", 36.56, share=0.65),
    Log(*GEMMA_26B, "weights", 48.5, unreached="the vision encoder, 1.1 GiB in bf16, is not counted"),
    Log(*GEMMA_26B, "room", 21.5),
    Log("redhat-performance/configiq/issues/112", "gemma-4-31b", "h200", "tp1", "vllm 0.24", "room", 64.68,
        share=0.92),
    Log("deepseek-ai/DeepSeek-V3/issues/205", "deepseek-v3", "h100", "tp8-pp4", "vllm 0.6", "weights", 16.96,
        stage=True),
    Log("sgl-project/sglang/pull/11309", "deepseek-v3.2", "b200", "tp1-dp8", "sglang 0.5", "tokens", 1_462_784,
        share=0.8, kv="fp8", length=65_536, unreached="this is the state that the pull request mends: the indexer's "
        "132 bytes of a token and layer, of 708, were not counted, so that the cache took them of what should "
        "stay free; without them 1,430,000"),
    Log("MiniMax-AI/MiniMax-M2.5/issues/30", "minimax-m2.5", "h100", "tp4-pp4", "vllm 0.1x", "weights", 13.2,
        stage=True),
    Log("uccl-project/uccl/issues/924", "kimi-k2.5", "h200", "tp8-ep8", "vllm 0.2x", "weights", 71.34),
    Log("ai-dynamo/aiconfigurator/issues/1396", "nvidia/Kimi-K2.5-NVFP4", "b200", "tp1-dp4-ep4", "vllm 0.22", "room",
        8.74, share=0.92),
    Log("vllm-project/vllm/issues/17469", "qwen3-30b-a3b", "h100", "tp4", "vllm 0.8", "weights", 14.2474, sorts=True),
    Log(*QWEN3_30B, "weights", 16.39, share=0.8),
    Log(*QWEN3_30B, "tokens", 1_029_388, share=0.8, length=40_960),
    Log("sgl-project/sglang/pull/18263", "qwen3-30b-a3b", "mi355x", "tp1", "sglang 0.5", "weights", 56.98, share=0.0),
    Log("sgl-project/sglang/pull/18263", "qwen3-30b-a3b", "mi355x", "tp1", "sglang 0.5", "room", 204.63, share=0.0),
    Log("ai-dynamo/aisimulate/pull/263", "deepseek-r1", "h200", "tp8", "sglang 0.5", "tokens", 509_000, share=0.82,
        length=163_840),
    Log("vllm-project/vllm/issues/40691", "qwen3.5-27b", "h20-141gb", "tp1", "vllm 0.19", "tokens", 1_082_655,
        step_tokens=16_384, length=32_768),
    Log("vllm-project/vllm/issues/6746", "meta-llama/Llama-3.1-405B-Instruct-FP8", "h100", "tp8", "vllm 0.5", "weights",
        57.752, sorts=True),
    Log(*LLAMA_8B, "weights", 14.9888, step_tokens=20_000, sorts=True),
    Log(*LLAMA_8B, "tokens", 31_232, step_tokens=20_000, sorts=True, length=20_000),
    Log(OTEL, "qwen3-0.6b", "h100", "tp1", "trtllm 1.2", "tokens", 643_136, length=40_960),
)  # fmt: skip


def deployed(log: Log) -> Deployment:
    """The engine as the log's command set it."""
    name, _, release = log.release.partition(" ")
    near = nearest_release(release, load_engine(name).releases)  # of those whose rules were read
    engine, (model, _) = load_engine(f"{name}=={near}" if near else name), named_model(log.model)
    device, changes = load_device(log.device), dict[str, object]()
    if log.share:  # given on the command line, so the engine's own rule does not count
        changes |= {"reserve": None, "memory_fraction": engine.memory_fraction.model_copy(update={"value": log.share})}
    if engine.profiled_step is not None and log.sorts:
        changes["profiled_step"] = engine.profiled_step.model_copy(update={"logit_bytes": SORTED_LOGIT_BYTES})
    if engine.step_tokens is not None and log.step_tokens:
        own = engine.step_tokens.model_copy(update={"from_mib": {}, "devices": {}})
        changes |= {"step_tokens": own, "max_tokens_per_step": log.step_tokens}
    if log.marlin:  # which pads as on Ampere, where no other kernel runs
        device = device.model_copy(update={"architecture": load_device("a100").architecture})
    found = deploy(model, device, engine, parse_layout(log.layout), "decode", options=Options(kv_dtype=log.kv))
    return replace(found, engine=engine.model_copy(update=changes))


def ours(log: Log) -> float:
    """The logged figure, worked out."""
    found = deployed(log)
    if log.what == "tokens":
        return float(cache_log(found, log.length).tokens)
    if log.what == "room":
        return float(found.memory(1, 1, 0).cache_budget) / GIB
    if log.stage:
        return float(found.stages.weights[0]) / GIB
    return float(found.memory(1, 1, 0).weights) / GIB


def table(logs: tuple[Log, ...] = LOGS) -> str:
    """A Markdown table, a line per figure."""
    lines = ["| thread | model, device, layout | release, share | what | logged | here |", "|---|---|---|---|--:|--:|"]
    for log in logs:
        unit = "" if log.what == "tokens" else " GiB"
        what = {"tokens": "cache, tokens", "room": "room for the cache", "weights": "weights per GPU"}[log.what]
        what, share = what + " of the first stage" * log.stage, f"{log.share:g}" if log.share else "its own"
        digits = 0 if log.what == "tokens" else 2
        link = log.thread if "://" in log.thread else f"https://github.com/{log.thread}"
        name = log.thread.removeprefix("https://").partition("/blob/")[0]
        lines.append(
            f"| [{name}]({link}) | {log.model}, {log.device}, {log.layout} "
            f"| {log.release}, {share} | {what} | {log.logged:,.{digits}f}{unit} | {ours(log):,.{digits}f}{unit} |"
        )
    lines += ["", *(f"* {log.model}, {log.what}: {log.unreached}." for log in logs if log.unreached)]
    return "\n".join(lines)


BLOCK = re.compile(r"(?<=<!-- python tests/engine_logs.py --write docs/checkpoints.md -->\n).*(?=\n<!-- end -->)", re.S)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        page = Path(sys.argv[2])
        text = page.read_text("utf-8")
        page.write_text(BLOCK.sub(lambda _: table(), text), "utf-8")
    else:
        print(table())
