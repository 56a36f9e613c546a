#!/usr/bin/env bash
#SBATCH --job-name=qsr
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --signal=USR1@120
# sbatch [--nodes N] [--gpus-per-node G] launch/slurm.sh RECIPE [--engine fsdp] [--set key=value ...]
# One torchrun a node, which meet on the first node. RANKS_PER_NODE is one a GPU unless set; PORT must be free on the
# first node. Workers of one node each: --set qsr.worker_size=G. On nodes with several networks: NCCL_SOCKET_IFNAME=ib0
# before sbatch, which hands the shell's variables on to every node; what else helps: launch/README.md, Networks.
# A job that is requeued goes on from its last checkpoint, where the recipe sets logging.checkpoint_every. 120 s
# before its time is up, and when it is preempted, the ranks stop at a boundary and save (docs/faults.md);
# then this script requeues it. GRACE: seconds in which they must have done so. RESTARTS=5: when a rank
# dies and its node does not, all of them go on from the last checkpoint, 5 times at most.
set -euo pipefail
recipe=${1:?recipe}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a new store for every start; the ranks of one before are dead
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${GRACE:-110}
export QSR_STOPPED_FILE=$PWD/.qsr-stopped-$SLURM_JOB_ID # rank 0 makes it when the run has stopped so
rm -f "$QSR_STOPPED_FILE" # of a start of this job that ended before it could
trap : TERM USR1 # this shell outlives them, and srun's exit code comes first
code=0
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "${RANKS_PER_NODE:-gpu}" \
  --max-restarts "${RESTARTS:-0}" \
  --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$first:${PORT:-29500}" \
  --module qsr_engine train "$recipe" --resume "${@:2}" || code=$?
[ -e "$QSR_STOPPED_FILE" ] || exit "$code"
rm "$QSR_STOPPED_FILE"
scontrol requeue "$SLURM_JOB_ID"
