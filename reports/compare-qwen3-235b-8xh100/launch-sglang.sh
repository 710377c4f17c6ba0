# sglang 0.5.23

python3 -m sglang.launch_server \
  --model-path Qwen/Qwen3-235B-A22B-FP8 \
  --host 0.0.0.0 \
  --port 30000 \
  --tp-size 4 \
  --ep-size 4 \
  --kv-cache-dtype bf16 \
  --context-length 5120 \
  --max-running-requests 64 \
  --chunked-prefill-size 8192 \
  --cuda-graph-max-bs-decode 64 \
  --mem-fraction-static 0.83
