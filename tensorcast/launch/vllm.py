"""vLLM: ``vllm serve`` on every node; data-parallel ranks are engines of their own behind the first node's server."""

from __future__ import annotations

import json
from typing import Any

from tensorcast.deploy.options import Options
from tensorcast.launch.encoder import add_encoding
from tensorcast.launch.settings import HEAD, HERE, Plan, Settings, add_attention
from tensorcast.modeling.checkpoint.read import checkpoint

SERVER_PORT, RPC_PORT, MASTER_PORT = 8000, 13345, 29501
DEFAULT_GRAPH_TOKENS = 512
"""Tokens up to which vLLM captures graphs unasked on any GPU (vllm/config/vllm.py)."""

GRAPH_MODES = {"full": "FULL_AND_PIECEWISE", "piecewise": "PIECEWISE", "none": "NONE"}
"""Our words for what is replayed from graphs, and vLLM's."""


def settings(plan: Plan, node: int) -> Settings:
    """Flags of the command on ``node``."""
    found, options = Settings(plan.table), plan.case.options
    found.add("host", "0.0.0.0")
    found.add("port", SERVER_PORT)
    if plan.remote_code:
        found.add("remote_code")
    _ranks(plan, node, found)
    _experts(plan, found)
    add_attention(plan, found)
    if plan.quant:
        found.add("quantization", plan.quant)
    found.add("kv_dtype", plan.kv_dtype)
    if plan.case.options.state_dtype:
        found.add("state_dtype", plan.case.options.state_dtype)
    found.add("context_length", plan.context)
    found.add("max_batch", plan.batch)
    found.add("chunk_tokens", plan.step_tokens)
    if plan.role != "prefill" and plan.decode_tokens > DEFAULT_GRAPH_TOKENS and options.cuda_graphs != "none":
        found.add("graph_batch", plan.decode_tokens)
    _switches(options, found)
    add_encoding(plan, found)
    found.add("memory_fraction", plan.memory_fraction)
    if depth := plan.case.options.mtp_depth:
        network = {"model": plan.draft_model} if plan.draft_model else {}
        method = {"method": plan.case.options.speculative_method, **network}
        found.add("speculative", json.dumps({**method, "num_speculative_tokens": depth}))
    if plan.role:
        found.add("transfer_host", HERE)
        roles = {"prefill": "kv_producer", "decode": "kv_consumer"}
        found.add("transfer", json.dumps({"kv_connector": "NixlConnector", "kv_role": roles[plan.role]}))
    return found


def _ranks(plan: Plan, node: int, found: Settings) -> None:
    layout, nodes, gpus = plan.case.layout, plan.case.nodes, plan.case.gpus_per_node
    found.add("tensor_parallel", layout.tp)
    if plan.case.options.dcp > 1:
        found.add("decode_context_parallel", plan.case.options.dcp)
    if layout.pp > 1:
        found.add("pipeline_parallel", layout.pp)
    if stages := plan.case.options.pp_partition:
        found.add("pipeline_layers", stages)
    pcp = plan.case.options.pcp
    if pcp > 1:
        found.add("prefill_context_parallel", pcp)
    if layout.dp > pcp:
        found.add("data_parallel", layout.dp // pcp)
    if nodes == 1:
        return
    if layout.tp * layout.pp <= gpus:  # whole ranks on a node: engines are dealt out by their data-parallel rank
        local = gpus // (layout.tp * layout.pp)
        found.add("data_parallel_local", local)
        if node:
            found.add("data_parallel_start", node * local)
        found.add("data_parallel_address", HEAD)
        found.add("data_parallel_port", RPC_PORT)
    else:
        found.add("nodes", nodes)
        found.add("node_rank", node)
        found.add("master_address", HEAD)
        found.add("master_port", MASTER_PORT)
    if node:
        found.add("headless")


def _switches(options: Options, found: Settings) -> None:
    """Graphs, compilation and all-reduces, where they are not as vLLM has them unasked."""
    said: dict[str, Any] = {}
    if options.cuda_graphs == "none" and not options.compiled:
        found.add("eager")
    elif not options.compiled:  # without the compiler there are no pieces
        said = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    elif options.cuda_graphs != "engine":
        said = {"cudagraph_mode": GRAPH_MODES[options.cuda_graphs]}
    if options.allreduce_fusion != "engine":
        said["pass_config"] = {"fuse_allreduce_rms": options.allreduce_fusion == "on"}
    if said:
        found.add("compilation", json.dumps(said))
    if not options.custom_all_reduce:
        found.add("no_custom_all_reduce")


def _experts(plan: Plan, found: Settings) -> None:
    layout, options = plan.case.layout, plan.case.options
    inside = plan.case.exchange == "mega_moe"  # kernels of experts that exchange by themselves
    if inside or options.experts_kernels != "engine":
        found.add("experts_kernels", plan.case.exchange if inside else options.experts_kernels)
        if options.experts_kernels == "trtllm" and checkpoint(plan.model).experts.kernel == "w4a16":
            found.add("int4_experts", 1)
    if layout.ep > 1:
        found.add("expert_parallel")
        if options.placement == "round_robin":
            found.add("placement", options.placement)
    if plan.case.exchange and not inside:
        found.add("all2all", plan.case.exchange)
    if plan.balances or plan.expert_file:
        found.add("balance_experts")
    if options.redundant_experts:
        found.add("redundant_experts", json.dumps({"num_redundant_experts": options.redundant_experts}))
    if options.dual_batch_overlap:
        found.add("dual_batch_overlap")


def notes(plan: Plan) -> list[str]:
    """What the flags cannot say."""
    said = []
    if plan.case.exchange in ("high_throughput", "low_latency") and not plan.role:
        said.append(f"prefill and decode both exchange tokens by DeepEP's {plan.case.exchange} kernels")
    if plan.case.options.dispatch:
        said.append(f"dispatch in {plan.case.options.dispatch}: vLLM has no flag, its kernels decide")
    if plan.expert_file:
        said.append(f"{plan.expert_file}: vLLM reads no placement; it balances experts by the load that it counts")
    if plan.role:
        said.append("a proxy in front sends each request to a prefill and then to a decode server")
    return said
