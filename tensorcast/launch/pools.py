"""Servers of a deployment that is to be started: their scripts, addresses, and the router in front of them."""

from __future__ import annotations

from dataclasses import dataclass

from tensorcast.launch import sglang, trtllm, vllm
from tensorcast.launch.launch import Launch, script
from tensorcast.launch.settings import HEAD, HERE

ROUTER_PORT, BOOTSTRAP_PORT = 9000, 8998
"""Where the router listens; where SGLang's prefill servers are asked for their cache
(``--disaggregation-bootstrap-port`` of sglang 0.5.23, srt/server_args.py)."""

PORTS = {"vllm": vllm.SERVER_PORT, "sglang": sglang.SERVER_PORT, "trtllm": trtllm.SERVER_PORT}
IMAGES = {
    "vllm": "vllm/vllm-openai:v{}", "sglang": "lmsysorg/sglang:v{}",
    "trtllm": "nvcr.io/nvidia/tensorrt-llm/release:{}",
}  # fmt: skip
"""Public images of a release."""

@dataclass(frozen=True)
class Pool:
    """Servers of one role (``server``, ``prefill`` or ``decode``): how many, the GPUs of each, how one is started."""

    role: str
    servers: int
    gpus: int
    launch: Launch

    @property
    def nodes(self) -> int:
        return len(self.launch.commands)


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Pools of one engine, and the load that the benchmark sends. ``row``: the deployment's columns for ``predict``."""

    pools: tuple[Pool, ...]
    model: str
    input_len: int
    output_len: int
    users: int
    gpus_per_node: int
    row: dict[str, object]

    @property
    def engine(self) -> str:
        return self.pools[0].launch.engine

    @property
    def version(self) -> str:
        return self.pools[0].launch.version

    @property
    def routed(self) -> bool:
        return len(self.pools) > 1 or self.pools[0].servers > 1

    def hosts(self, pool: Pool) -> list[str]:
        """Names of a pool's servers, as variables of the scripts give them addresses."""
        return [f"{pool.role}-{n}" for n in range(pool.servers)]


def role_script(pool: Pool) -> str:
    """One server's script, node by node; addresses are variables, this node's is found where it is not given."""
    lines = script(pool.launch).splitlines()
    if not lines[0].startswith("#!"):
        lines.insert(0, "#!/usr/bin/env bash")
    body = [line if line.startswith("#") else line.replace(HEAD, f"${{{HEAD}}}").replace(HERE, f"${{{HERE}}}")
            for line in lines]  # fmt: skip
    needed = []
    if any(f"${{{HEAD}}}" in line for line in body):
        needed.append(f': "${{{HEAD}:?the address of the first node}}"')
    if any(f"${{{HERE}}}" in line for line in body):
        needed.append(f'{HERE}="${{{HERE}:-$(hostname -I | cut -d" " -f1)}}"')
    top = next(i for i, line in enumerate(body) if not line.startswith("#"))
    return "\n".join([*body[:top], "set -euo pipefail", *needed, *body[top:]]) + "\n"


def variable(host: str) -> str:
    """``PREFILL_0`` for ``prefill-0``."""
    return host.upper().replace("-", "_")


def router_words(made: Deployment, addresses: dict[str, str]) -> list[str]:
    """The router's command. ``addresses``: of each server's first node, by host.

    vllm-router 0.1.17, vllm_router/router_args.py; sglang-router, sglang_router/router_args.py: a prefill server is
    given with its bootstrap port; TensorRT-LLM, examples/disaggregated (``trtllm-serve disaggregated -c``).
    """
    port = PORTS[made.engine]
    urls = {pool.role: [f"http://{addresses[host]}:{port}" for host in made.hosts(pool)] for pool in made.pools}
    here = ["--host", "0.0.0.0", "--port", str(ROUTER_PORT)]
    if made.engine == "trtllm":
        return ["trtllm-serve", "disaggregated", "-c", "router.yaml"]
    program = ["vllm-router"] if made.engine == "vllm" else ["python3", "-m", "sglang_router.launch_router"]
    if len(made.pools) == 1:
        return [*program, "--worker-urls", *urls["server"], *here]
    mode = "--vllm-pd-disaggregation" if made.engine == "vllm" else "--pd-disaggregation"
    bootstrap = [str(BOOTSTRAP_PORT)] if made.engine == "sglang" else []
    pairs = [word for url in urls["prefill"] for word in ("--prefill", url, *bootstrap)]
    return [*program, mode, *pairs, *(word for url in urls["decode"] for word in ("--decode", url)), *here]


def disaggregated_yaml(made: Deployment, addresses: dict[str, str]) -> str:
    """What ``trtllm-serve disaggregated`` reads: both pools by their addresses."""
    lines = ["hostname: 0.0.0.0", f"port: {ROUTER_PORT}", "backend: pytorch"]
    for pool, name in zip(made.pools, ("context_servers", "generation_servers"), strict=True):
        lines += [f"{name}:", f"  num_instances: {pool.servers}", "  urls:"]
        lines += [f'    - "{addresses[host]}:{PORTS["trtllm"]}"' for host in made.hosts(pool)]
    return "\n".join(lines)
