#!/usr/bin/env bash
# Everything that must hold before a change lands: formatting, lint, tests. Arguments go to pytest:
#   tests/run.sh                      all but the slow ones
#   tests/run.sh -m slow              the slow ones
#   tests/run.sh tests/objective -x   one package
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tools/bootstrap.sh
source .venv/bin/activate
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

ruff check .
ruff format --check .
# The whole suite is dealt to two processes (tests/support/balance.py); a part of it runs in this one.
processes=(-n 2 --no-loadscope-reorder)
[ $# -eq 0 ] || processes=(-n 0)
exec python -m pytest -m "not slow" --durations=15 "${processes[@]}" "$@"
