#!/usr/bin/env bash
# A Ray cluster within one Slurm job, and a sweep on it.
#
#   sbatch tuning/cluster/slurm.sh --data.train /shared/pairs.jsonl
#   sbatch tuning/cluster/slurm.sh --resume          # after the job's time was up
#SBATCH --job-name=lightning-dpo
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=4
#SBATCH --time=08:00:00
set -euo pipefail

port=6379
nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
head_ip=$(srun --nodes=1 --ntasks=1 -w "${nodes[0]}" hostname --ip-address | awk '{print $1}')
export RAY_ADDRESS="$head_ip:$port"

start() {  # node, then the arguments of ray start
  local node=$1
  shift
  srun --nodes=1 --ntasks=1 -w "$node" ray start --block \
    --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" "$@" &
}

start "${nodes[0]}" --head --node-ip-address="$head_ip" --port="$port"
until ray status >/dev/null 2>&1; do sleep 2; done
for node in "${nodes[@]:1}"; do
  start "$node" --address="$RAY_ADDRESS"
done
until (($(ray status 2>/dev/null | grep -c "node_") >= ${#nodes[@]})); do sleep 2; done

lightning-dpo tune --config tuning/cluster.yaml --ray_address "$RAY_ADDRESS" "$@"
