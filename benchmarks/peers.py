"""Alternative detectors from pytorch-ood (`pip install pytorch-ood`)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fusenorm_openood import FuseNorm, Settings


class Peer(NamedTuple):
    """A detector before fitting.

    Attributes:
        layers: "all" if it uses several layers, "last" otherwise.
        fit: takes a loader; None if there is nothing to fit.
        score: takes images `[B, 3, H, W]`.
    """

    layers: str
    fit: Callable[[Any], Any] | None
    score: Callable[[Tensor], Any]


def make_peers(net: nn.Module, classes: int) -> dict[str, Callable[[], Peer]]:
    """Functions that build each installed detector for a ResNet with four stages."""
    ours = {
        "FuseNorm": lambda: _ours(FuseNorm(net)),
        "FuseNorm (deviation)": lambda: _ours(FuseNorm(net, Settings.deviation())),
        "FuseNorm (published)": lambda: _ours(FuseNorm(net, Settings.published())),
    }
    try:
        from pytorch_ood import detector as d
    except ImportError:
        return ours

    def features(x: Tensor) -> Tensor:
        found: Tensor = net.features(x)
        return found

    def maps(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    stem = [net.conv1, net.bn1, nn.ReLU(), *([net.maxpool] if hasattr(net, "maxpool") else [])]
    layers = [nn.Sequential(*stem, net.layer1), net.layer2, net.layer3, net.layer4]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.fc)
    weight, bias = net.fc.weight.detach(), net.fc.bias.detach()
    dimension = min(64, net.fc.in_features // 2)
    theirs = {
        "MSP": lambda: _theirs(d.MaxSoftmax(net), fitted=True),
        "Energy": lambda: _theirs(d.EnergyBased(net), fitted=True),
        "ODIN": lambda: _theirs(d.ODIN(net, eps=0.01), fitted=True, gradient=True),
        "ReAct": lambda: _theirs(d.ReAct(maps, head)),
        "SCALE": lambda: _theirs(d.SCALE(maps, head)),
        "KNN": lambda: _theirs(d.KNN(features)),
        "NCI": lambda: _theirs(d.NCI(features, net.fc)),
        "fDBD": lambda: _theirs(d.fDBD(features, net.fc)),
        "GEN": lambda: _theirs(d.GEN(net), fitted=True),
        "ViM": lambda: _theirs(d.ViM(features, d=dimension, w=weight, b=bias)),
        "Mahalanobis": lambda: _theirs(d.Mahalanobis(features)),
        "Mahalanobis, all layers": lambda: _theirs(d.MultiMahalanobis(layers), layers="all"),
        "Gram": lambda: _theirs(d.Gram(head, layers, classes), layers="all"),
        "GradNorm": lambda: _theirs(d.GradNorm(net), fitted=True, gradient=True),
    }
    return theirs | ours


def _ours(detector: FuseNorm) -> Peer:
    return Peer("all", detector.fit, detector.score)


def _theirs(
    detector: Any, layers: str = "last", fitted: bool = False, gradient: bool = False
) -> Peer:
    def score(images: Tensor) -> Tensor:
        with torch.set_grad_enabled(gradient):
            scores: Tensor = detector.predict(images)
            return scores

    def fit(loader: DataLoader[Any]) -> None:
        detector.fit(loader)

    return Peer(layers, None if fitted else fit, score)
