#!/usr/bin/env bash
# trtllm 1.3.0rc20
# 2 x prefill worker
# 1 x decode worker
# trtllm-serve disaggregated, in front, sends each request to a prefill and then to a decode server
# the model and the config file must lie where every node sees them
# on each node: bash THIS_FILE prefill|decode

case "${1-}" in
prefill)
cat > trtllm-prefill.yaml <<'END'
# trtllm 1.3.0rc20, tp1-dp2-ep2-pp4
tensor_parallel_size: 2
pipeline_parallel_size: 4
gpus_per_node: 8
enable_attention_dp: true
moe_expert_parallel_size: 2
moe_tensor_parallel_size: 1
max_batch_size: 60
max_num_tokens: 8192
max_seq_len: 5120
enable_chunked_prefill: true
kv_cache_config:
  dtype: auto
  free_gpu_memory_fraction: 0.9
cache_transceiver_config:
  backend: NIXL
  max_tokens_in_buffer: 4096
disable_overlap_scheduler: true
END

TRTLLM_FORCE_COMM_METHOD=DEEPEP \
trtllm-serve deepseek-ai/DeepSeek-V3 \
  --host 0.0.0.0 \
  --port 8000 \
  --config trtllm-prefill.yaml
;;
decode)
cat > trtllm-decode.yaml <<'END'
# trtllm 1.3.0rc20, tp1-dp16-ep16
tensor_parallel_size: 16
pipeline_parallel_size: 1
gpus_per_node: 8
enable_attention_dp: true
moe_expert_parallel_size: 16
moe_tensor_parallel_size: 1
max_batch_size: 60
max_num_tokens: 60
max_seq_len: 5120
enable_chunked_prefill: true
kv_cache_config:
  dtype: auto
  free_gpu_memory_fraction: 0.9
cuda_graph_config:
  enable_padding: true
  max_batch_size: 60
cache_transceiver_config:
  backend: NIXL
  max_tokens_in_buffer: 4096
END

TRTLLM_FORCE_COMM_METHOD=DEEPEPLOWLATENCY \
srun \
  --nodes 2 \
  --ntasks 16 \
  --ntasks-per-node 8 \
  --mpi pmix \
  trtllm-llmapi-launch \
  trtllm-serve deepseek-ai/DeepSeek-V3 \
  --host 0.0.0.0 \
  --port 8000 \
  --config trtllm-decode.yaml
;;
*)
echo "usage: bash $0 prefill|decode" >&2
exit 2
;;
esac
