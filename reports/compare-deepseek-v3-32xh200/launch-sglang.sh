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
  --max-running-requests 824 \
  --chunked-prefill-size 65536 \
  --mem-fraction-static 0.885 \
  --disaggregation-mode prefill \
  --disaggregation-transfer-backend mooncake

# 1 x decode worker
# sglang 0.5.14
# to be filled in: HEAD_NODE_IP: the first node's address
# a router in front sends each request to a prefill and then to a decode server

# node 0
python3 -m sglang.launch_server \
  --model-path deepseek-ai/DeepSeek-V3 \
  --host 0.0.0.0 \
  --port 30000 \
  --tp-size 16 \
  --dp-size 16 \
  --enable-dp-attention \
  --enable-dp-lm-head \
  --moe-dense-tp-size 1 \
  --nnodes 2 \
  --node-rank 0 \
  --dist-init-addr HEAD_NODE_IP:20000 \
  --ep-size 16 \
  --moe-a2a-backend deepep \
  --deepep-mode low_latency \
  --kv-cache-dtype bf16 \
  --context-length 5120 \
  --max-running-requests 1648 \
  --cuda-graph-max-bs-decode 103 \
  --mem-fraction-static 0.861 \
  --disaggregation-mode decode \
  --disaggregation-transfer-backend mooncake

# node 1
python3 -m sglang.launch_server \
  --model-path deepseek-ai/DeepSeek-V3 \
  --host 0.0.0.0 \
  --port 30000 \
  --tp-size 16 \
  --dp-size 16 \
  --enable-dp-attention \
  --enable-dp-lm-head \
  --moe-dense-tp-size 1 \
  --nnodes 2 \
  --node-rank 1 \
  --dist-init-addr HEAD_NODE_IP:20000 \
  --ep-size 16 \
  --moe-a2a-backend deepep \
  --deepep-mode low_latency \
  --kv-cache-dtype bf16 \
  --context-length 5120 \
  --max-running-requests 1648 \
  --cuda-graph-max-bs-decode 103 \
  --mem-fraction-static 0.861 \
  --disaggregation-mode decode \
  --disaggregation-transfer-backend mooncake
