"""TensorRT-LLM: ``trtllm-serve`` with a YAML file; over several nodes one command, started by Slurm on every GPU."""

from __future__ import annotations

from tensorcast.cost.stages import stated_stages
from tensorcast.launch.settings import Plan, Settings, add_attention

SERVER_PORT = 8000
LAUNCHER = ("srun", "trtllm-llmapi-launch")


def config_name(plan: Plan) -> str:
    return f"trtllm-{plan.role or 'serve'}.yaml"


def settings(plan: Plan, node: int) -> Settings:
    """Flags of the command and keys of its config file; the same on every node."""
    layout, options, gpus = plan.case.layout, plan.case.options, plan.case.gpus_per_node
    found = Settings(plan.table)
    if plan.case.nodes > 1:
        found.add("launcher_nodes", plan.case.nodes)
        found.add("launcher_tasks", layout.world_size)
        found.add("launcher_tasks_per_node", gpus)
        found.add("launcher_mpi", "pmix")
    found.add("host", "0.0.0.0")
    found.add("port", SERVER_PORT)
    found.add("config", config_name(plan))
    found.add("tensor_parallel", layout.stage_ranks)
    found.add("pipeline_parallel", layout.pp)
    if stages := plan.case.options.pp_partition:
        found.add("pipeline_layers", [*stated_stages(stages)])
    found.add("gpus_per_node", gpus)
    found.add("attention_dp", layout.dp > 1)
    if plan.case.facts.num_experts:
        _experts(plan, found)
    add_attention(plan, found)
    found.add("max_batch", plan.batch)
    found.add("chunk_tokens", plan.step_tokens)
    found.add("context_length", plan.context)
    found.add("chunked_prefill", True)
    found.add("kv_dtype", plan.kv_dtype)
    if options.state_dtype:
        found.add("state_dtype", options.state_dtype)
    found.add("memory_fraction", plan.memory_fraction)
    if options.cuda_graphs == "none":
        found.add("graphs", None)
    elif plan.role != "prefill":
        found.add("graph_padding", True)
        found.add("graph_batch", plan.batch)
    if not options.custom_all_reduce:
        found.add("allreduce", "nccl")
    if options.mtp_depth:
        found.add("speculative_algorithm", options.speculative_method)
        found.add("draft_tokens", options.mtp_depth)
        if plan.draft_model:
            found.add("draft_model", plan.draft_model)
    if plan.role:
        found.add("transfer", "NIXL")
        found.add("transfer_tokens", plan.input_len)
        if plan.role == "prefill":
            found.add("no_overlap_scheduler", True)
    return found


def _experts(plan: Plan, found: Settings) -> None:
    layout, options = plan.case.layout, plan.case.options
    if options.experts_kernels != "engine":
        found.add("experts_kernels", options.experts_kernels)
    found.add("expert_parallel", layout.ep)
    found.add("expert_tensor_parallel", layout.etp)
    if plan.case.exchange not in ("", "auto"):
        found.add("all2all", plan.case.exchange)
    if options.chunk_tokens:
        found.add("expert_chunk", options.chunk_tokens)
    if plan.expert_file:
        found.add("expert_location", plan.expert_file)
    if plan.balances:
        found.add("expert_slots", plan.case.facts.num_experts + options.redundant_experts)
        found.add("balance_layers", 1)


def notes(plan: Plan) -> list[str]:
    """What the flags cannot say."""
    said = []
    if plan.case.nodes > 1:
        said.append("the model and the config file must lie where every node sees them")
    if plan.case.exchange == "auto":
        said.append("the exchange is chosen at start: over NVLink, else DeepEP, else gather and scatter, as priced")
    if plan.case.options.dispatch:
        said.append(f"dispatch in {plan.case.options.dispatch}: TensorRT-LLM has no option, its kernels decide")
    if plan.role:
        said.append("trtllm-serve disaggregated, in front, sends each request to a prefill and then to a decode server")
    return said
