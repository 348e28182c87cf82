#!/usr/bin/env bash
# Trains a network with T2FNorm on ImageNet-1k, or resumes an interrupted run.
# Fine-tunes torchvision's weights (IMAGENET1K_V1), whose file is given by INIT.
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
