#!/usr/bin/env bash
# FuseNorm on CIFAR-100. Arguments go to scripts/eval_ood.py and override those below:
# --data-root DIR, --root DIR (for example of a network trained with T2FNorm), --config fusenorm_deviation, ...
set -euo pipefail
. "$(dirname "$0")/../../env.sh"
environment

run_evaluation \
    --id-data cifar100 \
    --root "$ROOT/results/cifar100_resnet18_32x32_base_e100_lr0.1_default" \
    --data-root "$ROOT/data" \
    --postprocessor fusenorm \
    --save-score --save-csv "$@"
