#!/usr/bin/env bash
#SBATCH --job-name=qsr
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
# sbatch [--nodes N] [--gpus-per-node G] launch/slurm.sh RECIPE [--engine fsdp] [--set key=value ...]
# One torchrun a node, which meet on the first node. A job that is requeued goes on from its last checkpoint, where the
# recipe sets logging.checkpoint_every. RANKS_PER_NODE is one a GPU unless set; PORT must be free on the first node.
# Workers of one node each: --set qsr.worker_size=G. On nodes with several networks: NCCL_SOCKET_IFNAME=ib0 before
# sbatch, which hands the shell's variables on to every node; this and what else helps: README.md, Networks.
set -euo pipefail
recipe=${1:?recipe}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
exec srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "${RANKS_PER_NODE:-gpu}" \
  --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$first:${PORT:-29500}" \
  --module qsr_engine train "$recipe" --resume "${@:2}"
