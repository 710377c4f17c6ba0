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
from tensorcast.profiles.store import load_device, load_engine

GIB = float(1 << 30)
SORTED_LOGIT_BYTES = 37
"""Of a logit while top-p sorted it, before github.com/vllm-project/vllm/pull/33538, which measured 1.25 GB for 256
sequences of a vocabulary of 131,072."""


@dataclass(frozen=True)
class Log:
    """A line of a log: what it says (``weights``, ``room`` in GiB, ``tokens``) and under which settings.

    ``step_tokens``: max_num_batched_tokens; 0: the engine's own. ``sorts``: a release that sorted logits. ``stage``: of
    the first pipeline stage.
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
    stage: bool = False
    length: int = 0


LOGS = (
    Log("vllm-project/vllm/issues/21348", "qwen3-235b-a22b-fp8", "h100", "tp4", "vllm 0.10", "room", 8.11, sorts=True),
    Log("vllm-project/vllm/issues/21348", "qwen3-235b-a22b-fp8", "h100", "tp4", "vllm 0.10", "tokens", 178_880,
        sorts=True, length=40_960),
    Log("vllm-project/vllm/issues/27508", "gpt-oss-120b", "h100", "tp1", "vllm 0.11", "room", 1.71, share=0.95,
        step_tokens=1024, sorts=True),
    Log("vllm-project/vllm/issues/23278", "gpt-oss-120b", "h100", "tp1", "vllm 0.10", "room", -2.14, sorts=True),
    Log("vllm-project/vllm/issues/33155", "gpt-oss-120b", "h100", "tp1", "vllm 0.14", "weights", 64.4, sorts=True),
    Log("redhat-performance/configiq/issues/112", "gemma-4-31b", "h200", "tp1", "vllm 0.24", "room", 64.68, share=0.92),
    Log("deepseek-ai/DeepSeek-V3/issues/205", "deepseek-v3", "h100", "tp8-pp4", "vllm 0.6", "weights", 16.96,
        stage=True),
    Log("MiniMax-AI/MiniMax-M2.5/issues/30", "minimax-m2.5", "h100", "tp4-pp4", "vllm 0.1x", "weights", 13.2,
        stage=True),
    Log("uccl-project/uccl/issues/924", "kimi-k2.5", "h200", "tp8-ep8", "vllm 0.2x", "weights", 71.34),
    Log("vllm-project/vllm/issues/17469", "qwen3-30b-a3b", "h100", "tp4", "vllm 0.8", "weights", 14.2474, sorts=True),
    Log("ai-dynamo/aiconfigurator/issues/1423", "nvidia/Kimi-K2.5-NVFP4", "b200", "tp4", "vllm 0.2x", "room", 8.0),
)  # fmt: skip


def deployed(log: Log) -> Deployment:
    """The engine as the log's command set it."""
    engine, (model, _) = load_engine("vllm"), named_model(log.model)
    step = engine.profiled_step
    assert step is not None and engine.step_tokens is not None
    update = {"logit_bytes": SORTED_LOGIT_BYTES} if log.sorts else {}
    changes: dict[str, object] = {
        "profiled_step": step.model_copy(update=update),
        "memory_fraction": engine.memory_fraction.model_copy(update={"value": log.share}),
    }
    if log.step_tokens:
        own = engine.step_tokens.model_copy(update={"from_mib": {}, "devices": {}})
        changes |= {"step_tokens": own, "max_tokens_per_step": log.step_tokens}
    found = deploy(model, load_device(log.device), engine, parse_layout(log.layout), "decode")
    return replace(found, engine=engine.model_copy(update=changes))


def ours(log: Log) -> float:
    """The logged figure, worked out."""
    found = deployed(log)
    if log.what == "tokens":
        return float(cache_log(found, log.length).tokens)
    if log.what == "room":
        return float(found.memory(1, 1, 0).cache_budget) / GIB
    if log.stage:
        return float(found.stage_weights[0][0]) / GIB
    return float(found.memory(1, 1, 0).weights) / GIB


def table(logs: tuple[Log, ...] = LOGS) -> str:
    """A Markdown table, a line per figure."""
    lines = ["| thread | model, device, layout | release, share | what | logged | here |", "|---|---|---|---|--:|--:|"]
    for log in logs:
        unit = "" if log.what == "tokens" else " GiB"
        what = {"tokens": "cache, tokens", "room": "room for the cache", "weights": "weights per GPU"}[log.what]
        digits = 0 if log.what == "tokens" else 2
        lines.append(
            f"| [{log.thread}](https://github.com/{log.thread}) | {log.model}, {log.device}, {log.layout} "
            f"| {log.release}, {log.share:g} | {what}{' of the first stage' if log.stage else ''} "
            f"| {log.logged:,.{digits}f}{unit} | {ours(log):,.{digits}f}{unit} |"
        )
    return "\n".join(lines)


BLOCK = re.compile(r"(?<=<!-- python tests/engine_logs.py --write docs/checkpoints.md -->\n).*(?=\n<!-- end -->)", re.S)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        page = Path(sys.argv[2])
        text = page.read_text("utf-8")
        page.write_text(BLOCK.sub(lambda _: table(), text), "utf-8")
    else:
        print(table())
