#!/usr/bin/env bash
# sglang 0.5.23
# 2 x prefill worker
# 1 x decode worker
# a router in front sends each request to a prefill and then to a decode server
# on each node: bash THIS_FILE prefill|decode

case "${1-}" in
prefill)
python3 -m sglang.launch_server \
  --model-path deepseek-ai/DeepSeek-V3 \
  --host 0.0.0.0 \
  --port 30000 \
  --tp-size 8 \
  --attn-dp-size 8 \
  --enable-dp-lm-head \
  --moe-dense-tp-size 1 \
  --ep-size 8 \
  --moe-a2a-backend deepep \
  --deepep-mode normal \
  --enable-two-batch-overlap \
  --kv-cache-dtype bf16 \
  --context-length 5120 \
  --max-running-requests 784 \
  --chunked-prefill-size 65536 \
  --mem-fraction-static 0.288 \
  --disaggregation-mode prefill \
  --disaggregation-transfer-backend mooncake
;;
decode)
python3 -m sglang.launch_server \
  --model-path deepseek-ai/DeepSeek-V3 \
  --host 0.0.0.0 \
  --port 30000 \
  --tp-size 8 \
  --attn-dp-size 8 \
  --enable-dp-lm-head \
  --moe-dense-tp-size 1 \
  --ep-size 8 \
  --moe-a2a-backend deepep \
  --deepep-mode low_latency \
  --enable-eplb \
  --ep-num-redundant-experts 8 \
  --kv-cache-dtype bf16 \
  --context-length 5120 \
  --max-running-requests 784 \
  --cuda-graph-max-bs-decode 98 \
  --mem-fraction-static 0.915 \
  --disaggregation-mode decode \
  --disaggregation-transfer-backend mooncake
;;
*)
echo "usage: bash $0 prefill|decode" >&2
exit 2
;;
esac
