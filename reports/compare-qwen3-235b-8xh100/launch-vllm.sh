# vllm 0.33.0

vllm serve Qwen/Qwen3-235B-A22B-FP8 \
  --host 0.0.0.0 \
  --port 8000 \
  --tensor-parallel-size 8 \
  --enable-expert-parallel \
  --kv-cache-dtype auto \
  --max-model-len 5120 \
  --max-num-seqs 146 \
  --max-num-batched-tokens 16384 \
  --gpu-memory-utilization 0.92
