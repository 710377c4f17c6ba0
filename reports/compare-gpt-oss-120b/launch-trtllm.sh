# 2 x prefill worker
# trtllm 1.3.0rc20
# trtllm-serve disaggregated, in front, sends each request to a prefill and then to a decode server

cat > trtllm-prefill.yaml <<'END'
# trtllm 1.3.0rc20, tp1-dp2
tensor_parallel_size: 2
pipeline_parallel_size: 1
gpus_per_node: 8
enable_attention_dp: true
moe_expert_parallel_size: 1
moe_tensor_parallel_size: 2
max_batch_size: 331
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

trtllm-serve openai/gpt-oss-120b \
  --host 0.0.0.0 \
  --port 8000 \
  --config trtllm-prefill.yaml

# 1 x decode worker
# trtllm 1.3.0rc20
# trtllm-serve disaggregated, in front, sends each request to a prefill and then to a decode server

cat > trtllm-decode.yaml <<'END'
# trtllm 1.3.0rc20, tp1-dp4-ep4
tensor_parallel_size: 4
pipeline_parallel_size: 1
gpus_per_node: 8
enable_attention_dp: true
moe_expert_parallel_size: 4
moe_tensor_parallel_size: 1
max_batch_size: 331
max_num_tokens: 331
max_seq_len: 5120
enable_chunked_prefill: true
kv_cache_config:
  dtype: auto
  free_gpu_memory_fraction: 0.9
cuda_graph_config:
  enable_padding: true
  max_batch_size: 331
cache_transceiver_config:
  backend: NIXL
  max_tokens_in_buffer: 4096
END

TRTLLM_FORCE_COMM_METHOD=ALLGATHER \
trtllm-serve openai/gpt-oss-120b \
  --host 0.0.0.0 \
  --port 8000 \
  --config trtllm-decode.yaml
