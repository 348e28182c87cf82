#!/usr/bin/env bash
# Trains a network with T2FNorm on ImageNet-200, or resumes an interrupted run.
# Arguments go to 'fusenorm train': --seed 1, --amp bf16, ... NPROC=2 trains on two devices.
set -euo pipefail
. "$(dirname "$0")/../../env.sh"
environment

run_training \
    --id-data imagenet200 \
    --method t2fnorm \
    --data-root "$ROOT/data" \
    --results-dir "$ROOT/results" "$@"
