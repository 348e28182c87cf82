#!/usr/bin/env bash
# FuseNorm on ImageNet-1k; save torchvision's ResNet-50 weights as ckpt.pth under the root below.
# Arguments go to scripts/eval_ood.py and override those below: --data-root DIR, --root DIR (for
# example of a network trained with T2FNorm), --compare, --fsood, ...
set -euo pipefail
. "$(dirname "$0")/../../env.sh"
environment

run_evaluation \
    --id-data imagenet \
    --root "$ROOT/results/imagenet_resnet50_tvsv1_base_default" \
    --data-root "$ROOT/data" \
    --postprocessor fusenorm \
    --save-score --save-csv "$@"
