#!/usr/bin/env bash
# oodeel 0.4.0: after fit with ReAct, ASH or SCALE the user's own network gives other logits.
#
# The detector changes activations by hooks on the network that it is given, and leaves them there: the
# logits of the application change, until another detector is fitted on the same network, which removes
# the hooks of the first. From then on the first one, without an error, gives the scores of the last batch
# it saw, whatever the images. Fitting each detector on a copy of the network avoids both.
# Guess before running it: the network unchanged, and both detectors usable. Seen: neither.
# Source: oodeel's documentation of OODBaseDetector.fit and score, which mentions no such effect.
# (faiss is imported by oodeel.methods, but not among its requirements.)
set -euo pipefail
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
python3 -m venv "$home/venv"
"$home/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    oodeel==0.4.0 faiss-cpu==1.15.1 datasets==4.4.1 pyarrow==22.0.0 torch==2.14.1 torchvision==0.29.1 \
    numpy==1.26.4
"$home/venv/bin/python" - <<'PY'
import copy

import oodeel
import torch
from oodeel.methods import Energy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
torch.set_grad_enabled(False)
network = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
images, others = torch.randn(2, 6, 8)
training = DataLoader(TensorDataset(torch.randn(64, 8), torch.zeros(64)), batch_size=16)
print("oodeel", oodeel.__version__)
changes = {}
for name in ("use_react", "use_ash", "use_scale"):
    own = copy.deepcopy(network)
    Energy(**{name: True}).fit(own, fit_dataset=training)
    changes[name] = float((own(images) - network(images)).abs().max())
    print(f"Energy({name}=True): logits of the network change by up to {changes[name]:.2f}")

own, first, second = copy.deepcopy(network), Energy(), Energy()
first.fit(own)
alone = first.score(images)[0], first.score(others)[0], first.score(images)[0]
second.fit(own)
shared = first.score(images)[0], first.score(others)[0]
print("other images have other scores:", "alone", (alone[0] != alone[1]).all(),
      "after a second fit", (shared[0] != shared[1]).any())
assert all(change > 0.01 for change in changes.values()), "the network is left as it was now"
assert (alone[0] == alone[2]).all() and (alone[0] != alone[1]).all(), "one detector has changed"
assert (shared[0] == alone[0]).all() and (shared[1] == alone[0]).all(), "two detectors work now"
PY
