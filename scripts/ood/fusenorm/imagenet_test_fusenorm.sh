#!/usr/bin/env bash
# FuseNorm on ImageNet-1k. Arguments go to scripts/eval_ood.py and override
# those below: --data-root DIR, --root DIR (a T2FNorm-trained run, say), --compare, --fsood, ...
set -euo pipefail
. "$(dirname "$0")/../../env.sh"
environment

python scripts/eval_ood.py \
    --id-data imagenet \
    --root ./results/imagenet_resnet50_tvsv1_base_default \
    --postprocessor fusenorm \
    --save-score --save-csv "$@"
