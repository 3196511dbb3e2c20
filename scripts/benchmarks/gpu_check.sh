#!/usr/bin/env bash
# What detr_dist does on one NVIDIA GPU, in ten minutes: a line for each step, PASS, FAIL or SKIP, with its metrics.
#   [TOTAL_S=540] [STEPS="bf16 boxes"] [PYTHON=python3] bash scripts/benchmarks/gpu_check.sh [REPOSITORY] [OUT_FOLDER]
# Needs what setup.cfg names; no internet, no weights. The most valuable steps come first, as what TOTAL_S seconds do not
# suffice for is skipped. OUT_FOLDER gets summary.txt, figures.json and a log of each step. Ends with 1 if a step failed.
# Without a GPU it runs at a reduced size on the CPU and skips what needs one.
set -euo pipefail

repository="$(cd "${1:-.}" && pwd)"
benchmarks="$repository/scripts/benchmarks"
out="${2:-${TMPDIR:-/tmp}/gpu_check}"
mkdir -p "$out"
cd "$out" # where MLflow keeps the artifacts of a database

export PYTHONPATH="$repository:$benchmarks${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONWARNINGS=ignore
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error GIT_PYTHON_REFRESH=quiet MLFLOW_DISABLE_TELEMETRY=true
export PYTORCH_NVML_BASED_CUDA_CHECK=1 # asks for GPUs without touching one, so that a fork of the asking process still can
exec "${PYTHON:-python3}" "$benchmarks/gpu_check.py" --repository "$repository" --out . \
  --seconds "${TOTAL_S:-540}" --steps "${STEPS:-}"
