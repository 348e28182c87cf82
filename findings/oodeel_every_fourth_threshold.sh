#!/usr/bin/env bash
# oodeel 0.4.0: bench_metrics takes every fourth threshold, and a constant score gets FPR@95 = 0.
#
# The AUROC is the area under a curve of every fourth score (step=4), so perfect separation is below 1 on
# few images: 0.75 for two against two, 0.985 for ten against ten; step=1 gives 1. A constant score has
# AUROC 0.5 and yet, with any step, "fpr95tpr" 0.0, that of a perfect detector: the FPR is that of the
# first point with a TPR below 95 %, here the end of the curve, where no image counts as OOD.
# Guess before running it: AUROC 1 by default; FPR@95 1 for constant scores. Seen: neither.
# Source: oodeel's documentation of bench_metrics, which has the step as an integration step in
# percentiles; scikit-learn's roc_auc_score as the value to compare with.
set -euo pipefail
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
python3 -m venv "$home/venv"
python="$home/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check \
    numpy==1.26.4 scikit-learn==1.7.2 pandas==2.3.3 matplotlib==3.10.7 seaborn==0.13.2
"$python" -m pip install --quiet --disable-pip-version-check --no-deps oodeel==0.4.0
"$python" - <<'PY'
import numpy as np
import oodeel
from oodeel.eval.metrics import bench_metrics
from sklearn.metrics import roc_auc_score

print("oodeel", oodeel.__version__)
seen = {}
for name, known, unknown in (
    ("2 against 2", np.arange(2.0), np.arange(2.0, 4)),
    ("10 against 10", np.arange(10.0), np.arange(10.0, 20)),
    ("constant", np.ones(50), np.ones(50)),
):
    right = roc_auc_score(np.repeat([0, 1], len(known)), np.concatenate([known, unknown]))
    for step in (4, 1):
        found = bench_metrics((known, unknown), step=step)
        seen[name, step] = round(float(found["auroc"]), 6), float(found["fpr95tpr"])
        print(f"{name}, step {step}: AUROC %s, FPR@95 %s;" % seen[name, step], f"scikit-learn {right}")
    assert bench_metrics((known, unknown))["auroc"] == bench_metrics((known, unknown), step=4)["auroc"]
assert seen["2 against 2", 4][0] == 0.75 and seen["10 against 10", 4][0] == 0.985, "the default has changed"
assert seen["2 against 2", 1][0] == seen["10 against 10", 1][0] == 1, "step=1 has changed"
assert seen["constant", 4] == seen["constant", 1] == (0.5, 0), "constant scores have changed"
PY
