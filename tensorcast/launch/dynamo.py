"""A deployment as Dynamo's operator takes it: a frontend and a worker of each role in one graph.

nvidia.com/v1beta1 ``DynamoGraphDeployment``, Dynamo 1.6 (docs.nvidia.com/dynamo/v1.6.2, kubernetes; workers' own
flags: github.com/ai-dynamo/dynamo, components/src/dynamo/vllm/backend_args.py and its siblings): components with a pod
template each, whose container is called ``main``. Workers are the engine behind Dynamo's wrapper, which takes the
engine's flags.
"""

from __future__ import annotations

import shlex
from typing import Any

from tensorcast.errors import InputError
from tensorcast.launch.pools import Deployment, Pool

VERSION = "1.6.2"
"""Of the images; each holds an engine of its own release."""

RUNTIMES = {"vllm": "vllm-runtime", "sglang": "sglang-runtime", "trtllm": "tensorrtllm-runtime"}

SERVED_BY_FRONTEND = ("--host", "--port")
"""Flags of a server that workers behind the frontend have not."""

CONFIG = "/config"


def graph(made: Deployment, name: str, shared_memory: str) -> list[dict[str, Any]]:
    """The graph, after a ConfigMap of files that its workers read, if they read any."""
    if any(pool.nodes > 1 for pool in made.pools):
        raise InputError("--manifests dynamo: is for servers of one node each; use kubernetes for larger ones")
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
    container: dict[str, Any] = {
        "name": "main", "image": image, "command": ["python3", "-m", f"dynamo.{made.engine}"],
        "args": worker_flags(made, pool), "resources": {"limits": {"nvidia.com/gpu": str(pool.gpus)}},
        "envFrom": [{"secretRef": {"name": "hf-token-secret", "optional": True}}],
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }  # fmt: skip
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": shared_memory}}]
    if pool.launch.config_files:
        container["volumeMounts"].append({"name": "config", "mountPath": CONFIG})
        volumes.append({"name": "config", "configMap": {"name": f"{name}-config"}})
    kind = "worker" if pool.role == "server" else pool.role
    return {"name": kind, "type": kind, "replicas": pool.servers,
            "podTemplate": {"spec": {"containers": [container], "volumes": volumes}}}  # fmt: skip


def worker_flags(made: Deployment, pool: Pool) -> list[str]:
    """The server's own flags, as the wrapper takes them: the model by a flag, the role said to the wrapper."""
    words = shlex.split(pool.launch.commands[0].replace("\\\n", " "))
    first = next(i for i, word in enumerate(words) if word.startswith("--"))
    flags, found = words[first:], list[str]()
    if made.engine == "vllm":
        found += ["--model", words[first - 1]]
    elif made.engine == "trtllm":
        found += ["--model-path", words[first - 1]]
    skipped = False
    for word in flags:
        if skipped or word in SERVED_BY_FRONTEND:
            skipped = not skipped
            continue
        if made.engine == "trtllm" and word == "--config":
            word = "--extra-engine-args"
        found.append(f"{CONFIG}/{word}" if word in pool.launch.config_files else word)
    if pool.role != "server" and made.engine != "sglang":  # SGLang's own flag says it already
        found += ["--disaggregation-mode", pool.role]
    return found
