"""Networks with OpenOOD's state-dict keys, networks by name, and loading them from checkpoints."""

from fusenorm_openood.network.checkpoints import load_network
from fusenorm_openood.network.named import build_network
from fusenorm_openood.network.resnet import (
    CifarResNet,
    ResNet18_32x32,
    ResNet18_224x224,
    ResNet50,
    T2FNormNet,
    WideResNet,
)

__all__ = [
    "CifarResNet",
    "ResNet18_32x32",
    "ResNet18_224x224",
    "ResNet50",
    "T2FNormNet",
    "WideResNet",
    "build_network",
    "load_network",
]
