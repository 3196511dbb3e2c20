#!/usr/bin/env bash
# Go from a fresh clone to a trained detector: install, generate football scenes, train, evaluate, print the results.
# Needs Python 3.11+ and internet access, no GPU. Override settings with: quickstart.sh training.num_epochs=2
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

data=datasets/quickstart
output=models/quickstart

echo "[1/3] Installation"
bash scripts/install.sh
export PATH="$PWD/.venv/bin:$PATH"
# All cores for the one process. By default Accelerate counts the physical cores of the host, even in a container.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)}"

echo "[2/3] Data"
if [[ -d "$data" ]]; then
  echo "$data exists"
else
  echo "Generating scenes into $data"
  rm -rf "$data.part"
  detr-dist make-data "$data.part" --num-train 512 --num-val 128 --seed 0
  mv "$data.part" "$data" # the folder is complete or absent
fi

echo "[3/3] Training and evaluation"
if [[ -d "$output" ]]; then
  echo "Deleting $output of an earlier quickstart"
  rm -rf "$output"
fi
accelerate launch --quiet --config_file accelerate_configs/cpu.yaml scripts/train_detr.py \
  --config configs/quickstart.yaml --train-dir "$data/train" --val-dir "$data/val" --output-dir "$output" "$@"

echo
python - "$output/results.json" <<'PY'
import json, os, shlex, sys

results = json.load(open(sys.argv[1], encoding="utf-8"))
for name, value in sorted(results["metrics"].items(), key=lambda item: (item[0] != "val_map", item[0])):
    if name.endswith("_map") and not name.endswith("_center_map"):
        print(f"{name:<20} {value:.3f}")
if "run_id" in results:
    print(f"{'MLflow run':<20} {results['run_id']}")
    open_ui = shlex.join(["bash", "scripts/start_mlflow_ui.sh", results["tracking_uri"]])
    print(f"To open it in a browser: cd {shlex.quote(os.getcwd())} && {open_ui}")
PY
