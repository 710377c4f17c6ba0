# 2 x prefill worker
# vllm 0.24.0
# to be filled in: THIS_NODE_IP: the address of the node that runs the command
# a proxy in front sends each request to a prefill and then to a decode server

VLLM_NIXL_SIDE_CHANNEL_HOST=THIS_NODE_IP \
vllm serve deepseek-ai/DeepSeek-V3 \
  --host 0.0.0.0 \
  --port 8000 \
  --tensor-parallel-size 1 \
  --data-parallel-size 8 \
  --enable-expert-parallel \
  --all2all-backend deepep_high_throughput \
  --enable-dbo \
  --kv-cache-dtype auto \
  --max-model-len 5120 \
  --max-num-seqs 92 \
  --max-num-batched-tokens 8192 \
  --gpu-memory-utilization 0.92 \
  --kv-transfer-config '{"kv_connector": "NixlConnector", "kv_role": "kv_producer"}'

# 1 x decode worker
# vllm 0.24.0
# to be filled in: THIS_NODE_IP: the address of the node that runs the command
# a proxy in front sends each request to a prefill and then to a decode server

VLLM_NIXL_SIDE_CHANNEL_HOST=THIS_NODE_IP \
vllm serve deepseek-ai/DeepSeek-V3 \
  --host 0.0.0.0 \
  --port 8000 \
  --tensor-parallel-size 1 \
  --data-parallel-size 8 \
  --enable-expert-parallel \
  --all2all-backend deepep_low_latency \
  --kv-cache-dtype auto \
  --max-model-len 5120 \
  --max-num-seqs 92 \
  --max-num-batched-tokens 92 \
  --gpu-memory-utilization 0.92 \
  --kv-transfer-config '{"kv_connector": "NixlConnector", "kv_role": "kv_consumer"}'
