"""A deployment as Dynamo's operator takes it: a frontend and a worker of each role in one graph.

nvidia.com/v1beta1 ``DynamoGraphDeployment``, Dynamo 1.6 (docs.nvidia.com/dynamo/v1.6.2, kubernetes; workers' own
flags: github.com/ai-dynamo/dynamo, components/src/dynamo/vllm/backend_args.py and its siblings): components with a pod
template each, whose container is called ``main``. Workers are the engine behind Dynamo's wrapper, which takes the
engine's flags. A server over several nodes is a component of so many (``multinode``, which needs Grove or
LeaderWorkerSet): the operator tells each node its place by flags of its own, deploy/operator/internal/dynamo,
backend_vllm.go (003d1ee), backend_sglang.go and backend_trtllm.go (015d780).
"""

from __future__ import annotations

import itertools
import math
import re
import shlex
from typing import Any

from tensorcast.launch.pools import Deployment, Pool
from tensorcast.launch.settings import HERE

VERSION = "1.6.2"
"""Of the images; each holds an engine of its own release."""

RUNTIMES = {"vllm": "vllm-runtime", "sglang": "sglang-runtime", "trtllm": "tensorrtllm-runtime"}

SERVED_BY_FRONTEND = ("--host", "--port")
"""Flags of a server that workers behind the frontend have not."""

PLACED = {
    "vllm": (
        "--nnodes", "--node-rank", "--master-addr", "--master-port", "--data-parallel-size-local",
        "--data-parallel-start-rank", "--data-parallel-address", "--data-parallel-rpc-port",
    ),
    "sglang": ("--nnodes", "--node-rank", "--dist-init-addr"),
    "trtllm": (),
}
"""Flags of a node's place, which the operator gives."""

VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*=")

CONFIG = "/config"


def graph(made: Deployment, name: str, shared_memory: str) -> list[dict[str, Any]]:
    """The graph, after a ConfigMap of files that its workers read, if they read any."""
    image = f"nvcr.io/nvidia/ai-dynamo/{RUNTIMES[made.engine]}:{VERSION}"
    frontend = {"name": "main", "image": image, "command": ["python3", "-m", "dynamo.frontend"]}
    components = [
        {"name": "Frontend", "type": "frontend", "replicas": 1, "podTemplate": {"spec": {"containers": [frontend]}}},
        *(_worker(made, pool, image, name, shared_memory) for pool in made.pools),
    ]
    found: list[dict[str, Any]] = []
    if files := {file: text for pool in made.pools for file, text in pool.launch.config_files.items()}:
        found.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"{name}-config"}, "data": files})
    return [*found, {
        "apiVersion": "nvidia.com/v1beta1", "kind": "DynamoGraphDeployment", "metadata": {"name": name},
        "spec": {"backendFramework": made.engine, "components": components},
    }]  # fmt: skip


def _worker(made: Deployment, pool: Pool, image: str, name: str, shared_memory: str) -> dict[str, Any]:
    nodes = math.ceil(pool.gpus / made.gpus_per_node)
    container: dict[str, Any] = {
        "name": "main", "image": image, "command": ["python3", "-m", f"dynamo.{made.engine}"],
        "args": worker_flags(made, pool), "resources": {"limits": {"nvidia.com/gpu": str(pool.gpus // nodes)}},
        "envFrom": [{"secretRef": {"name": "hf-token-secret", "optional": True}}],
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }  # fmt: skip
    if variables := environment(pool):
        container["env"] = variables
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": shared_memory}}]
    if pool.launch.config_files:
        container["volumeMounts"].append({"name": "config", "mountPath": CONFIG})
        volumes.append({"name": "config", "configMap": {"name": f"{name}-config"}})
    kind = "worker" if pool.role == "server" else pool.role
    several = {"multinode": {"nodeCount": nodes}} if nodes > 1 else {}
    return {"name": kind, "type": kind, "replicas": pool.servers, **several,
            "podTemplate": {"spec": {"containers": [container], "volumes": volumes}}}  # fmt: skip


def environment(pool: Pool) -> list[dict[str, Any]]:
    """Variables that a server's command begins with; the pod says its own address."""
    found = list[dict[str, Any]]()
    for word in itertools.takewhile(VARIABLE.match, _words(pool)):
        name, _, value = word.partition("=")
        own = value == HERE
        found.append({"name": name, "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}} if own else
                     {"name": name, "value": value})  # fmt: skip
    return found


def _words(pool: Pool) -> list[str]:
    return shlex.split(pool.launch.commands[0].replace("\\\n", " "))


def worker_flags(made: Deployment, pool: Pool) -> list[str]:
    """The server's own flags, as the wrapper takes them: the model by a flag, the role said to the wrapper."""
    words = _words(pool)
    if made.engine == "trtllm":  # what starts it on every node is the operator's
        words = words[words.index("trtllm-serve") :]
    first = next(i for i, word in enumerate(words) if word.startswith("--"))
    flags, found = words[first:], list[str]()
    if made.engine == "vllm":
        found += ["--model", words[first - 1]]
    elif made.engine == "trtllm":
        found += ["--model-path", words[first - 1]]
    skipped = False
    for word in flags:
        if skipped or word in (*SERVED_BY_FRONTEND, *PLACED[made.engine]):
            skipped = not skipped
            continue
        if made.engine == "trtllm" and word == "--config":
            word = "--extra-engine-args"
        found.append(f"{CONFIG}/{word}" if word in pool.launch.config_files else word)
    if pool.role != "server" and made.engine != "sglang":  # SGLang's own flag says it already
        found += ["--disaggregation-mode", pool.role]
    return found
