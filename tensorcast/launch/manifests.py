"""A deployment as YAML: ``docker compose`` for one node, Kubernetes with LeaderWorkerSet for any number, or Dynamo."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

from tensorcast.errors import InputError
from tensorcast.launch.dynamo import graph
from tensorcast.launch.pools import (
    IMAGES,
    PORTS,
    ROUTER_PORT,
    Deployment,
    Pool,
    disaggregated_yaml,
    role_script,
    router_words,
)
from tensorcast.launch.settings import HEAD, HERE

SHARED_MEMORY = "64Gi"
"""Of ``/dev/shm``, through which ranks of a node talk: engines' own guides ask for 10 to 64 GB."""


def compose(made: Deployment) -> str:
    """``compose.yaml``: a service per server with GPUs of its own, the router in front once all answer.

    Compose specification: services.*.deploy.resources.reservations.devices, healthcheck, configs with content.
    """
    gpus = sum(pool.servers * pool.gpus for pool in made.pools)
    if gpus > made.gpus_per_node:
        raise InputError(f"--manifests compose: is for one machine of {made.gpus_per_node} GPUs, and {gpus} are needed")
    services: dict[str, Any] = {}
    at = 0
    for pool in made.pools:
        for host in made.hosts(pool):
            own = [str(at + n) for n in range(pool.gpus)]
            at += pool.gpus
            services[host] = {
                "image": _image(made), "entrypoint": ["bash", f"/launch/{pool.role}.sh"], "ipc": "host",
                "configs": [{"source": pool.role, "target": f"/launch/{pool.role}.sh"}], "working_dir": "/launch",
                "environment": {"HF_TOKEN": "${HF_TOKEN:-}"},
                "volumes": ["${HF_HOME:-~/.cache/huggingface}:/root/.cache/huggingface"],
                "deploy": {"resources": {"reservations": {"devices": [
                    {"driver": "nvidia", "device_ids": own, "capabilities": ["gpu"]}
                ]}}},
                "healthcheck": {"test": ["CMD", "curl", "--fail", f"http://localhost:{PORTS[made.engine]}/health"],
                                "interval": "10s", "start_period": "3600s", "retries": 3},
            }  # fmt: skip
    configs = {pool.role: {"content": role_script(pool).replace("$", "$$")} for pool in made.pools}
    if made.routed:
        services["router"], configs["router"] = _compose_router(made, list(services))
    else:
        port = PORTS[made.engine]
        next(iter(services.values()))["ports"] = [f"{port}:{port}"]
    return _yaml({"services": services, "configs": configs})


def _compose_router(made: Deployment, hosts: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    return {
        "image": _router_image(made), "entrypoint": ["bash", "/launch/router.sh"], "working_dir": "/launch",
        "ports": [f"{ROUTER_PORT}:{ROUTER_PORT}"], "configs": [{"source": "router", "target": "/launch/router.sh"}],
        "depends_on": {host: {"condition": "service_healthy"} for host in hosts},
    }, {"content": _router_script(made, {host: host for host in hosts}).replace("$", "$$")}  # fmt: skip


def kubernetes(made: Deployment) -> str:
    """``kubernetes.yaml``: a LeaderWorkerSet per pool, scripts in a ConfigMap, the router as a Deployment, a Service.

    leaderworkerset.x-k8s.io/v1, lws v0.7 (api/leaderworkerset/v1/leaderworkerset_types.go): a group's pods have
    ``LWS_LEADER_ADDRESS`` and ``LWS_WORKER_INDEX``, and the leader of replica N is ``NAME-N`` in the service ``NAME``.
    """
    if any(pool.launch.engine == "trtllm" and "srun" in pool.launch.commands[0].split() for pool in made.pools):
        raise InputError("--manifests kubernetes: trtllm starts over several nodes by Slurm; use one node a server")
    name = _name(made)
    scripts = {f"{pool.role}.sh": role_script(pool) for pool in made.pools}
    documents: list[dict[str, Any]] = []
    for pool in made.pools:
        documents.append(_leader_worker_set(made, pool, f"{name}-{pool.role}", f"{name}-launch"))
    if made.routed:
        addresses = {
            host: f"{name}-{pool.role}-{n}.{name}-{pool.role}"
            for pool in made.pools for n, host in enumerate(made.hosts(pool))
        }  # fmt: skip
        scripts["router.sh"] = _router_script(made, addresses)
        documents.append(_router_deployment(made, f"{name}-router", f"{name}-launch"))
    selector = {"app": f"{name}-router"} if made.routed else {
        "leaderworkerset.sigs.k8s.io/name": f"{name}-{made.pools[0].role}",
        "leaderworkerset.sigs.k8s.io/worker-index": "0",
    }  # fmt: skip
    port = ROUTER_PORT if made.routed else PORTS[made.engine]
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
               "spec": {"selector": selector, "ports": [{"name": "http", "port": 80, "targetPort": port}]}}
    table = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"{name}-launch"}, "data": scripts}
    return "---\n".join(_yaml(one) for one in [table, *documents, service])


