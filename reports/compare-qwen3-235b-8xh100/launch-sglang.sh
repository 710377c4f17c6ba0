# sglang 0.5.23

python3 -m sglang.launch_server \
  --model-path Qwen/Qwen3-235B-A22B-FP8 \
  --host 0.0.0.0 \
  --port 30000 \
  --tp-size 8 \
  --ep-size 8 \
  --kv-cache-dtype bf16 \
  --context-length 5120 \
  --max-running-requests 146 \
  --chunked-prefill-size 16384 \
  --cuda-graph-max-bs-decode 146 \
  --mem-fraction-static 0.669
