"""scio's scores and metrics, for peers_agree.py; runs in scio's own environment."""

import sys
from typing import Any

import numpy as np
import torch
from scio.eval import AUC, TNR
from scio.recorder import Recorder
from scio.scores import (
    KNN,
    DeepMahalanobis,
    Energy,
    Logit,
    ReAct,
    RelativeMahalanobis,
    Softmax,
)
from torch import nn

SCORES: dict[str, Any] = {
    "Softmax": Softmax(),
    "Logit": Logit(),
    "Energy": Energy(),
    "KNN": KNN(k=50),
    "DeepMahalanobis": DeepMahalanobis(),
    "RelativeMahalanobis": RelativeMahalanobis(),
    "ReAct": ReAct(),
}

given = dict(np.load(sys.argv[1]))
found: dict[str, Any] = {}
if "fit" in given:
    tensors = {name: torch.from_numpy(array) for name, array in given.items()}
    head = nn.Linear(*reversed(tensors["weight"].shape))
    head.load_state_dict({name: tensors[name] for name in ("weight", "bias")})
    fit = tensors["fit"]
    net = Recorder(nn.Sequential(nn.Identity(), head), input_data=fit[:1])
    net.record((1, 1))  # the features
    for name, score in SCORES.items():
        score.fit(net, fit, tensors["labels"])
        for key in (key for key in given if key.startswith("set ")):
            parts = [score(part) for part in tensors[key].split(100)]
            # One score per class: that of the predicted class counts.
            each = [c.gather(1, out.argmax(1, keepdim=True)).squeeze(1) for out, c in parts]
            found[f"{name} {key[4:]}"] = torch.cat(each).detach().numpy()
for case in (key[3:] for key in given if key.startswith("id ")):
    scores = np.concatenate([given[f"id {case}"], given[f"ood {case}"]])
    is_ood = np.arange(len(scores)) >= len(given[f"id {case}"])
    found[case] = np.array([1 - TNR(min_tpr=0.95)(is_ood, scores), AUC()(is_ood, scores)])
np.savez(sys.argv[2], **found)
