#!/usr/bin/env bash
# On every node: NODES, NODE (0, 1, ...) and HEAD (address of node 0) say where it is.
#   NODES=32 NODE=0 HEAD=10.0.0.1 configs/deploy/torchrun.sh configs/train/7b-8k.yaml [a.b=c ...]
set -euo pipefail
exec torchrun --nnodes "$NODES" --node-rank "$NODE" --nproc-per-node "${DEVICES:-8}" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:29400" --rdzv-id "${RUN_ID:-spikingbrain}" \
  --no-python spikingbrain train "$@"
