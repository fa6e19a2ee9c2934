#!/usr/bin/env bash
# ris-fast on all GPUs of the nodes that SLURM gives: sbatch docs/slurm.sh [what `ris-fast train` takes]
#
#   RUN=runs/night sbatch --nodes=4 docs/slurm.sh --preset full --epochs 60
#
# RUN must be on a file system that all nodes see. A job that is requeued, or submitted again with the same RUN,
# continues from the last checkpoint.
#SBATCH --job-name=ris-fast
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=01:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

RUN=${RUN:-runs/$SLURM_JOB_ID}
ranks=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}} # one rank a GPU
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
if [ -e "$RUN/checkpoints/last.safetensors" ]; then
    where=(--resume "$RUN")
else
    where=(--out "$RUN")
fi

# One torchrun a node; it starts and watches the ranks of its node. With eight GPUs and 32 cores a rank has four threads.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SLURM_CPUS_PER_TASK / ranks > 0 ? SLURM_CPUS_PER_TASK / ranks : 1))}
exec srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_NNODES" \
    --nproc-per-node="$ranks" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$first:${PORT:-29400}" \
    --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
    --max-restarts="${RESTARTS:-3}" \
    -m ris_fast train "${where[@]}" "$@"
