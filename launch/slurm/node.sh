#!/usr/bin/env bash
# Run by train.sbatch once per node: start the launcher with the processes of this node.
set -euo pipefail

# Slurm's signal reaches every process of the job and would end this script and the launcher. Their children inherit
# that it is ignored, until the trainer installs its own handler.
trap '' USR1

launch_dir="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
repository="$(cd "$launch_dir/../.." && pwd)"

fail() {
  echo "error: $*" >&2
  exit 1
}

echo "=== start $DETR_DIST_START of job $SLURM_JOB_ID, node $SLURM_NODEID of $SLURM_NNODES: $(hostname) at $(date '+%F %T')"

if [[ -f "$launch_dir/site.env" ]]; then
  set +u # site settings are rarely written for it
  # shellcheck source=/dev/null
  source "$launch_dir/site.env"
  prepare_node || fail "prepare_node in $launch_dir/site.env failed on $(hostname)"
  set -u
fi
command -v accelerate >/dev/null || PATH="$repository/.venv/bin:$PATH"
command -v accelerate >/dev/null ||
  fail "detr_dist is not installed on $(hostname): let prepare_node in $launch_dir/site.env activate its environment"

here="${SLURM_GPUS_ON_NODE:-$DETR_DIST_PROCESSES_PER_NODE}"
[[ "$here" == "$DETR_DIST_PROCESSES_PER_NODE" ]] ||
  fail "$(hostname) has $here GPUs for this job, the first node $DETR_DIST_PROCESSES_PER_NODE: request GPUs with --gpus-per-node, which is the same on all nodes"
if [[ -n "${SLURM_GPUS_ON_NODE:-}" ]]; then
  config="$repository/accelerate_configs/multi_gpu.yaml"
else
  config="$repository/accelerate_configs/multi_cpu.yaml"
  # shellcheck disable=SC2153 # not a misspelling
  cores=$((SLURM_CPUS_ON_NODE / here))
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > 0 ? cores : 1))}"
fi

export PYTHONUNBUFFERED=1
exec python -m accelerate.commands.launch --quiet --config_file "${ACCELERATE_CONFIG_FILE:-$config}" \
  --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * here)) --machine_rank "$SLURM_NODEID" \
  --main_process_ip "$DETR_DIST_FIRST_HOST" --main_process_port $((20000 + SLURM_JOB_ID % 10000)) \
  --rdzv_backend static --rdzv_conf timeout=60 --deepspeed_multinode_launcher standard \
  "$repository/scripts/train_detr.py" "$@"
