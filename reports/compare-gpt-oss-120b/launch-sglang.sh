# 2 x prefill worker
# sglang 0.5.14
# a router in front sends each request to a prefill and then to a decode server

python3 -m sglang.launch_server \
  --model-path openai/gpt-oss-120b \
  --host 0.0.0.0 \
  --port 30000 \
  --tp-size 2 \
  --dp-size 2 \
  --enable-dp-attention \
  --enable-dp-lm-head \
  --moe-dense-tp-size 1 \
  --kv-cache-dtype bf16 \
  --context-length 5120 \
  --max-running-requests 662 \
  --chunked-prefill-size 16384 \
  --mem-fraction-static 0.842 \
  --disaggregation-mode prefill \
  --disaggregation-transfer-backend mooncake

# 1 x decode worker
# sglang 0.5.14
# a router in front sends each request to a prefill and then to a decode server

python3 -m sglang.launch_server \
  --model-path openai/gpt-oss-120b \
  --host 0.0.0.0 \
  --port 30000 \
  --tp-size 4 \
  --dp-size 4 \
  --enable-dp-attention \
  --enable-dp-lm-head \
  --moe-dense-tp-size 1 \
  --ep-size 4 \
  --moe-a2a-backend none \
  --kv-cache-dtype bf16 \
  --context-length 5120 \
  --max-running-requests 1324 \
  --cuda-graph-max-bs-decode 331 \
  --mem-fraction-static 0.824 \
  --disaggregation-mode decode \
  --disaggregation-transfer-backend mooncake
