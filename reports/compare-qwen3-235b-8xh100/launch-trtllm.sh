# trtllm 1.3.0rc20

cat > trtllm-serve.yaml <<'END'
# trtllm 1.3.0rc20, tp8-dp1-ep8
tensor_parallel_size: 8
pipeline_parallel_size: 1
gpus_per_node: 8
enable_attention_dp: false
moe_expert_parallel_size: 8
moe_tensor_parallel_size: 1
max_batch_size: 146
max_num_tokens: 16384
max_seq_len: 5120
enable_chunked_prefill: true
kv_cache_config:
  dtype: auto
  free_gpu_memory_fraction: 0.9
cuda_graph_config:
  enable_padding: true
  max_batch_size: 146
END

trtllm-serve Qwen/Qwen3-235B-A22B-FP8 \
  --host 0.0.0.0 \
  --port 8000 \
  --config trtllm-serve.yaml
