#!/bin/bash
# A run on two nodes of a Slurm cluster, one launcher a node:  sbatch examples/clusters/slurm.sh CONFIG.yaml [--dotted.field value ...]
# Model, data and output lie on a disk that both nodes see. A requeued job goes on where it was. docs/clusters.md
#SBATCH --job-name=flashbone
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER=${HOSTS%%$'\n'*}  # `| head -n 1` may stop scontrol by SIGPIPE, and so the script
export MASTER PORT=$((20000 + SLURM_JOB_ID % 20000))

# Each task asks Slurm for its own rank, so the words are expanded there.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '
  exec accelerate launch --multi_gpu --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
    --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" --main_process_ip "$MASTER" --main_process_port "$PORT" \
    --mixed_precision no --dynamo_backend no --module flashbone train "$@" --resume' flashbone "$@"
