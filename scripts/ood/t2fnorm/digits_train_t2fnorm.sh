#!/usr/bin/env bash
# Trains a network by T2FNorm on the digits benchmark, or goes on with a run that was interrupted.
# It takes about a minute on two CPU cores, and needs no data.
# Arguments go to 'fusenorm train': --seed 1, --amp bf16, ... NPROC=2 trains on two devices.
set -euo pipefail
. "$(dirname "$0")/../../env.sh"
environment

run_training \
    --id-data digits \
    --method t2fnorm \
    --data-root "$ROOT/data" \
    --results-dir "$ROOT/results" "$@"
