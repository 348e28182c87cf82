"""The kind of a network: how it was trained, its architecture, its number of classes."""

from typing import NamedTuple

from torch import nn

from fusenorm_openood.networks.cifar_resnet import CifarResNet
from fusenorm_openood.networks.resnet import ResNet18_32x32, WideResNet
from fusenorm_openood.networks.t2fnorm import T2FNormNet

OPENOOD_WIDTH = 64  # channels of the first stage of OpenOOD's ResNet18_32x32


class NetworkKind(NamedTuple):
    """Training method under OpenOOD's name, architecture, number of ID classes."""

    training: str
    architecture: str
    classes: int

    def __str__(self) -> str:
        return f"{self.architecture} ({self.training}, {self.classes} classes)"


def network_kind(net: nn.Module, network: str | None = None) -> NetworkKind:
    """The kind of a network returned by `load_network`, with the same `network`.

    A plain network counts as trained with cross-entropy, since nothing in its keys says otherwise.
    """
    training = "T2FNorm" if isinstance(net, T2FNormNet) else "CrossEntropy"
    plain = net.backbone if isinstance(net, T2FNormNet) else net
    architecture = network.partition(":")[2] if network else _architecture(plain)
    return NetworkKind(training, architecture, _classes(plain))


def _classes(net: nn.Module) -> int:
    """The outputs of the last linear layer, or of the last layer if none is linear."""
    linear = [module for module in net.modules() if isinstance(module, nn.Linear)]
    return linear[-1].out_features if linear else len(list(net.parameters())[-1])


def _architecture(net: nn.Module) -> str:
    name = type(net).__name__
    if isinstance(net, WideResNet):
        blocks = net.block1.layer
        return f"WRN-{6 * len(blocks) + 4}-{net.fc.in_features // 64}"
    if isinstance(net, CifarResNet):
        return f"ResNet-{6 * len(net.get_submodule('layer1')._modules) + 2}"
    if isinstance(net, ResNet18_32x32) and net.conv1.out_channels != OPENOOD_WIDTH:
        return f"{name} of width {net.conv1.out_channels}"
    return name
