#!/usr/bin/env bash
# vllm 0.33.0
# 2 x prefill worker
# 1 x decode worker
# to be filled in: THIS_NODE_IP: the address of the node that runs the command
# a proxy in front sends each request to a prefill and then to a decode server
# to be filled in: HEAD_NODE_IP: the first node's address; THIS_NODE_IP: the address of the node that runs the command
# on each node: bash THIS_FILE prefill|decode-node0|decode-node1

case "${1-}" in
prefill)
VLLM_NIXL_SIDE_CHANNEL_HOST=THIS_NODE_IP \
vllm serve deepseek-ai/DeepSeek-V3 \
  --host 0.0.0.0 \
  --port 8000 \
  --tensor-parallel-size 1 \
  --pipeline-parallel-size 4 \
  --data-parallel-size 2 \
  --enable-expert-parallel \
  --all2all-backend deepep_high_throughput \
  --kv-cache-dtype auto \
  --max-model-len 5120 \
  --max-num-seqs 60 \
  --max-num-batched-tokens 8192 \
  --gpu-memory-utilization 0.92 \
  --kv-transfer-config '{"kv_connector": "NixlConnector", "kv_role": "kv_producer"}'
;;
decode-node0)
VLLM_NIXL_SIDE_CHANNEL_HOST=THIS_NODE_IP \
vllm serve deepseek-ai/DeepSeek-V3 \
  --host 0.0.0.0 \
  --port 8000 \
  --tensor-parallel-size 1 \
  --data-parallel-size 16 \
  --data-parallel-size-local 8 \
  --data-parallel-address HEAD_NODE_IP \
  --data-parallel-rpc-port 13345 \
  --enable-expert-parallel \
  --all2all-backend deepep_low_latency \
  --kv-cache-dtype auto \
  --max-model-len 5120 \
  --max-num-seqs 60 \
  --max-num-batched-tokens 60 \
  --gpu-memory-utilization 0.92 \
  --kv-transfer-config '{"kv_connector": "NixlConnector", "kv_role": "kv_consumer"}'
;;
decode-node1)
VLLM_NIXL_SIDE_CHANNEL_HOST=THIS_NODE_IP \
vllm serve deepseek-ai/DeepSeek-V3 \
  --host 0.0.0.0 \
  --port 8000 \
  --tensor-parallel-size 1 \
  --data-parallel-size 16 \
  --data-parallel-size-local 8 \
  --data-parallel-start-rank 8 \
  --data-parallel-address HEAD_NODE_IP \
  --data-parallel-rpc-port 13345 \
  --headless \
  --enable-expert-parallel \
  --all2all-backend deepep_low_latency \
  --kv-cache-dtype auto \
  --max-model-len 5120 \
  --max-num-seqs 60 \
  --max-num-batched-tokens 60 \
  --gpu-memory-utilization 0.92 \
  --kv-transfer-config '{"kv_connector": "NixlConnector", "kv_role": "kv_consumer"}'
;;
*)
echo "usage: bash $0 prefill|decode-node0|decode-node1" >&2
exit 2
;;
esac
