# sglang 0.5.23
# DeepEP's normal mode turns CUDA graphs off, in decode too

python3 -m sglang.launch_server \
  --model-path Qwen/Qwen3-235B-A22B-FP8 \
  --host 0.0.0.0 \
  --port 30000 \
  --tp-size 8 \
  --attn-dp-size 8 \
  --enable-dp-lm-head \
  --moe-dense-tp-size 1 \
  --ep-size 8 \
  --moe-a2a-backend deepep \
  --deepep-mode normal \
  --kv-cache-dtype bf16 \
  --context-length 5120 \
  --max-running-requests 184 \
  --chunked-prefill-size 2048 \
  --cuda-graph-max-bs-decode 23 \
  --mem-fraction-static 0.849