def dynamo(made: Deployment) -> str:
    """``dynamo.yaml``: one graph for Dynamo's operator (:mod:`tensorcast.launch.dynamo`)."""
    return "---\n".join(map(_yaml, graph(made, _name(made), SHARED_MEMORY)))


def _name(made: Deployment) -> str:
    return "".join(c if c.isalnum() else "-" for c in made.model.rpartition("/")[2].lower()).strip("-")[:40]


def _leader_worker_set(made: Deployment, pool: Pool, name: str, scripts: str) -> dict[str, Any]:
    port, on_node = PORTS[made.engine], pool.gpus // pool.nodes
    start = f"bash /launch/{pool.role}.sh" + (' "node$LWS_WORKER_INDEX"' if pool.nodes > 1 else "")
    env: list[dict[str, Any]] = [
        {"name": HERE, "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf-token", "key": "token", "optional": True}}},
    ]  # fmt: skip
    command = f'export {HEAD}="$LWS_LEADER_ADDRESS"; cd /tmp && exec {start}'
    container: dict[str, Any] = {
        "name": pool.role, "image": _image(made), "command": ["bash", "-c", command], "env": env,
        "resources": {"limits": {"nvidia.com/gpu": str(on_node)}, "requests": {"nvidia.com/gpu": str(on_node)}},
        "volumeMounts": [{"name": "scripts", "mountPath": "/launch"}, {"name": "shm", "mountPath": "/dev/shm"}],
    }  # fmt: skip
    leads = {**container, "ports": [{"containerPort": port}],
             "readinessProbe": {"httpGet": {"path": "/health", "port": port}, "periodSeconds": 10}}  # fmt: skip
    volumes = [{"name": "scripts", "configMap": {"name": scripts}},
               {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": SHARED_MEMORY}}]  # fmt: skip
    template = {
        "size": pool.nodes, "restartPolicy": "RecreateGroupOnPodRestart",
        "leaderTemplate": {"metadata": {"labels": {"role": pool.role}},
                           "spec": {"containers": [leads], "volumes": volumes}},
        "workerTemplate": {"spec": {"containers": [container], "volumes": volumes}},
    }  # fmt: skip
    return {"apiVersion": "leaderworkerset.x-k8s.io/v1", "kind": "LeaderWorkerSet", "metadata": {"name": name},
            "spec": {"replicas": pool.servers, "leaderWorkerTemplate": template}}  # fmt: skip


def _router_deployment(made: Deployment, name: str, scripts: str) -> dict[str, Any]:
    container = {
        "name": "router", "image": _router_image(made), "command": ["bash", "-c", "cd /tmp && bash /launch/router.sh"],
        "ports": [{"containerPort": ROUTER_PORT}],
        "readinessProbe": {"tcpSocket": {"port": ROUTER_PORT}, "periodSeconds": 10},
        "volumeMounts": [{"name": "scripts", "mountPath": "/launch"}],
    }  # fmt: skip
    spec = {"containers": [container], "volumes": [{"name": "scripts", "configMap": {"name": scripts}}]}
    return {
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name},
        "spec": {"replicas": 1, "selector": {"matchLabels": {"app": name}},
                 "template": {"metadata": {"labels": {"app": name}}, "spec": spec}},
    }  # fmt: skip


def _router_script(made: Deployment, addresses: dict[str, str]) -> str:
    """The router with addresses filled in, for an image that may not have it yet."""
    if made.engine == "trtllm" and len(made.pools) == 1:
        raise InputError("--manifests: trtllm-serve has no router for equal servers; use one server, or pools")
    lines = ["set -euo pipefail"]
    if made.engine == "trtllm":
        lines += ["cat > router.yaml <<'END'", disaggregated_yaml(made, addresses), "END"]
    else:
        lines.append(f"pip install --quiet {made.engine}-router")
    return "\n".join([*lines, f"exec {shlex.join(router_words(made, addresses))}"]) + "\n"


def _image(made: Deployment) -> str:
    return IMAGES[made.engine].format(made.version)


def _router_image(made: Deployment) -> str:
    return _image(made) if made.engine == "trtllm" else "python:3.12-slim"


def _yaml(document: dict[str, Any]) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Blocks for scripts, no anchors for what is there twice."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    return str(yaml.dump(document, Dumper=Dumper, sort_keys=False, width=1000))


WRITERS: dict[str, Callable[[Deployment], str]] = {
    "compose": compose, "kubernetes": kubernetes, "dynamo": dynamo,
}
"""What ``--manifests`` may ask for."""
