#!/usr/bin/env bash
# vllm 0.33.0
# 2 x prefill worker
# 1 x decode worker
# to be filled in: THIS_NODE_IP: the address of the node that runs the command
# a proxy in front sends each request to a prefill and then to a decode server
# on each node: bash THIS_FILE prefill|decode

case "${1-}" in
prefill)
VLLM_NIXL_SIDE_CHANNEL_HOST=THIS_NODE_IP \
vllm serve openai/gpt-oss-120b \
  --host 0.0.0.0 \
  --port 8000 \
  --tensor-parallel-size 1 \
  --kv-cache-dtype auto \
  --max-model-len 5120 \
  --max-num-seqs 256 \
  --max-num-batched-tokens 16384 \
  --gpu-memory-utilization 0.92 \
  --kv-transfer-config '{"kv_connector": "NixlConnector", "kv_role": "kv_producer"}'
;;
decode)
VLLM_NIXL_SIDE_CHANNEL_HOST=THIS_NODE_IP \
vllm serve openai/gpt-oss-120b \
  --host 0.0.0.0 \
  --port 8000 \
  --tensor-parallel-size 1 \
  --data-parallel-size 4 \
  --enable-expert-parallel \
  --all2all-backend deepep_low_latency \
  --kv-cache-dtype auto \
  --max-model-len 5120 \
  --max-num-seqs 256 \
  --max-num-batched-tokens 256 \
  --gpu-memory-utilization 0.92 \
  --kv-transfer-config '{"kv_connector": "NixlConnector", "kv_role": "kv_consumer"}'
;;
*)
echo "usage: bash $0 prefill|decode" >&2
exit 2
;;
esac
