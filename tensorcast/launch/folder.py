"""A folder that starts a deployment: a script per role, the router, a health check, a benchmark, and manifests."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence

from tensorcast.errors import unknown_name
from tensorcast.launch.manifests import WRITERS
from tensorcast.launch.pools import (
    PORTS,
    ROUTER_PORT,
    Deployment,
    disaggregated_yaml,
    role_script,
    router_words,
    variable,
)

WARM, ROUNDS = 2, 10
"""Requests per user before a benchmark counts, and while it does; ``predict`` expects as many."""


def files(made: Deployment, manifests: Sequence[str] = ()) -> dict[str, str]:
    """Texts by file name. Raises :class:`InputError` where a manifest cannot say what is asked."""
    found = {f"{pool.role}.sh": role_script(pool) for pool in made.pools}
    if made.routed:
        found |= router(made)
    found |= {"wait.sh": _wait(made), "bench.sh": benchmark(made), "runs.csv": _row(made)}
    for name in manifests:
        if name not in WRITERS:
            raise unknown_name("--manifests", name, WRITERS)
        found[f"{name}.yaml"] = WRITERS[name](made)
    return {**found, "README.md": _readme(made, found)}


def _needs(hosts: Sequence[str]) -> list[str]:
    return [f': "${{{variable(host)}:?the address of the first node of {host}}}"' for host in hosts]


def router(made: Deployment) -> dict[str, str]:
    """The script of the router, in front of several servers."""
    hosts = [host for pool in made.pools for host in made.hosts(pool)]
    addresses = {host: f"${{{variable(host)}}}" for host in hosts}
    lines = ["#!/usr/bin/env bash", f"# sends every request on; users ask port {ROUTER_PORT} here"]
    lines += [f"# pip install {made.engine}-router"] if made.engine != "trtllm" else []
    lines += ["set -euo pipefail", *_needs(hosts)]
    if made.engine == "trtllm":
        if len(made.pools) == 1:
            lines[1] = f"# trtllm-serve has no router for equal servers: nginx deals requests out on port {ROUTER_PORT}"
            servers = "\n".join(f"  server {addresses[host]}:{PORTS['trtllm']};" for host in hosts)
            lines += [
                "cat > nginx.conf <<END", "events {}", "http {", "upstream servers {", "  least_conn;", servers, "}",
                f"server {{ listen {ROUTER_PORT}; location / {{ proxy_pass http://servers; proxy_buffering off; "
                "proxy_read_timeout 3600s; } }", "}", "END", 'exec nginx -c "$PWD/nginx.conf" -g "daemon off;"',
            ]  # fmt: skip
            return {"router.sh": "\n".join(lines) + "\n"}
        lines += ["cat > router.yaml <<END", *disaggregated_yaml(made, addresses).splitlines(), "END"]
    words = " \\\n  ".join(word if word.startswith("$") or "${" in word else shlex.quote(word)
                          for word in router_words(made, addresses))  # fmt: skip
    return {"router.sh": "\n".join([*lines, f"exec {words}"]) + "\n"}


def _wait(made: Deployment) -> str:
    """Asks every server's ``/health`` until it answers; all three engines and their routers have it."""
    hosts = [host for pool in made.pools for host in made.hosts(pool)]
    every = " ".join(f'"${{{variable(host)}}}"' for host in hosts)
    return "\n".join([
        "#!/usr/bin/env bash", "# waits until every server answers; WAIT_S seconds at most", "set -euo pipefail",
        *_needs(hosts), f"for host in {every}; do",
        '  end=$((SECONDS + ${WAIT_S:-3600}))',
        f'  until curl --silent --fail --max-time 5 "http://$host:{PORTS[made.engine]}/health" > /dev/null; do',
        '    if [ "$SECONDS" -ge "$end" ]; then', '      echo "$host does not answer" >&2', "      exit 1", "    fi",
        "    sleep 5", "  done", '  echo "$host answers"', "done",
    ]) + "\n"  # fmt: skip


