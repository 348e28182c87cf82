#!/usr/bin/env bash
# Runs the test suite, one process per core, without the tests that are marked slow, or with `--slow` as
# the first argument with them. Other arguments go to pytest: -n 0 runs them in one process, and
# -m openood only those that OpenOOD makes a difference to.
set -euo pipefail
. "$(dirname "$0")/env.sh"
environment test
cd "$ROOT"
select="not slow"
if [ "${1:-}" = --slow ]; then
    select=""
    shift
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # each process has a core
exec python -m pytest -n auto --dist worksteal -m "$select" "$@"
