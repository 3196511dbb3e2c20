#!/usr/bin/env bash
# Run unit tests with the oldest versions that setup.cfg allows: test_lower_bounds.sh [VERSION ...], e.g. torch==2.11.0.
# The versions go into .venv-lower-bounds, which takes all other packages from .venv. torch and torchvision come from
# .venv too unless specified, because older ones are a download of gigabytes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/install.sh dev
venv=.venv-lower-bounds

# Print every lower bound of setup.cfg as an exact version, except torch's.
lower_bounds() {
  .venv/bin/python - <<'END'
import configparser, re

setup = configparser.ConfigParser()
setup.read("setup.cfg")
wanted = setup["options"]["install_requires"] + setup["options.extras_require"]["dev"]
for name, version in re.findall(r"^([\w-]+)>=(\S+)$", wanted, re.MULTILINE):
    if name != "torch":
        print(f"{name}=={version}")
END
}

rm -rf "$venv"
.venv/bin/python -m venv --without-pip "$venv"
"$venv/bin/python" - "$PWD/.venv" <<'END'
import sys, sysconfig
from pathlib import Path

own = Path(sysconfig.get_path("purelib"))
borrowed = Path(sysconfig.get_path("purelib", vars={"base": sys.argv[1], "platbase": sys.argv[1]}))
(own / "borrowed.pth").write_text(f"import site; site.addsitedir({str(borrowed)!r})\n")
END

mapfile -t versions < <(lower_bounds)
echo "Installing ${versions[*]} $* into $venv"
.venv/bin/python -m pip --python "$venv/bin/python" install --quiet --disable-pip-version-check --progress-bar off \
  "${versions[@]}" "$@"
set -x
"$venv/bin/python" -m pytest --numprocesses 2 --dist loadfile -m "not slow" \
  tests/unit/models tests/unit/training tests/unit/tracking tests/unit/test_config.py tests/unit/test_cli.py
