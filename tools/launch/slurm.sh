#!/bin/bash
# Several machines with SLURM, one torchrun on each:   sbatch tools/launch/slurm.sh --cfg sd15.yaml SOLVER.TRAIN_DATA.DATA_FOLDER=/data/images
# The run is saved when its time ends, and goes on by itself: the recipe says RESUME_FROM: auto, and the job puts itself back into the queue.
#SBATCH --job-name=scepter
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.txt
set -u
cd "${SLURM_SUBMIT_DIR:?sbatch sets it}"

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))    # another one for each job, should two share a machine
processes=${SLURM_GPUS_ON_NODE:-${SLURM_CPUS_PER_TASK:-1}}

# on the first machine torchrun keeps the store; c10d lets all begin again together when one has lost a worker
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "$processes" --max-restarts 3 \
    --rdzv_backend c10d --rdzv_endpoint "$first:$port" --rdzv_id "$SLURM_JOB_ID" \
    scepter/run_train.py --launcher torchrun "$@" &
run=$!

stopped=
stop() {    # five minutes before the end: every process ends its step and saves
    stopped=yes
    kill -TERM "$run" 2>/dev/null
}
trap stop TERM
wait "$run"; code=$?
while [ -n "$stopped" ] && kill -0 "$run" 2>/dev/null; do wait "$run"; code=$?; done
[ -n "$stopped" ] && exec scontrol requeue "$SLURM_JOB_ID"
exit "$code"
