"""SGLang: ``sglang.launch_server`` on every node; with attention DP its tp-size counts all ranks of a stage."""

from __future__ import annotations

from tensorcast.deploy.layout import attention_dp
from tensorcast.deploy.options import Options
from tensorcast.launch.encoder import add_encoding
from tensorcast.launch.settings import HEAD, Plan, Settings, add_attention

SERVER_PORT, MASTER_PORT = 30000, 20000
DEFAULT_DISPATCH_TOKENS = 128
"""Tokens per rank that DeepEP's low-latency buffers hold unasked (python/sglang/srt/environ.py)."""
MOST_DISPATCH_TOKENS = 1024
"""The most that they can hold (python/sglang/srt/layers/moe/token_dispatcher/deepep.py)."""


def settings(plan: Plan, node: int) -> Settings:
    """Flags of the command on ``node``."""
    layout, options, nodes = plan.case.layout, plan.case.options, plan.case.nodes
    dp = attention_dp(layout, plan.case.facts.num_experts)
    found = Settings(plan.table)
    found.add("model", plan.path)
    found.add("host", "0.0.0.0")
    found.add("port", SERVER_PORT)
    if plan.remote_code:
        found.add("remote_code")
    _ranks(plan, dp, found)
    if nodes > 1:
        found.add("nodes", nodes)
        found.add("node_rank", node)
        found.add("master_address", f"{HEAD}:{MASTER_PORT}")
    _experts(plan, found)
    add_attention(plan, found)
    if plan.quant:
        found.add("quantization", plan.quant)
    found.add("kv_dtype", plan.kv_dtype)
    if options.state_dtype:
        found.add("state_dtype", options.state_dtype)
    found.add("context_length", plan.context)
    found.add("max_batch", plan.batch * layout.dp)
    if plan.role != "decode":
        found.add("chunk_tokens", plan.chunk_tokens * dp)
    found.add("graph_batch", plan.batch)  # memory is set aside for it, captured or not
    _switches(options, found)
    add_encoding(plan, found)
    found.add("memory_fraction", plan.memory_fraction)
    if options.mtp_depth:
        _drafting(plan, found)
    if plan.role:
        found.add("role", plan.role)
        found.add("transfer", "mooncake")
    return found


def _ranks(plan: Plan, dp: int, found: Settings) -> None:
    """Sizes of the groups, ``dp`` of them of attention."""
    layout, dcp, pcp = plan.case.layout, plan.case.options.dcp, plan.case.options.pcp
    found.add("tensor_parallel", layout.tp * dp)
    if pcp > 1:
        found.add("prompts_in_parts")
        found.add("prefill_context_parallel", pcp)
        found.add("parts", "early_and_late")
    groups = dp // pcp
    if dcp > 1:
        found.add("decode_context_parallel", dcp)
        found.add("context_exchange", "ag_rs")
    if layout.pp > 1:
        found.add("pipeline_parallel", layout.pp)
    if stages := plan.case.options.pp_partition:
        found.add("pipeline_layers", stages)
    counts = plan.table.flags["attention_dp"].takes == "value"
    if layout.dp > pcp and not (groups > 1 and counts):
        found.add("data_parallel", layout.dp)
    if groups > 1:
        found.add("attention_dp", *([groups] if counts else []))
        found.add("head_dp")
    if dp > 1 and (layout.tp == 1 or _splits_dense(plan)):
        found.add("dense_tp", 1)


def _switches(options: Options, found: Settings) -> None:
    """Graphs and all-reduces, where they are not as SGLang has them unasked."""
    if options.cuda_graphs != "engine":
        found.add("decode_graphs", options.cuda_graphs)
    if options.cuda_graphs == "none":
        found.add("prefill_graphs", options.cuda_graphs)
    if not options.custom_all_reduce:
        found.add("no_custom_all_reduce")
    if options.allreduce_fusion == "on":
        found.add("join_norms", "any")
    elif options.allreduce_fusion == "off":
        found.add("norms_apart")


def _drafting(plan: Plan, found: Settings) -> None:
    """A chain of drafts, one at each position; tokens that are checked count the last one, too."""
    depth, method = plan.case.options.mtp_depth, plan.case.options.speculative_method
    found.add("speculative_algorithm", method)
    if plan.case.layout.pp > 1 and not plan.role:  # pools' servers of prompts draft in a pipeline without it
        found.add("pipeline_drafts", 1)
    if plan.draft_model:
        found.add("draft_model", plan.draft_model)
    if method == "dspark":
        found.add("draft_block", depth)
        return
    if method in ("mtp", "eagle3", "draft_model"):
        found.add("draft_steps", depth)
    if method != "dflash":
        found.add("draft_topk", 1)
    found.add("draft_tokens", depth + 1)


