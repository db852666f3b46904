#!/bin/bash
# One training on several machines, which goes on after its time limit and after a machine fails.
#
#     sbatch docs/slurm.sh clip_vit_b16 --data.shards /data/datacomp --parallel fsdp
#
# What stands behind the script's name are the words of `mmcontrast train`. Set the first lines for your cluster.

#SBATCH --job-name=mmcontrast
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

set -u
GPUS=${SLURM_GPUS_ON_NODE:-8}
PORT=${PORT:-29500}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export MMCONTRAST_CACHE=${MMCONTRAST_CACHE:-${TMPDIR:-/tmp}/mmcontrast}  # a disk of each machine, for remote shards
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240  # a step, and a checkpoint, before torchrun kills what it was told to end

# 300 s before the end SLURM sends USR1 to this script. SIGTERM makes all ranks save at one step, and end.
over=0
on_time_limit() {
    over=1
    kill -TERM "$step"
}
trap on_time_limit USR1
trap 'kill -TERM "$step"' TERM

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc_per_node "$GPUS" \
    --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$HEAD:$PORT" \
    -m mmcontrast train "$@" &
step=$!

wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do # a signal ends `wait`, not the step
    wait "$step"
    code=$?
done

# The same folder, the same settings: it goes on from the checkpoint.
if [ "$over" = 1 ] && [ "$code" != 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
