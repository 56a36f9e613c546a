#!/usr/bin/env bash
# torchrun.sh RANKS RECIPE [--engine fsdp] [--set key=value ...]: train with torchrun instead of DeepSpeed's launcher.
# RANKS are those of one host. For several, run it on each with HOSTS=2 RENDEZVOUS=NAME_OF_THE_FIRST:29500 before it;
# the first host waits for the others. The recipe's shards and runs must be in the same places on all of them.
# On hosts with several networks, name the one to use: NCCL_SOCKET_IFNAME=eth0 (GLOO_SOCKET_IFNAME=eth0 on CPUs); this
# and what else helps: launch/README.md, Networks.
# RESTARTS=5 before it: when a rank dies, all of them go on from the last checkpoint, 5 times at most. HOSTS=2:4, from 2
# to 4 hosts, and 3 restarts unless RESTARTS says otherwise: the run goes on without a host that is lost, and takes one
# that joins. With either, a run that has begun is resumed. The first host keeps the list of hosts: do not lose it.
set -euo pipefail
ranks=${1:?number of ranks} recipe=${2:?recipe}
hosts=(--standalone)
resume=()
restarts=${RESTARTS:-0}
if [ "${HOSTS:-1}" != 1 ]; then
  hosts=(--nnodes "$HOSTS" --rdzv_backend c10d --rdzv_endpoint "${RENDEZVOUS:?name of the first host and a port}")
fi
if [[ ${HOSTS:-1} == *:* ]]; then
  restarts=${RESTARTS:-3} # going on without a host is one, too
fi
if [ "$restarts" != 0 ]; then
  resume=(--resume)
fi
if [[ -z ${OMP_NUM_THREADS:-} && $ranks =~ ^[1-9][0-9]*$ ]]; then # torchrun would give one core to a rank
  cores=$(nproc)
  export OMP_NUM_THREADS=$((cores > ranks ? cores / ranks : 1))
fi
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # or the hosts go on to look for rank 0 on a host that is lost
exec torchrun "${hosts[@]}" --max-restarts "$restarts" --nproc_per_node "$ranks" --module qsr_engine train "$recipe" \
  "${resume[@]}" "${@:3}"
