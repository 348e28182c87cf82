#!/usr/bin/env bash
# pytorch-ood 0.4.0: ViM with d equal to the number of features scores NaN for every image.
#
# ViM measures what is outside the principal space of d dimensions. With d = D nothing is left: alpha is
# divided by a mean of 0, is infinite, and infinity times 0 is NaN, without an error or warning in fit or
# predict. A d above D is noticed: it becomes D // 2, with a warning. The case is not far-fetched: the
# authors' code takes d = 512 below D = 2048, and ResNet-18 and ResNet-34 have D = 512.
# Guess before running it: an error, or energy alone (alpha 0). Seen: alpha inf, scores NaN.
# Source: Wang et al., ViM, CVPR 2022, and its code (github.com/haoqiwang/vim); pytorch-ood's documentation
# of ViM, which sets no limit to d.
set -euo pipefail
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
python3 -m venv "$home/venv"
"$home/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    pytorch-ood==0.4.0 torch==2.14.1 torchvision==0.29.1 numpy==2.3.5
"$home/venv/bin/python" - <<'PY'
import math
from importlib.metadata import version

import torch
from pytorch_ood.detector import ViM

torch.manual_seed(0)
features, labels = torch.randn(300, 8), torch.arange(300) % 3
weights, bias = torch.randn(3, 8), torch.zeros(3)
print("pytorch-ood", version("pytorch-ood"))
seen = {}
for d in (7, 8, 9):
    detector = ViM(None, d=d, w=weights, b=bias).fit_features(features, labels)
    scores = detector.predict_features(features)
    seen[d] = detector.d, detector.alpha, float(scores.isnan().float().mean())
    print(f"8 features, d={d}: used d %d, alpha %.3f, share of NaN scores %.1f" % seen[d])
assert seen[8][1] == math.inf and seen[8][2] == 1, "d = D has changed"
assert seen[7][2] == 0 and seen[9][0] == 4 and seen[9][2] == 0, "other d have changed"
PY
