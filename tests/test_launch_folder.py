"""Launch folders: scripts that a shell runs, a router that knows every server, manifests as their schemas have them."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import tensorcast as tc
from tensorcast.cli import app
from tensorcast.predict.bench_results import with_results
from tensorcast.predict.cells import layout_cells
from tensorcast.predict.csv_table import read_table
from tensorcast.predict.predict import predict_file
from tensorcast.scheduling.pools import parse_servers

POOLS = "2 x tp1-dp2 > tp2-dp2-ep4 on 8 h100-sxm"


def made(folder: Path, *more: str, layout: str = POOLS, engine: str = "vllm", model: str = "qwen3-30b-a3b") -> Path:
    asked = ["launch", model, "-d", "h100", "-e", engine, "-l", layout, "-b", "16", "-i", "1024", "--output-len", "256",
             "--out", str(folder), *more]  # fmt: skip
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    return folder


def ran(script: Path, folder: Path, *arguments: str, **environment: str) -> list[str]:
    """Words of the program that a script starts in the end, by stand-ins for what it may start."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("vllm", "vllm-router", "python3", "trtllm-serve", "nginx", "curl", "srun"):
        stand_in = tools / name
        stand_in.write_text(f'#!/bin/bash\nprintf "%s\\n" {name} "$@"\n')
        stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
    known = {"PATH": f"{tools}:{os.environ['PATH']}", **environment}
    done = subprocess.run(
        ["bash", str(script), *arguments], cwd=folder, env=known, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


ADDRESSES = {"PREFILL_0": "10.0.0.1", "PREFILL_1": "10.0.0.2", "DECODE_0": "10.0.0.3"}


@pytest.mark.parametrize(("engine", "port"), [("vllm", "8000"), ("sglang", "30000"), ("trtllm", "8000")])
def test_scripts_run_and_the_router_knows_every_server(tmp_path: Path, engine: str, port: str) -> None:
    folder = made(tmp_path, engine=engine, layout="2 x tp2 > tp1-dp4-ep4" if engine == "trtllm" else POOLS)
    for role in ("prefill", "decode"):
        started = ran(folder / f"{role}.sh", folder, THIS_NODE_IP="10.0.0.9")
        assert started[0] in ("vllm", "python3", "trtllm-serve") and not any("NODE_IP" in word for word in started)
    routed = " ".join(ran(folder / "router.sh", folder, **ADDRESSES))
    if engine == "trtllm":
        assert routed == "trtllm-serve disaggregated -c router.yaml"
        said = yaml.safe_load((folder / "router.yaml").read_text())
        assert said["context_servers"] == {"num_instances": 2, "urls": ["10.0.0.1:8000", "10.0.0.2:8000"]}
        assert said["generation_servers"]["urls"] == ["10.0.0.3:8000"]
    else:
        assert "pd-disaggregation" in routed
        for address in ADDRESSES.values():
            assert f"http://{address}:{port}" in routed
        assert routed.count("--prefill") == 2 and routed.count("--decode") == 1
    assert ran(folder / "wait.sh", folder, **ADDRESSES) == [f"{address} answers" for address in ADDRESSES.values()]
    bench = " ".join(ran(folder / "bench.sh", folder, SERVER="10.0.0.4"))
    assert "http://10.0.0.4:9000" in bench and "--max-concurrency" in bench and "result.json" in bench
    started = ["bash", str(folder / "router.sh")]
    refused = subprocess.run(started, cwd=folder, capture_output=True, text=True, check=False)
    assert refused.returncode != 0 and "PREFILL_0" in refused.stderr


def test_one_server_over_two_nodes_is_started_node_by_node(tmp_path: Path) -> None:
    folder = made(tmp_path, layout="tp1-dp16-ep16")
    for node in ("node0", "node1"):
        words = ran(folder / "server.sh", folder, node, HEAD_NODE_IP="10.0.0.1")
        assert words[words.index("--data-parallel-address") + 1] == "10.0.0.1"
        assert ("--headless" in words) == (node == "node1")
    assert not (folder / "router.sh").exists() and ":8000" in (folder / "bench.sh").read_text()


SERVICE = {"image", "entrypoint", "command", "ipc", "configs", "working_dir", "environment", "volumes", "deploy",
           "healthcheck", "ports", "depends_on"}  # fmt: skip
"""Keys of the Compose specification (compose-spec.json, services) that are used here."""


def test_compose_gives_every_server_gpus_of_its_own(tmp_path: Path) -> None:
    folder = made(tmp_path, "--manifests", "compose")
    said = yaml.safe_load((folder / "compose.yaml").read_text())
    assert set(said) == {"services", "configs"}
    taken = []
    for name, service in said["services"].items():
        assert set(service) <= SERVICE, name
        for one in service["configs"]:
            assert one["source"] in said["configs"]
        if name != "router":
            (devices,) = service["deploy"]["resources"]["reservations"]["devices"]
            assert devices["driver"] == "nvidia" and devices["capabilities"] == ["gpu"]
            taken += devices["device_ids"]
    assert sorted(taken) == [str(n) for n in range(8)]
    assert set(said["services"]["router"]["depends_on"]) == {"prefill-0", "prefill-1", "decode-0"}
    for config in said["configs"].values():  # compose turns $$ into $
        script = tmp_path / "one.sh"
        script.write_text(config["content"].replace("$$", "$"))
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    done = CliRunner().invoke(app, ["launch", "qwen3-30b-a3b", "-d", "h100", "-l", "4 x tp4", "--out",
                                    str(tmp_path / "more"), "--manifests", "compose"])  # fmt: skip
    assert done.exit_code == 2 and "is for one machine of 8 GPUs, and 16 are needed" in done.output
    assert not (tmp_path / "more").exists()


def test_kubernetes_starts_groups_of_nodes(tmp_path: Path) -> None:
    """Names and types of leaderworkerset.x-k8s.io/v1 (api/leaderworkerset/v1/leaderworkerset_types.go)."""
    folder = made(tmp_path, "--manifests", "kubernetes", layout="2 x tp8 > tp1-dp16-ep16")
    documents = list(yaml.safe_load_all((folder / "kubernetes.yaml").read_text()))
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for one in documents:
        assert set(one) - {"data"} <= {"apiVersion", "kind", "metadata", "spec"}
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", one["metadata"]["name"])
        by_kind.setdefault(one["kind"], []).append(one)
    assert {kind: len(found) for kind, found in by_kind.items()} == {
        "ConfigMap": 1, "LeaderWorkerSet": 2, "Deployment": 1, "Service": 1
    }  # fmt: skip
    scripts = by_kind["ConfigMap"][0]["data"]
    for group, servers, nodes in zip(by_kind["LeaderWorkerSet"], (2, 1), (1, 2), strict=True):
        assert group["apiVersion"] == "leaderworkerset.x-k8s.io/v1" and group["spec"]["replicas"] == servers
        template = group["spec"]["leaderWorkerTemplate"]
        assert set(template) == {"size", "restartPolicy", "leaderTemplate", "workerTemplate"}
        assert template["size"] == nodes
        for name in ("leaderTemplate", "workerTemplate"):
            (container,) = template[name]["spec"]["containers"]
            assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
            named = re.search(r"/launch/(\S+)", container["command"][2])
            assert named is not None and named[1] in scripts
            assert ("LWS_WORKER_INDEX" in container["command"][2]) == (nodes > 1)
    for n in range(2):
        assert f"http://qwen3-30b-a3b-prefill-{n}.qwen3-30b-a3b-prefill:8000" in scripts["router.sh"]
    service, router = by_kind["Service"][0]["spec"], by_kind["Deployment"][0]["spec"]
    assert service["selector"] == router["template"]["metadata"]["labels"] == router["selector"]["matchLabels"]


@pytest.mark.parametrize(("engine", "layout"), [
    ("vllm", POOLS), ("sglang", POOLS), ("trtllm", "2 x tp2 > tp1-dp4-ep4"), ("vllm", "2 x tp2"),
])  # fmt: skip
def test_dynamo_has_a_worker_of_each_role(tmp_path: Path, engine: str, layout: str) -> None:
    """Names of nvidia.com/v1beta1 as Dynamo 1.6's documents have them; the engine's flags are those of the scripts."""
    folder = made(tmp_path, "--manifests", "dynamo", layout=layout, engine=engine)
    *files, graph = yaml.safe_load_all((folder / "dynamo.yaml").read_text())
    assert graph["apiVersion"] == "nvidia.com/v1beta1" and graph["kind"] == "DynamoGraphDeployment"
    assert set(graph["spec"]) == {"backendFramework", "components"} and graph["spec"]["backendFramework"] == engine
    frontend, *workers = graph["spec"]["components"]
    assert frontend["type"] == "frontend"
    pools = ">" in layout
    servers = [("prefill", 2), ("decode", 1)] if pools else [("worker", 2)]
    assert [(worker["type"], worker["replicas"]) for worker in workers] == servers
    for worker in workers:
        (container,) = worker["podTemplate"]["spec"]["containers"]
        words = container["args"]
        assert container["name"] == "main" and container["command"] == ["python3", "-m", f"dynamo.{engine}"]
        assert "Qwen/Qwen3-30B-A3B" in words and not {"--host", "--port"} & set(words)
        assert container["resources"]["limits"]["nvidia.com/gpu"] == ("4" if worker["type"] == "decode" else "2")
        if pools and engine == "vllm":  # as the script says with the address of its node
            assert [one["name"] for one in container["env"]] == ["VLLM_NIXL_SIDE_CHANNEL_HOST"]
            assert "status.podIP" in str(container["env"])
        if pools:
            assert words[words.index("--disaggregation-mode") + 1] == worker["type"]
        script = (folder / f"{'server' if worker['type'] == 'worker' else worker['type']}.sh").read_text()
        own = [word for word in words if word.startswith("--") and word in script]
        assert engine == "trtllm" or len(own) >= 6
        if engine == "trtllm":
            name = words[words.index("--extra-engine-args") + 1].removeprefix("/config/")
            assert "tensor_parallel_size" in files[0]["data"][name]


@pytest.mark.parametrize(("engine", "layout", "flags"), [
    ("vllm", "dp16-ep16", "--tensor-parallel-size 1 --data-parallel-size 16"),
    ("vllm", "tp8-pp2", "--tensor-parallel-size 8 --pipeline-parallel-size 2"),
    ("sglang", "tp16-ep16", "--tp-size 16"), ("trtllm", "dp16-ep16", "--extra-engine-args /config/"),
])  # fmt: skip
def test_dynamo_tells_each_node_its_place(tmp_path: Path, engine: str, layout: str, flags: str) -> None:
    """Two nodes of eight GPUs: the operator adds what its backend_*.go add, so none of that may stand there twice."""
    asked = ["launch", "deepseek-v3", "-d", "h200", "-l", layout, "-b", "16", "--manifests", "dynamo", "--engine",
             engine, "--out", str(tmp_path / "out")]  # fmt: skip
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    *_, graph = yaml.safe_load_all((tmp_path / "out" / "dynamo.yaml").read_text())
    worker = graph["spec"]["components"][1]
    (container,) = worker["podTemplate"]["spec"]["containers"]
    assert worker["multinode"] == {"nodeCount": 2} and container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    text = " ".join(container["args"])
    assert flags in text and "HEAD_NODE_IP" not in text and "deepseek-ai/DeepSeek-V3" in text
    assert not re.search(r"nnodes|node-rank|master|dist-init|size-local|rpc-port|srun|ntasks|headless", text)


RESULT = {
    "completed": 320, "total_input_tokens": 320 * 1000, "total_output_tokens": 320 * 250, "mean_ttft_ms": 240.0,
    "mean_tpot_ms": 9.0, "output_throughput": 2900.0, "max_concurrency": 32,
}  # fmt: skip


def test_a_benchmark_is_set_beside_the_prediction(tmp_path: Path) -> None:
    folder = made(tmp_path)
    (folder / "result.json").write_text(json.dumps(RESULT))
    (folder / "lines.jsonl").write_text("\n".join(json.dumps({**RESULT, "max_concurrency": n}) for n in (8, 64)))
    table = predict_file(folder / "runs.csv", 1, [folder / "result.json", folder / "lines.jsonl"])
    assert list(table["problem"]) == ["", "", ""]
    assert list(table["concurrency"]) == ["32", "8", "64"] and list(table["isl"]) == ["1000"] * 3
    assert table["measured_ttft_s"].astype(float).tolist() == pytest.approx([0.24] * 3)
    assert list(table["gpus"]) == [8, 8, 8] and (table["tpot_s"].astype(float).diff().iloc[-1] > 0)
    for content, says in (("{}", "mean_ttft_ms = None"), ("x", "neither JSON"), ("[]", "holds no result"),
                          (json.dumps({**RESULT, "max_concurrency": None}), "no max_concurrency")):
        (folder / "bad.json").write_text(content)
        with pytest.raises(tc.InputError, match=f"--result .*bad.json: .*{says}"):
            with_results(read_table(folder / "runs.csv"), [folder / "bad.json"])
    (folder / "two.csv").write_text("model,device\nqwen3-8b,h100\nqwen3-8b,h200\n")
    with pytest.raises(tc.InputError, match="is of one deployment, and the table has 2 rows"):
        predict_file(folder / "two.csv", 1, [folder / "result.json"])


@pytest.mark.parametrize(("name", "servers"), [
    ("2 x tp1-dp4 > tp2-dp4 on 16 h200-sxm under vllm", ["2 x tp1-dp4", "tp2-dp4"]), ("4 x tp8-dp1", ["4 x tp8-dp1"]),
    ("2x tp8-dp1 + 1x tp4-dp1", ["2 x tp8-dp1", "tp4-dp1"]), ("tp8-dp1 x3", ["3 x tp8-dp1"]),
])  # fmt: skip
def test_one_name_of_a_layout_is_read_by_all(name: str, servers: list[str]) -> None:
    assert [str(one) for one in parse_servers(name)] == servers
    cells = layout_cells(name)
    assert cells["mode"] == ("disaggregated" if len(servers) > 1 else "aggregated")


def test_simulate_and_explain_take_pools() -> None:
    asked = ["simulate", "qwen3-30b-a3b", "-d", "h100", "-l", POOLS, "-b", "16", "--json"]
    sizes = ["simulate", "qwen3-30b-a3b", "-d", "h100", "-n", "4", "--tp", "2", "--dp", "2", "--ep", "4", "-b", "16"]
    found = [json.loads(CliRunner().invoke(app, one).output) for one in (asked, [*sizes, "--json"])]
    assert found[0]["step_s"] == found[1]["step_s"]
    why = tc.explain("qwen3-30b-a3b", device="h100", world_size=4, layout=POOLS, versus="tp4-dp1", batch=16)
    assert str(why.a.deployment.layout) == "tp2-dp2-ep4" and str(why.b.deployment.layout) == "tp4-dp1"
