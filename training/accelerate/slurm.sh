#!/bin/bash
# A recipe on several nodes of a SLURM cluster, 8 GPUs each, that survives being preempted:
# sbatch --nodes 2 training/accelerate/slurm.sh training/recipes/fox_pro_760m_16b.yaml --run.output_dir runs/fox_760m
#SBATCH --job-name=fox
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Two minutes before the end every process is told to save and leave; SLURM starts the job again, which goes on.
#SBATCH --signal=SIGTERM@120
set -euo pipefail

recipe=$1
shift
export OMP_NUM_THREADS=8
address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
gpus=$((SLURM_NNODES * 8))

# One launcher a node, which starts a process for each of its GPUs. $SLURM_NODEID is each node's own.
srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch --config_file training/accelerate/hsdp.yaml \
        --num_machines "$SLURM_NNODES" --num_processes "$0" --machine_rank "$SLURM_NODEID" \
        --parallelism_config_dp_replicate_size "$SLURM_NNODES" \
        --main_process_ip "$1" --main_process_port 29500 --rdzv_backend c10d \
        -m fox_training.train --recipe "${@:2}"
' "$gpus" "$address" "$recipe" "$@"
