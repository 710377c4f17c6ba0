"""Replays beside other simulators': requests per CPU second of the same traces, DeepSeek-V3 on 32 H200, in one run.

``python benchmarks/replay_peers.py [--aisimulate ENV/bin/aisimulate] [--vidur ENV/bin/python] [--trace FILE] [--most
N]``: a Mooncake trace, and ``--most`` requests like Azure's (log-normal lengths, mean 1,155 and 211 tokens, Poisson
at 8 per second). Each command runs as its users run it; counted are CPU seconds, user and system, of the whole
command less those of the same command on the first request alone: start, profiles, prices. The others have virtual
environments of their own. AISimulate 0.13 is a pre-release of the package index (``pip install --pre --only-binary
:all: aisimulate``). Vidur 0.0.26 installs, but its linear-regression predictor is an abstract class there, and
fetches its measured tables from a Hugging Face dataset: :data:`VIDUR` fills in what it lacks and lets every kernel
take as long, at the cost of a dictionary's look-up, as with its tables. It runs four replicas of a Llama of its own;
Mooncake's prompts are too long for it. Targets: twenty times Vidur's requests per CPU second, ten times AISimulate's.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from tensorcast.scheduling.requests import Length, drawn

OURS = f"{sys.executable} -m tensorcast replay deepseek-v3 -d h200 --layout '4 x tp8-ep8' --trace {{trace}} --json"

THEIRS = """traffic:
  source: {{type: trace, format: mooncake, paths: [{trace}]}}
  load: {{type: trace_timestamps}}
engine:
  mode: aggregated
  model: deepseek-ai/DeepSeek-V3
  hardware: h200_sxm
  backend: vllm
  workers:
    aggregated:
      parallelism: {{replicas: 4, tensor: 8, moe_tensor: 1, moe_expert: 8}}
"""

VIDUR = """import collections
from vidur.execution_time_predictor import sklearn_execution_time_predictor as tables
from vidur.execution_time_predictor.linear_regression_execution_time_predictor import (
    LinearRegressionExecutionTimePredictor as Predictor)
class Table(dict):
    def __missing__(self, key): return 0.05
tables.SklearnExecutionTimePredictor._load_predictions_from_hf = lambda self: collections.defaultdict(Table)
Predictor._get_kv_parallel_communication_time = lambda self, *a, **k: 0.0
Predictor.__abstractmethods__ = frozenset()
from vidur.main import main
main()
"""

VIDUR_OPTIONS = """--cluster_config_num_replicas 4 --execution_time_predictor_config_type linear_regression
--no-linear_regression_execution_time_predictor_config_use_native_execution_time_predictor
--request_generator_config_type trace_replay --replica_scheduler_config_type sarathi --no-metrics_config_write_metrics
--no-metrics_config_enable_chrome_trace --no-metrics_config_store_plots --no-metrics_config_write_json_trace
--no-metrics_config_store_token_completion_metrics --no-metrics_config_store_batch_metrics
--no-metrics_config_store_utilization_metrics --no-metrics_config_store_request_metrics
--trace_request_generator_config_trace_file"""


def azure_like(count: int, folder: Path) -> Path:
    """``count`` requests as Mooncake's lines, no two with the same beginning."""
    asked = drawn(count, Length(1155, 1.1, "lognormal"), Length(211, 0.9, "lognormal"), rate=8.0)
    lengths = np.minimum(asked.input_len, 30_000).tolist(), np.minimum(asked.output_len, 2000).tolist()
    path, first = folder / "azure.jsonl", 0
    with path.open("w") as file:
        for when, prompt, reply in zip(asked.arrival_s.tolist(), *lengths, strict=True):
            blocks = range(first, first := first + -(-prompt // 512))
            row = {"timestamp": round(1e3 * when), "input_length": prompt, "output_length": reply}
            file.write(json.dumps({**row, "hash_ids": list(blocks)}) + "\n")
    return path


def cpu_s(command: Sequence[str]) -> float:
    """CPU seconds of a command and whatever it starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=alone)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed: {done.stderr[-500:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def words(name: str, command: str, trace: Path) -> list[str]:
    if name == "vidur":
        driver, table = trace.with_suffix(".py"), trace.with_suffix(".csv")
        driver.write_text(VIDUR)
        rows = [json.loads(line) for line in trace.read_text().splitlines()]
        lines = [
            f"2023-08-21,{row['timestamp'] / 1e3},{min(row['input_length'], 3000)},{min(row['output_length'], 1000)}"
            for row in rows
        ]
        table.write_text("\n".join(["Date,Time,PromptTokenCount,CompletionTokenCount", *lines]) + "\n")
        output = ["--metrics_config_output_dir", str(trace.parent)]
        return [command, str(driver), *output, *VIDUR_OPTIONS.split(), str(table)]
    if name != "aisimulate":
        return shlex.split(command.format(trace=trace))
    config = trace.with_suffix(".yaml")
    config.write_text(THEIRS.format(trace=trace))
    return [command, "predict", "--config", str(config), "--output-dir", str(trace.with_suffix("")), "--overwrite"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, help="a Mooncake trace, also gzipped")
    parser.add_argument("--most", type=int, default=20_000, help="requests like Azure's; 0 for none")
    parser.add_argument("--aisimulate", help="its command")
    parser.add_argument("--vidur", help="the interpreter that has it")
    parser.add_argument("--command", action="append", default=[], metavar="NAME=COMMAND")
    options = parser.parse_args()
    tools = {"tensorcast": OURS, **({"aisimulate": options.aisimulate} if options.aisimulate else {})}
    tools |= {"vidur": options.vidur} if options.vidur else {}
    tools |= dict(one.split("=", 1) for one in options.command)
    table = Table("trace", "requests", "tool", "CPU s, one request", "CPU s, all", "requests per CPU s", box=None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        traces = []
        if options.trace is not None:
            raw = options.trace.read_bytes()
            whole = folder / "mooncake.jsonl"
            whole.write_bytes(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
            traces.append(whole)
        if options.most:
            traces.append(azure_like(options.most, folder))
        for trace in traces:
            lines = trace.read_text().splitlines(keepends=True)
            one = folder / f"one-{trace.name}"
            one.write_text(lines[0])
            for tool, command in tools.items():
                if tool == "vidur" and trace.stem == "mooncake":
                    continue
                start, whole_s = (cpu_s(words(tool, command, path)) for path in (one, trace))
                each = f"{(len(lines) - 1) / (whole_s - start):,.0f}"
                table.add_row(trace.stem, f"{len(lines):,}", tool, f"{start:.1f}", f"{whole_s:.1f}", each)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
