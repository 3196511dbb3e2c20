#!/usr/bin/env bash
# Open MLflow's pages on what was trained from this folder: start_mlflow_ui.sh [TRACKING_URI] [--port 5000] [option of `mlflow ui` ...]
# Without a URI: sqlite:///mlflow.db or file:./mlruns, whichever is there first.
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 1
}

uri=""
if [[ $# -gt 0 && "$1" != -* ]]; then
  uri="$1"
  shift
elif [[ -z "$uri" && -f mlflow.db ]]; then
  uri=sqlite:///mlflow.db
elif [[ -z "$uri" && -d mlruns ]]; then
  uri=file:./mlruns
fi

case "$uri" in
  "") fail "no mlflow.db and no mlruns in $PWD: run this where you trained, or give the tracking URI" ;;
  http://* | https://*)
    echo "$uri is a server with pages of its own: open it in a browser"
    exit 0
    ;;
  file:*) export MLFLOW_ALLOW_FILE_STORE=true ;; # MLflow 3.13 and later refuse folders without it
  *://*) ;;
  *) export MLFLOW_ALLOW_FILE_STORE=true ;; # a bare path is a folder too
esac

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PATH="$PATH:$repository/.venv/bin" # for those who have not activated it
command -v mlflow >/dev/null || fail "no mlflow command: activate the environment that detr_dist is installed in"
exec mlflow ui --backend-store-uri "$uri" "$@"
