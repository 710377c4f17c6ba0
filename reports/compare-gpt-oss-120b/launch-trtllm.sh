#!/usr/bin/env bash
# trtllm 1.3.0rc20
# 2 x prefill worker
# 1 x decode worker
# trtllm-serve disaggregated, in front, sends each request to a prefill and then to a decode server
# on each node: bash THIS_FILE prefill|decode

case "${1-}" in
prefill)
cat > trtllm-prefill.yaml <<'END'
# trtllm 1.3.0rc20, tp1-dp1
tensor_parallel_size: 1
pipeline_parallel_size: 1
gpus_per_node: 8
enable_attention_dp: false
moe_expert_parallel_size: 1
moe_tensor_parallel_size: 1
max_batch_size: 256
max_num_tokens: 16384
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

trtllm-serve openai/gpt-oss-120b \
  --host 0.0.0.0 \
  --port 8000 \
  --config trtllm-prefill.yaml
;;
decode)
cat > trtllm-decode.yaml <<'END'
# trtllm 1.3.0rc20, tp1-dp4-ep4
tensor_parallel_size: 4
pipeline_parallel_size: 1
gpus_per_node: 8
enable_attention_dp: true
moe_expert_parallel_size: 4
moe_tensor_parallel_size: 1
max_batch_size: 256
max_num_tokens: 256
max_seq_len: 5120
enable_chunked_prefill: true
kv_cache_config:
  dtype: auto
  free_gpu_memory_fraction: 0.9
cuda_graph_config:
  enable_padding: true
  max_batch_size: 256
cache_transceiver_config:
  backend: NIXL
  max_tokens_in_buffer: 4096
END

TRTLLM_FORCE_COMM_METHOD=DEEPEPLOWLATENCY \
trtllm-serve openai/gpt-oss-120b \
  --host 0.0.0.0 \
  --port 8000 \
  --config trtllm-decode.yaml
;;
*)
echo "usage: bash $0 prefill|decode" >&2
exit 2
;;
esac
