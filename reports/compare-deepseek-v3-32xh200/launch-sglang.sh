#!/usr/bin/env bash
# sglang 0.5.23
# 2 x prefill worker
# 1 x decode worker
# a router in front sends each request to a prefill and then to a decode server
# to be filled in: HEAD_NODE_IP: the first node's address
# on each node: bash THIS_FILE prefill|decode-node0|decode-node1

case "${1-}" in
prefill)
python3 -m sglang.launch_server \
  --model-path deepseek-ai/DeepSeek-V3 \
  --host 0.0.0.0 \
  --port 30000 \
  --tp-size 2 \
  --pp-size 4 \
  --attn-dp-size 2 \
  --enable-dp-lm-head \
  --moe-dense-tp-size 1 \
  --ep-size 2 \
  --moe-a2a-backend deepep \
  --deepep-mode normal \
  --kv-cache-dtype bf16 \
  --context-length 5120 \
  --max-running-requests 120 \
  --chunked-prefill-size 16384 \
  --cuda-graph-max-bs-decode 60 \
  --mem-fraction-static 0.904 \
  --disaggregation-mode prefill \
  --disaggregation-transfer-backend mooncake
;;
decode-node0)
python3 -m sglang.launch_server \
  --model-path deepseek-ai/DeepSeek-V3 \
  --host 0.0.0.0 \
  --port 30000 \
  --tp-size 16 \
  --attn-dp-size 16 \
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
  --max-running-requests 960 \
  --cuda-graph-max-bs-decode 60 \
  --mem-fraction-static 0.915 \
  --disaggregation-mode decode \
  --disaggregation-transfer-backend mooncake
;;
decode-node1)
python3 -m sglang.launch_server \
  --model-path deepseek-ai/DeepSeek-V3 \
  --host 0.0.0.0 \
  --port 30000 \
  --tp-size 16 \
  --attn-dp-size 16 \
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
  --max-running-requests 960 \
  --cuda-graph-max-bs-decode 60 \
  --mem-fraction-static 0.915 \
  --disaggregation-mode decode \
  --disaggregation-transfer-backend mooncake
;;
*)
echo "usage: bash $0 prefill|decode-node0|decode-node1" >&2
exit 2
;;
esac
