#!/usr/bin/env bash
# hostfile.sh HOSTFILE RECIPE [--set key=value ...]: train on several hosts with DeepSpeed's launcher.
# HOSTFILE has a line a host, `NAME slots=GPUS`. It needs pdsh here, ssh without a password to every host, the same
# checkout and the same Python environment on all of them, and shards at the recipe's data.shards on each.
# Hosts with several networks, or slow ones: launch/README.md, Networks. The launcher hands NCCL_... of this shell on
# to the ranks where they train on GPUs; what else they need (GLOO_SOCKET_IFNAME=eth0) goes into a file .deepspeed_env.
# `qsr hosts` asks every host first; a rank that does not come later ends the run after QSR_START_SECONDS (120).
set -euo pipefail
hostfile=${1:?hostfile} recipe=${2:?recipe}
qsr hosts "$hostfile"
exec deepspeed --hostfile "$hostfile" --module qsr_engine train "$recipe" "${@:3}"
