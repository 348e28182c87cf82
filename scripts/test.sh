#!/usr/bin/env bash
# Runs the test suite, in an environment that it sets up on first use. Arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/env.sh"
environment test
exec python -m pytest --cov --cov-report=term-missing:skip-covered --cov-fail-under=90 "$@"
