#!/usr/bin/env bash
# torch-uncertainty 0.13.0: EnergyCriterion of logits [batch, classes] is one number for the batch.
#
# Its docstring asks for (batch_size, num_classes) and promises a score per sample. It averages over
# dimension 1 first, the estimators of an ensemble, so of logits of one network it averages the classes
# and takes the log-sum-exp over the batch. The number depends on the size of the batch, and a threshold
# compares with it without an error. [batch, 1, classes] gives the energies. MaxSoftmaxCriterion does give
# one score per row of [batch, classes].
# Guess before running it: 5 energies for 5 rows. Seen: a tensor without dimensions.
# Source: torch-uncertainty's documentation of OOD criteria; Liu et al., Energy-based OOD Detection, 2020.
set -euo pipefail
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
python3 -m venv "$home/venv"
"$home/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    "torch-uncertainty[cpu]==0.13.0" lightning==2.6.6 torch==2.14.1 torchvision==0.29.1 numpy==2.3.5
"$home/venv/bin/python" - <<'PY'
from importlib.metadata import version

import torch
from torch_uncertainty.ood_criteria import EnergyCriterion, MaxSoftmaxCriterion

torch.manual_seed(0)
logits = torch.randn(5, 3)
print("torch-uncertainty", version("torch-uncertainty"))
energy = EnergyCriterion()
seen = {
    "energy [5, 3]": energy(logits),
    "energy [4, 3]": energy(logits[:4]),
    "energy [5, 1, 3]": energy(logits[:, None]),
    "softmax [5, 3]": MaxSoftmaxCriterion()(logits.softmax(1)),
}
for name, scores in seen.items():
    print(name, "shape", list(scores.shape), scores.numpy().round(3))
assert seen["energy [5, 3]"].shape == () and seen["energy [4, 3]"].shape == (), "energy has changed"
assert seen["energy [5, 3]"] != seen["energy [4, 3]"], "energy has changed"
torch.testing.assert_close(seen["energy [5, 1, 3]"], -logits.logsumexp(1))
assert seen["softmax [5, 3]"].shape == (5,), "MaxSoftmaxCriterion has changed"
PY
