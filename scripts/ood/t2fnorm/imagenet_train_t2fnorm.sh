#!/usr/bin/env bash
# Trains a network by T2FNorm on ImageNet-1k, or goes on with a run that was interrupted.
# It is fine-tuned from torchvision's weights (IMAGENET1K_V1), which INIT names.
# Arguments go to 'fusenorm train': --seed 1, --amp bf16, ... NPROC=2 trains on two devices.
set -euo pipefail
. "$(dirname "$0")/../../env.sh"
environment

INIT=${INIT:-$ROOT/results/pretrained_weights/resnet50_imagenet1k_v1.pth}

run_training \
    --id-data imagenet \
    --method t2fnorm \
    --data-root "$ROOT/data" \
    --results-dir "$ROOT/results" \
    --init "$INIT" "$@"
