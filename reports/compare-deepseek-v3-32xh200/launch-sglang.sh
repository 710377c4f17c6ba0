# 2 x prefill worker
# sglang 0.5.14
# a router in front sends each request to a prefill and then to a decode server

python3 -m sglang.launch_server \
  --model-path deepseek-ai/DeepSeek-V3 \
  --host 0.0.0.0 \
  --port 30000 \
  --tp-size 8 \
  --dp-size 8 \
  --enable-dp-attention \
  --enable-dp-lm-head \
  --moe-dense-tp-size 1 \
  --ep-size 8 \
  --moe-a2a-backend deepep \
  --deepep-mode normal \
  --enable-two-batch-overlap \
  --kv-cache-dtype bf16 \
  --context-length 5120 \
  --max-running-requests 736 \
  --chunked-prefill-size 65536 \
  --mem-fraction-static 0.887 \
  --disaggregation-mode prefill \
  --disaggregation-transfer-backend mooncake

# 1 x decode worker
# sglang 0.5.14
# a router in front sends each request to a prefill and then to a decode server

python3 -m sglang.launch_server \
  --model-path deepseek-ai/DeepSeek-V3 \
  --host 0.0.0.0 \
  --port 30000 \
  --tp-size 8 \
  --dp-size 8 \
  --enable-dp-attention \
  --enable-dp-lm-head \
  --moe-dense-tp-size 1 \
  --ep-size 8 \
  --moe-a2a-backend deepep \
  --deepep-mode low_latency \
  --kv-cache-dtype bf16 \
  --context-length 5120 \
  --max-running-requests 736 \
  --cuda-graph-max-bs-decode 92 \
  --mem-fraction-static 0.887 \
  --disaggregation-mode decode \
  --disaggregation-transfer-backend mooncake
