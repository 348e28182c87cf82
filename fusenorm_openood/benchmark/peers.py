"""Detectors of pytorch-ood that work on penultimate features, for comparison (extra `peers`)."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fusenorm_openood.method.posthoc import Head, Seen

Scorer = Callable[[Seen], NDArray[Any]]


def peers_installed() -> bool:
    """Whether pytorch-ood is installed."""
    return find_spec("pytorch_ood") is not None


def fitted_peers(head: Head, seen: Seen) -> dict[str, Scorer]:
    """DICE, VRA, NNGuide and GradNorm, fitted on ID images: functions to scores `[B]` by title.

    Args:
        head: the final linear layer.
        seen: features and logits of ID images.

    Returns:
        Scorers with larger = more in-distribution, with pytorch-ood's default arguments; DICE keeps
        the tenth of the weights that contributes most.
    """
    from pytorch_ood import detector  # heavy, and optional

    labels = seen.logits.argmax(dim=1)
    linear = nn.Linear(head.weight.shape[1], len(head.weight))
    linear.load_state_dict({"weight": head.weight, "bias": head.bias})
    dice = detector.DICE(None, w=head.weight, b=head.bias, p=0.9)
    vra = detector.VRA(None, linear)
    guide = detector.NNGuide(None, linear, k=min(10, len(labels)))
    dice.fit_features(seen.feature, labels)
    vra.fit_feature_maps(seen.feature, labels)
    guide.fit_features(seen.feature, labels)
    by_title = {
        "DICE": dice.predict_features,
        "VRA": vra.predict_feature_maps,
        "NNGuide": guide.predict_features,
        "GradNorm": detector.GradNorm(linear).predict,
    }
    return {title: _in_parts(predict) for title, predict in by_title.items()}


def _in_parts(predict: Callable[[Tensor], Tensor], size: int = 200) -> Scorer:
    def score(seen: Seen) -> NDArray[Any]:
        scores = [-predict(part).detach() for part in torch.split(seen.feature, size)]
        joined: NDArray[Any] = torch.cat(scores).double().numpy()
        return joined

    return score
