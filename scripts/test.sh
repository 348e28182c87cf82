#!/usr/bin/env bash
# Runs the test suite, in an environment that it sets up on first use. Arguments go to pytest;
# without any, coverage is measured, too.
set -euo pipefail
. "$(dirname "$0")/env.sh"
environment test
cd "$ROOT"
[ $# -gt 0 ] || set -- --cov --cov-report=term-missing:skip-covered --cov-fail-under=85
exec python -m pytest "$@"
