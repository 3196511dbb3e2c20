#!/usr/bin/env bash
# Check detr_dist on one NVIDIA GPU in ten minutes. Prints a line for each step: PASS, FAIL or SKIP, with its metrics.
#   [TOTAL_S=540] [STEPS="bf16 boxes"] [PYTHON=python3] bash scripts/benchmarks/gpu_check.sh [REPOSITORY] [OUT_FOLDER]
# Needs the dependencies in setup.cfg; no internet access, no weights. The most valuable steps run first; steps beyond
# TOTAL_S seconds are skipped. Writes summary.txt, figures.json and a log of each step to OUT_FOLDER. Exits with 1 if a
# step failed. Without a GPU it runs at a reduced size on the CPU and skips steps that need one.
set -euo pipefail

repository="$(cd "${1:-.}" && pwd)"
benchmarks="$repository/scripts/benchmarks"
out="${2:-${TMPDIR:-/tmp}/gpu_check}"
mkdir -p "$out"
cd "$out" # MLflow puts the artifacts of a database into the current folder

export PYTHONPATH="$repository:$benchmarks${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONWARNINGS=ignore
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error GIT_PYTHON_REFRESH=quiet MLFLOW_DISABLE_TELEMETRY=true
export PYTORCH_NVML_BASED_CUDA_CHECK=1 # detects GPUs without initialising one, so that forked processes can use them
exec "${PYTHON:-python3}" "$benchmarks/gpu_check.py" --repository "$repository" --out . \
  --seconds "${TOTAL_S:-540}" --steps "${STEPS:-}"
