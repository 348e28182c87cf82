"""T2FNorm's network: features are normalised for classification, but not for OOD scores."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusenorm_openood.devices import device_of

IMAGENET_CLASSES = 1000  # fine-tuned from standard weights, so scored without temperature


class T2FNormNet(nn.Module):
    """A backbone whose classifier receives features of norm 1/tau.

    Args:
        backbone: network with `forward(x, return_feature=True)` and a linear layer `fc`.
        num_classes: number of ID classes.

    Source: Regmi et al., CVPR Workshops 2024; OpenOOD's state-dict keys.
    """

    tau: Tensor

    def __init__(self, backbone: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes = num_classes
        tau = torch.tensor(1.0, dtype=torch.float32, device=device_of(backbone))
        self.register_buffer("tau", tau)

    def set_tau(self, tau: float) -> None:
        """Set the temperature: 0.1 in the paper, 0.05 for ImageNet-1k."""
        self.tau.fill_(tau)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, K]` of normalised features, for training and classification."""
        feature = F.normalize(self._feature(x), dim=-1) / self.tau
        return self._classify(feature)

    def forward_ood_inference(self, x: Tensor) -> Tensor:
        """Logits `[B, K]` of unnormalised features, for OOD scores."""
        feature = self._feature(x)
        return self._classify(
            feature if self.num_classes == IMAGENET_CLASSES else feature / self.tau
        )

    def _feature(self, x: Tensor) -> Tensor:
        feature: Tensor = self.backbone(x, return_feature=True)[1]
        return feature

    def _classify(self, feature: Tensor) -> Tensor:
        logits: Tensor = self.backbone.fc(feature)  # type: ignore[operator]
        return logits


def has_scoring_logits(net: nn.Module) -> bool:
    """Whether a network computes OOD scores from separate logits, as T2FNorm's does."""
    return hasattr(net, "forward_ood_inference")


def classification_feature(net: nn.Module, feature: Tensor) -> Tensor | None:
    """The feature `[B, D]` for classification with a T2FNorm network, from the one for scoring.

    Dividing a feature by tau does not change its direction. None for any other network; OpenOOD's
    `T2FNormNet` has the same attributes as this package's.
    """
    tau = getattr(net, "tau", None)
    if not (isinstance(tau, Tensor) and hasattr(net, "backbone") and has_scoring_logits(net)):
        return None
    return F.normalize(feature, dim=-1) / tau
