#!/usr/bin/env bash
# single_host.sh RANKS RECIPE [--set key=value ...]: train on this host with DeepSpeed's launcher.
# On a host without a GPU: DS_ACCELERATOR=cpu launch/single_host.sh 2 configs/digits-qsr.yaml
# No network is crossed. README.md, Networks, has NCCL_DEBUG=INFO, which says what NCCL takes instead.
set -euo pipefail
ranks=${1:?number of ranks} recipe=${2:?recipe}
exec deepspeed --num_gpus "$ranks" --master_port "${MASTER_PORT:-29500}" --module qsr_engine train "$recipe" "${@:3}"
