#!/usr/bin/env bash
# Install with the tools of development, then format, lint, types and tests, as CI does. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/install.sh dev
export PATH="$PWD/.venv/bin:$PATH"

set -x
ruff format --check
ruff check
mypy
# Two at a time: the tests wait for processes more than they compute. What shares a file shares its set-up.
pytest --numprocesses 2 --dist loadfile "$@"
