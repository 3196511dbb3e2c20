#!/usr/bin/env bash
# Train on this host with one process per visible GPU, or one on the CPU.
#   bash launch/workstation.sh [--processes N] --config C --train-dir D --val-dir D --output-dir O [section.key=value ...]
# --processes N uses N GPUs, or N processes on the CPU if there is no GPU. Other options go to detr-dist train.
set -euo pipefail

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ -z "${VIRTUAL_ENV:-}" && -x "$repository/.venv/bin/python" ]]; then
  PATH="$repository/.venv/bin:$PATH"
fi

processes=""
case "${1:-}" in
  "" | -h | --help)
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
  --processes)
    processes="${2:-}"
    if [[ ! "$processes" =~ ^[1-9][0-9]*$ ]]; then
      echo "error: --processes ${processes:-is empty}: a number from 1 is wanted" >&2
      exit 2
    fi
    shift 2
    ;;
esac

if ! gpus="$(python -c 'import detr_dist, torch; print(torch.cuda.device_count())')"; then
  echo "error: $(command -v python || echo python) cannot import detr_dist; run: bash scripts/install.sh" >&2
  exit 1
fi

if [[ "$gpus" == 0 ]]; then
  processes="${processes:-1}"
  kind=cpu
elif [[ "${processes:=$gpus}" -gt "$gpus" ]]; then
  echo "error: --processes $processes: only $gpus GPUs are visible; pass fewer, or check CUDA_VISIBLE_DEVICES" >&2
  exit 2
else
  kind=gpu
fi
if [[ "$processes" == 1 ]]; then
  [[ "$kind" == cpu ]] && name=cpu || name=single_gpu
else
  name="multi_$kind"
fi

# Loader processes and compilers need cores too; if this is unset, the launcher sets 1 and warns.
cores="$(getconf _NPROCESSORS_ONLN)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores / processes > 0 ? cores / processes : 1))}"

echo "$gpus GPUs: $processes processes by accelerate_configs/$name.yaml"
exec python -m accelerate.commands.launch --quiet --config_file "$repository/accelerate_configs/$name.yaml" \
  --num_processes "$processes" "$repository/scripts/train_detr.py" "$@"
