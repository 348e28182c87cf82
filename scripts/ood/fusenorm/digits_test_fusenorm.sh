#!/usr/bin/env bash
# FuseNorm on the digits benchmark, which needs no data: its images ship with scikit-learn, and its
# network is trained on first use. Arguments go to scripts/eval_ood.py and override those below.
set -euo pipefail
. "$(dirname "$0")/../../env.sh"
environment

run_evaluation \
    --id-data digits \
    --root "$ROOT/results/digits_resnet18_32x32_base_e16_lr0.05_default" \
    --data-root "$ROOT/data" \
    --postprocessor fusenorm \
    --compare --save-score --save-csv "$@"
