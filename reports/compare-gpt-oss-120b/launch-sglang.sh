#!/usr/bin/env bash
# sglang 0.5.23
# 2 x prefill worker
# 1 x decode worker
# a router in front sends each request to a prefill and then to a decode server
# on each node: bash THIS_FILE prefill|decode

case "${1-}" in
prefill)
python3 -m sglang.launch_server \
  --model-path openai/gpt-oss-120b \
  --host 0.0.0.0 \
  --port 30000 \
  --tp-size 1 \
  --kv-cache-dtype bf16 \
  --context-length 5120 \
  --max-running-requests 256 \
  --chunked-prefill-size 16384 \
  --cuda-graph-max-bs-decode 256 \
  --mem-fraction-static 0.859 \
  --disaggregation-mode prefill \
  --disaggregation-transfer-backend mooncake
;;
decode)
SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK=256 \
python3 -m sglang.launch_server \
  --model-path openai/gpt-oss-120b \
  --host 0.0.0.0 \
  --port 30000 \
  --tp-size 4 \
  --attn-dp-size 4 \
  --enable-dp-lm-head \
  --moe-dense-tp-size 1 \
  --ep-size 4 \
  --moe-a2a-backend deepep \
  --deepep-mode low_latency \
  --kv-cache-dtype bf16 \
  --context-length 5120 \
  --max-running-requests 1024 \
  --cuda-graph-max-bs-decode 256 \
  --mem-fraction-static 0.933 \
  --disaggregation-mode decode \
  --disaggregation-transfer-backend mooncake
;;
*)
echo "usage: bash $0 prefill|decode" >&2
exit 2
;;
esac
