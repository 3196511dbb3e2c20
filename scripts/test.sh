#!/usr/bin/env bash
# Install the development tools, then check format, lint, wording and types, and run the tests, as CI does.
# Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/install.sh dev
export PATH="$PWD/.venv/bin:$PATH"

set -x
ruff format --check
ruff check
python scripts/check_english.py
mypy
# Three at a time on two cores: the tests wait for processes as much as they compute. Tests of one file share its set-up.
# In the order of the folders, so that the long files (dist, end_to_end, launch) begin first and the short ones fill up.
pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder "$@"
