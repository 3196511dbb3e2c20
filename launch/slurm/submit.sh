#!/usr/bin/env bash
# Submit a training to Slurm:
#   bash launch/slurm/submit.sh [option of sbatch ...] -- [option of detr-dist train ...]
#
# For example, two nodes with eight GPUs each, and two nodes without GPUs with two processes of four cores each:
#   bash launch/slurm/submit.sh --nodes 2 --gpus-per-node 8 --cpus-per-gpu 8 --time 24:00:00 -- \
#     --config configs/training.yaml --train-dir datasets/train --val-dir datasets/val --output-dir models/first
#   bash launch/slurm/submit.sh --nodes 2 --ntasks-per-node 2 --cpus-per-task 4 -- ...
#
# Paths are relative to the current folder. All nodes must see it, the repository and the output folder.
# The job continues automatically after its time limit or the loss of a node. Submit it again to continue a run that ended.
# Put the settings of your cluster into site.env (see site.env.example). docs/slurm.md explains more.
set -euo pipefail

launch_dir="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

fail() {
  echo "error: $*" >&2
  exit 2
}

sbatch_options=()
if [[ -f "$launch_dir/site.env" ]]; then
  # shellcheck source=/dev/null
  source "$launch_dir/site.env"
fi
while (($#)) && [[ "$1" != -- ]]; do
  if [[ "$1" == --help || "$1" == -h ]]; then
    sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"
    exit 0
  fi
  sbatch_options+=("$1")
  shift
done
(($# > 1)) || fail "no options of detr-dist train: they come after --, see $0 --help"
shift
command -v sbatch >/dev/null || fail "sbatch is not installed on this host: submit from a node of the cluster"

export DETR_DIST_LAUNCH_DIR="$launch_dir"
exec sbatch "${sbatch_options[@]}" "$launch_dir/train.sbatch" "$@"
