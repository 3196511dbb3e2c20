#!/usr/bin/env bash
# Open MLflow's pages: start_mlflow_ui.sh [TRACKING_URI] [--config FILE] [--port N] [option of `mlflow ui` ...]
#
# Without a URI it shows what was trained from the current folder; the first of these counts:
#   1. the URI in --config FILE, then in MLFLOW_TRACKING_URI: chosen by hand, so if nothing is there it is an error;
#   2. the URI in configs/training.yaml, if there are runs: where your own trainings go;
#   3. mlflow.db, then mlruns: where the quickstart goes, whatever became of configs/training.yaml.
# Relative paths start at the current folder, as they do for training. On a busy port the next free one is taken.
set -euo pipefail

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
for python in python "$repository/.venv/bin/python"; do # the second for those who have not activated it
  if "$python" -c 'import detr_dist.errors' 2>/dev/null; then
    exec "$python" -m detr_dist.tracking.ui "$@"
  fi
done
echo "error: detr_dist is not installed: run scripts/install.sh, or activate the environment that has it" >&2
exit 1
