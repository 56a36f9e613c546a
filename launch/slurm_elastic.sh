#!/usr/bin/env bash
#SBATCH --job-name=qsr-elastic
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --no-kill
# sbatch [--nodes N] [--gpus-per-node G] launch/slurm_elastic.sh RECIPE [--set key=value ...]
# Workers that come and go: the lighthouse on the first node, at PORT (29510), and `qsr train --elastic` on every node,
# with RANKS_PER_NODE ranks (G unless set). A node that is lost ends nothing but its own workers, unless it is the
# first; a worker that dies is started again RESTARTS (100) times on its node. Further jobs join with TORCHFT_LIGHTHOUSE
# set. docs/elastic.md says what is promised. GRACE is the recipe's membership.grace_seconds, which the lighthouse must
# know.
set -euo pipefail
recipe=${1:?recipe}
ranks=${RANKS_PER_NODE:-${SLURM_GPUS_PER_NODE:?write RANKS_PER_NODE}}
if [ -z "${TORCHFT_LIGHTHOUSE:-}" ]; then
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
  port=${PORT:-29510}
  export TORCHFT_LIGHTHOUSE=http://$first:$port
  qsr lighthouse --port "$port" ${GRACE:+--grace-seconds "$GRACE"} & # this script runs on the first node
  trap 'kill %1' EXIT
fi
srun --kill-on-bad-exit=0 qsr train "$recipe" --elastic --ranks "$ranks" --restarts "${RESTARTS:-100}" "${@:2}"
