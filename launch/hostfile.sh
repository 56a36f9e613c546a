#!/usr/bin/env bash
# hostfile.sh HOSTFILE RECIPE [--set key=value ...]: train on several hosts with DeepSpeed's launcher.
# HOSTFILE has a line a host, `NAME slots=GPUS`. It needs pdsh here, ssh without a password to every host, the same
# checkout and the same Python environment on all of them, and shards at the recipe's data.shards on each.
# On hosts with several networks, name the one to use: put NCCL_SOCKET_IFNAME=eth0 into a file .deepspeed_env here.
set -euo pipefail
hostfile=${1:?hostfile} recipe=${2:?recipe}
exec deepspeed --hostfile "$hostfile" --module qsr_engine train "$recipe" "${@:3}"
