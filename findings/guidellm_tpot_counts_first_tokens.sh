#!/usr/bin/env bash
# TPOT of one load generator is not TPOT of another, nor that of its own objective.
#
# Packages: guidellm 0.8.1 (Apache-2.0), schemas/base/request_stats.py and schemas/benchmark/goodput.py; vllm 0.33.0
# (Apache-2.0), benchmarks/serve.py.
# Guess: the "TPOT" that a client of an OpenAI server prints is the time between tokens after the first, as vLLM's is.
# Seen: GuideLLM's has the first token's time in it: a request with its first token after 200 ms and 99 more, 10 ms each,
# has a TPOT of 11.9 ms in its table and of 10 in vLLM's; at 2 s to the first token 29.9 ms. What vLLM calls so is its ITL.
# Its own objective named tpot is held against the ITL: a limit of 15 ms is met by the request whose printed TPOT is 29.9.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q guidellm==0.8.1 torch==2.13.0 2>/dev/null
python3 -m pip download -q --no-deps --only-binary :all: vllm==0.33.0 --python-version 3.11 -d "$folder" 2>/dev/null
"$folder/venv/bin/python" - "$folder" <<'PY'
import ast
import inspect
import sys
import zipfile
from pathlib import Path

import guidellm.benchmark.schemas.metrics as metrics
from guidellm.schemas import GenerativeRequestStats, RequestInfo, RequestTimings, UsageMetrics
from guidellm.schemas.benchmark.goodput import GoodputSLO


def request(first_s: float, each_s: float, tokens: int) -> GenerativeRequestStats:
    end = first_s + each_s * (tokens - 1)
    timings = RequestTimings(
        request_start=0.0, request_end=end, first_token_iteration=first_s, last_token_iteration=end,
        first_request_iteration=first_s, last_request_iteration=end, token_iterations=tokens, request_iterations=tokens,
    )
    return GenerativeRequestStats(
        request_id="one", info=RequestInfo(request_id="one", status="completed", timings=timings),
        input_metrics=UsageMetrics(text_tokens=100), output_metrics=UsageMetrics(text_tokens=tokens),
    )


serve = zipfile.ZipFile(next(Path(sys.argv[1]).glob("vllm-*.whl"))).read("vllm/benchmarks/serve.py").decode()
lines = [ast.unparse(node) for node in ast.walk(ast.parse(serve)) if isinstance(node, ast.Assign)]
assert "latency_minus_ttft = outputs[i].latency - outputs[i].ttft" in lines
assert "tpot = latency_minus_ttft / (output_len - 1)" in lines
print("first token   GuideLLM's TPOT   its ITL   vLLM's TPOT   (ms)")
for first_s, printed in ((0.2, 11.9), (2.0, 29.9)):
    one = request(first_s, 0.010, 100)
    vllm = 1e3 * (one.request_latency - first_s) / 99
    print(f"{1e3 * first_s:11.0f}{one.time_per_output_token_ms:18.2f}{one.inter_token_latency_ms:10.2f}{vllm:14.2f}")
    assert abs(one.time_per_output_token_ms - printed) < 0.05 and abs(one.inter_token_latency_ms - 10.0) < 1e-6
    assert abs(vllm - 10.0) < 1e-6
late = request(2.0, 0.010, 100)
met = GoodputSLO(tpot_ms=15.0).is_conforming(
    ttft_ms=late.time_to_first_token_ms, tpot_ms=late.inter_token_latency_ms, e2el_ms=None
)
print(f"an objective of tpot 15 ms, request with a printed TPOT of {late.time_per_output_token_ms:.1f} ms: met {met}")
summary = "".join(inspect.getsource(metrics).split())  # what a benchmark holds against the objective
assert "is_conforming(" in summary and "tpot_ms=stats.inter_token_latency_ms" in summary
assert met
PY
