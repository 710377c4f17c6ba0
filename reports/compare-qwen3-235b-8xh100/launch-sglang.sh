# sglang 0.5.14

python3 -m sglang.launch_server \
  --model-path Qwen/Qwen3-235B-A22B-FP8 \
  --host 0.0.0.0 \
  --port 30000 \
  --tp-size 8 \
  --ep-size 8 \
  --kv-cache-dtype bf16 \
  --context-length 5120 \
  --max-running-requests 154 \
  --chunked-prefill-size 16384 \
  --cuda-graph-max-bs-decode 154 \
  --mem-fraction-static 0.821
