#!/usr/bin/env bash
# single_host.sh RANKS RECIPE [--set key=value ...]: train on this host with DeepSpeed's launcher.
# On a host without a GPU: DS_ACCELERATOR=cpu launch/single_host.sh 2 configs/digits-qsr.yaml
# CUDA_VISIBLE_DEVICES=2,3 before it: on these GPUs, the first RANKS of them.
# No network is crossed. launch/README.md, Networks, has NCCL_DEBUG=INFO, which says what NCCL takes instead.
set -euo pipefail
ranks=${1:?number of ranks} recipe=${2:?recipe}
where=(--num_gpus "$ranks")
if [[ -n ${CUDA_VISIBLE_DEVICES:-} && ${DS_ACCELERATOR:-} != cpu ]]; then # DeepSpeed would take the first of the host
  where=(--include "localhost:$(cut -d, -f"1-$ranks" <<<"$CUDA_VISIBLE_DEVICES")")
fi
exec deepspeed "${where[@]}" --master_port "${MASTER_PORT:-29500}" --module qsr_engine train "$recipe" "${@:3}"
