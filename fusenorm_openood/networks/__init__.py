"""Networks with OpenOOD's state-dict keys, networks by name, and loading them from checkpoints."""

from fusenorm_openood.networks.checkpoints import load_network
from fusenorm_openood.networks.cifar_resnet import CifarResNet
from fusenorm_openood.networks.named import build_network
from fusenorm_openood.networks.resnet import (
    ResNet18_32x32,
    ResNet18_224x224,
    ResNet50,
    WideResNet,
)
from fusenorm_openood.networks.t2fnorm import T2FNormNet

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
