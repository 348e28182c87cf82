#!/usr/bin/env bash
# T2FNorm's own score on the networks trained by digits_train_t2fnorm.sh. Arguments go to
# scripts/eval_ood.py and override those below: --postprocessor fusenorm, --root DIR, --fsood, ...
set -euo pipefail
. "$(dirname "$0")/../../env.sh"
environment

run_evaluation \
    --id-data digits \
    --root "$ROOT/results/digits_t2fnorm_net_t2fnorm_e16_lr0.05_alpha0.1_default" \
    --data-root "$ROOT/data" \
    --postprocessor t2fnorm \
    --save-score --save-csv "$@"
