#!/usr/bin/env bash
# Start the MLflow UI: start_mlflow_ui.sh [TRACKING_URI] [--config FILE] [--port N] [option of `mlflow ui` ...]
#
# Without a URI it shows the runs trained from the current folder, in the first of these stores:
#   1. the URI in --config FILE, then in MLFLOW_TRACKING_URI: chosen explicitly, so a missing store is an error;
#   2. the URI in configs/training.yaml, if it has runs: the default store of your own runs;
#   3. mlflow.db, then mlruns: the default stores of the quickstart, regardless of configs/training.yaml.
# Paths are relative to the current folder, as in training. If the port is busy, the next free one is used.
set -euo pipefail

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
for python in python "$repository/.venv/bin/python"; do # the second if .venv is not activated
  if "$python" -c 'import detr_dist.errors' 2>/dev/null; then
    exec "$python" -m detr_dist.tracking.ui "$@"
  fi
done
echo "error: detr_dist is not installed: run scripts/install.sh, or activate the environment that has it" >&2
exit 1
