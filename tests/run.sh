#!/usr/bin/env bash
# Everything that must hold before a change lands: formatting, lint, tests. Arguments go to pytest:
#   tests/run.sh                      all but the slow ones
#   tests/run.sh -m slow              the slow ones
#   tests/run.sh tests/objective -x   one package
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tools/bootstrap.sh
source .venv/bin/activate
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"

ruff check .
ruff format --check .
# Two workers; the tests of a folder, which share their fixtures, run on one of them. -n 0: no workers
exec python -m pytest -m "not slow" -n 2 --dist loadgroup --durations=15 "$@"
