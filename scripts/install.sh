#!/usr/bin/env bash
# Create .venv in the repository and install detr_dist into it, unless that is done: install.sh [EXTRA]
# quickstart.sh and test.sh call it. Delete .venv to reinstall.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra="${1:-}"
venv=.venv

fail() {
  echo "error: $*" >&2
  exit 1
}

# Print the first Python that is new enough and can create a virtual environment.
find_python() {
  local name old_enough=""
  for name in python3 python3.13 python3.12 python3.11 python3.14 python; do
    "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
    old_enough="$name"
    if "$name" -c 'import ensurepip, venv' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  [[ -z "$old_enough" ]] ||
    fail "$old_enough has no venv module: install it (on Debian and Ubuntu: apt-get install python3-venv), then run this again"
  fail "no Python 3.11 or newer found: install one as python3 or python3.12, then run this again"
}

# Print what an installation depends on; stored in .venv to detect changes.
stamp() {
  pwd
  cat setup.cfg pyproject.toml
}

is_installed() { # extra
  [[ -f "$venv/installed$1" ]] && stamp | cmp -s - "$venv/installed$1"
}

if is_installed "-dev" || is_installed "${extra:+-$extra}"; then
  echo "detr_dist is installed in $venv"
  exit 0
fi

if [[ ! -d "$venv" ]]; then
  python="$(find_python)"
  echo "Creating $venv with $("$python" --version)"
  "$python" -m venv "$venv"
fi
"$venv/bin/pip" --version >/dev/null 2>&1 ||
  fail "$venv does not work (incomplete, moved, or its Python was removed): delete $venv and run this again"

echo "Installing detr_dist${extra:+ with its $extra tools} into $venv (the first run downloads PyTorch: a few GB, several minutes)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --progress-bar off \
  --editable ".${extra:+[$extra]}"
stamp >"$venv/installed${extra:+-$extra}"
