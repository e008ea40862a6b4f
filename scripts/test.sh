#!/usr/bin/env bash
# Runs ruff, mypy and all tests; arguments go to pytest. Installs what it needs into .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh requirements-dev.txt
export OMP_NUM_THREADS=1
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/python -m mypy
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"  # two files at a time
