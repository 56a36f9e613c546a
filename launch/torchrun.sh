#!/usr/bin/env bash
# torchrun.sh RANKS RECIPE [--set key=value ...]: train on this host with torchrun instead of DeepSpeed's launcher.
set -euo pipefail
ranks=${1:?number of ranks} recipe=${2:?recipe}
exec torchrun --standalone --nproc_per_node "$ranks" --module qsr_engine train "$recipe" "${@:3}"