def _experts(plan: Plan, found: Settings) -> None:
    layout, options = plan.case.layout, plan.case.options
    if plan.case.exchange == "flashinfer_nvlink_one_sided" and options.experts_kernels == "engine":
        found.add("experts_kernels", "cutlass")  # it runs with a library's experts alone (moe_hook.py, handle_a2a_moe)
    elif options.experts_kernels != "engine":
        own = f"mxfp4_{options.experts_kernels}"  # a name of its own where the checkpoint is MXFP4 (gpt-oss)
        stored = (plan.model.config.get("quantization_config") or {}).get("quant_method") == "mxfp4"
        values = plan.table.flags["experts_kernels"].values
        found.add("experts_kernels", own if stored and own in values else options.experts_kernels)
    if layout.ep > 1:
        found.add("expert_parallel", layout.ep)
    if exchange := plan.case.exchange:
        found.add("all2all", exchange)
        if exchange == "by_phase" and plan.role:
            exchange = "high_throughput" if plan.role == "prefill" else "low_latency"
        if exchange in plan.table.flags["all2all_mode"].values:
            found.add("all2all_mode", exchange)
            if options.dispatch:
                found.add("dispatch", options.dispatch)
        if _buffered(plan) > DEFAULT_DISPATCH_TOKENS:
            found.add("dispatch_tokens", _buffered(plan))
        if exchange == "deepep_v2":
            found.add("dispatch_tokens_v2", max(plan.decode_tokens, 0 if plan.role == "decode" else plan.chunk_tokens))
    _balancing(plan, found)
    if not options.shared_experts_fusion:
        found.add("shared_experts_apart")
    if options.dual_batch_overlap:
        found.add("dual_batch_overlap")


def _balancing(plan: Plan, found: Settings) -> None:
    options = plan.case.options
    if plan.expert_file:
        found.add("expert_location", plan.expert_file)
    if plan.balances:
        found.add("balance_experts")
    if options.placement == "eplb_global":
        found.add("balancer", "deepseek")
    if options.redundant_experts:
        found.add("redundant_experts", options.redundant_experts)


def _splits_dense(plan: Plan) -> bool:
    """Whether a dense MLP, cut over all ranks of a stage, would split a block of the checkpoint's scales."""
    ranks = plan.case.layout.stage_ranks
    return any(cut.part == "dense MLP" and cut.size % (ranks * cut.block) for cut in plan.case.cuts)


def _buffered(plan: Plan) -> int:
    """Tokens of the largest step per rank that goes through low-latency buffers."""
    if plan.case.exchange == "by_phase":
        return 0 if plan.role == "prefill" else plan.decode_tokens
    return plan.step_tokens if plan.case.exchange == "low_latency" else 0


def broken_plan(plan: Plan) -> str:
    """Why a server cannot start so, or its low-latency buffers hold no step; empty if they can."""
    if plan.case.options.mtp_depth and plan.case.layout.pp > 1 and plan.role == "decode":
        return "drafts in a pipeline: of pools only servers of prompts draft at pp > 1"
    tokens = _buffered(plan)
    if tokens <= MOST_DISPATCH_TOKENS:
        return ""
    return f"low-latency buffers: {tokens} tokens per rank and step, and they hold {MOST_DISPATCH_TOKENS} at most"


def notes(plan: Plan) -> list[str]:
    """What the flags cannot say."""
    said = []
    if plan.case.exchange == "high_throughput" and plan.role != "prefill":
        said.append("DeepEP's normal mode turns CUDA graphs off, in decode too")
    if plan.case.exchange == "low_latency" and not plan.role:
        said.append("prompts take DeepEP's low-latency kernels too, whose buffers grow with the chunk")
    if plan.case.layout.dp > 1 and plan.case.layout.tp > 1 and plan.case.facts.num_experts:
        said.append("dense layers are cut over all ranks of a stage; SGLang cannot cut them over attention's tp alone")
    if plan.role:
        said.append("a router in front sends each request to a prefill and then to a decode server")
    return said