def benchmark(made: Deployment) -> str:
    """The engine's own load generator at the load that was priced; its result is ``result.json``.

    vLLM 0.33.0, benchmarks/serve.py: a range ratio of 0 is the length itself; sglang 0.5.23, benchmark/serving.py: 1
    is; TensorRT-LLM, serve/scripts/benchmark_serving.py, has vLLM's older one, which counts as vLLM's does.
    """
    port = ROUTER_PORT if made.routed else PORTS[made.engine]
    base, model = f"http://${{SERVER:-127.0.0.1}}:{port}", shlex.quote(made.model)
    common = [
        f"--model {model}", "--dataset-name random", f"--random-input-len {made.input_len}",
        f"--random-output-len {made.output_len}", f"--max-concurrency {made.users}",
        f"--num-prompts {ROUNDS * made.users}",
    ]  # fmt: skip
    if made.engine == "sglang":
        words = ["python3 -m sglang.bench_serving", "--backend sglang-oai", f'--base-url "{base}"', *common,
                 "--random-range-ratio 1.0", f"--warmup-requests {WARM * made.users}", "--output-file result.json"]
    else:
        own = made.engine == "vllm"
        program = "vllm bench serve" if own else "python3 -m tensorrt_llm.serve.scripts.benchmark_serving"
        words = [program, f"--backend {'vllm' if own else 'openai'}", f'--base-url "{base}"', *common,
                 "--random-range-ratio 0.0", "--ignore-eos", "--percentile-metrics ttft,tpot,itl,e2el",
                 "--save-result", "--result-filename result.json"]  # fmt: skip
    said = ["# then: tensorcast predict runs.csv --result result.json", "# SERVER: the address of the router or server"]
    return "\n".join(["#!/usr/bin/env bash", *said, "set -euo pipefail", " \\\n  ".join(words)]) + "\n"


def _row(made: Deployment) -> str:
    columns = {**made.row, "isl": made.input_len, "osl": made.output_len, "concurrency": made.users}
    cells = [json.dumps(str(value)) if re.search(r'[,"\n]', str(value)) else str(value) for value in columns.values()]
    return ",".join(columns) + "\n" + ",".join(cells) + "\n"


def _readme(made: Deployment, found: dict[str, str]) -> str:
    lines = [f"# {made.model} under {made.engine} {made.version}", "", "| role | servers | GPUs each | nodes each |",
             "|---|---:|---:|---:|"]  # fmt: skip
    lines += [f"| {pool.role} | {pool.servers} | {pool.gpus} | {pool.nodes} |" for pool in made.pools]
    steps = []
    for pool in made.pools:
        nodes = f" with `node0` to `node{pool.nodes - 1}`, `HEAD_NODE_IP` set" if pool.nodes > 1 else ""
        steps.append(f"On the nodes of each {pool.role}: `bash {pool.role}.sh`{nodes}.")
    hosts = [variable(host) for pool in made.pools for host in made.hosts(pool)]
    steps.append(f"With {', '.join(f'`{host}`' for host in hosts)} set to the servers' first nodes: `bash wait.sh`"
                 + (", then `bash router.sh`." if made.routed else "."))  # fmt: skip
    steps.append("`SERVER=ADDRESS bash bench.sh` measures at the load that was priced; `tensorcast predict runs.csv "
                 "--result result.json` sets measured beside predicted.")  # fmt: skip
    if "compose.yaml" in found:
        steps.append("Or all on this machine: `docker compose up`.")
    if "kubernetes.yaml" in found:
        steps.append("Or on Kubernetes with LeaderWorkerSet: `kubectl apply -f kubernetes.yaml`.")
    if "dynamo.yaml" in found:
        steps.append("Or under Dynamo's operator, whose frontend takes the router's place (its image has an engine of "
                     "its own release): `kubectl apply -f dynamo.yaml`.")  # fmt: skip
    notes = dict.fromkeys(note for pool in made.pools for note in pool.launch.notes)
    lines += ["", *(f"{n}. {step}" for n, step in enumerate(steps, 1))]
    return "\n".join([*lines, *(["", *(f"- {note}" for note in notes)] if notes else [])]) + "\n"
