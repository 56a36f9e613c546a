#!/usr/bin/env bash
# torchrun.sh RANKS RECIPE [--engine fsdp] [--set key=value ...]: train with torchrun instead of DeepSpeed's launcher.
# RANKS are those of one host. For several, run it on each with HOSTS=2 RENDEZVOUS=NAME_OF_THE_FIRST:29500 before it;
# the first host waits for the others. The recipe's shards and runs must be in the same places on all of them.
# On hosts with several networks, name the one to use: NCCL_SOCKET_IFNAME=eth0 (GLOO_SOCKET_IFNAME=eth0 on CPUs); this
# and what else helps: README.md, Networks.
set -euo pipefail
ranks=${1:?number of ranks} recipe=${2:?recipe}
hosts=(--standalone)
if [ "${HOSTS:-1}" -gt 1 ]; then
  hosts=(--nnodes "$HOSTS" --rdzv_backend c10d --rdzv_endpoint "${RENDEZVOUS:?name of the first host and a port}")
fi
exec torchrun "${hosts[@]}" --nproc_per_node "$ranks" --module qsr_engine train "$recipe" "${@:3}"
