#!/usr/bin/env bash
# FuseNorm on ImageNet-200. Arguments go to scripts/eval_ood.py and override those below:
# --data-root DIR, --root DIR (for example of a network trained with T2FNorm), --config fusenorm_deviation, ...
set -euo pipefail
. "$(dirname "$0")/../../env.sh"
environment

run_evaluation \
    --id-data imagenet200 \
    --root "$ROOT/results/imagenet200_resnet18_224x224_base_e90_lr0.1_default" \
    --data-root "$ROOT/data" \
    --postprocessor fusenorm \
    --save-score --save-csv "$@"
