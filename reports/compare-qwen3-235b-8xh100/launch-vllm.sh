# vllm 0.33.0
# prefill and decode both exchange tokens by DeepEP's high_throughput kernels

vllm serve Qwen/Qwen3-235B-A22B-FP8 \
  --host 0.0.0.0 \
  --port 8000 \
  --tensor-parallel-size 1 \
  --data-parallel-size 8 \
  --enable-expert-parallel \
  --all2all-backend deepep_high_throughput \
  --kv-cache-dtype auto \
  --max-model-len 5120 \
  --max-num-seqs 23 \
  --max-num-batched-tokens 256 \
  --gpu-memory-utilization 0.92
