"""Residual networks with OpenOOD's names and state-dict keys, and T2FNorm's network."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fusenorm_openood.errors import ConfigError
from fusenorm_openood.kernels.devices import device_of

IMAGENET_CLASSES = 1000  # fine-tuned from standard weights, so scored without temperature


def _conv(channels_in: int, channels: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels, size, stride, padding=size // 2, bias=False)


class FeatureClassifier(nn.Module):
    """What OpenOOD expects of a classifier: features, a linear layer `fc`, and access to both."""

    fc: nn.Linear

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features `[B, D]` of images `[B, 3, H, W]`."""
        raise NotImplementedError

    def forward(self, x: Tensor, return_feature: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits `[B, K]`, optionally with the penultimate feature `[B, D]`."""
        feature = self.features(x)
        logits: Tensor = self.fc(feature)
        return (logits, feature) if return_feature else logits

    def get_fc_layer(self) -> nn.Linear:
        return self.fc

    def get_fc(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Weight `[K, D]` and bias `[K]` of the linear layer."""
        return self.fc.weight.detach().cpu().numpy(), self.fc.bias.detach().cpu().numpy()

    @property
    def feature_size(self) -> int:
        return self.fc.in_features


class _TwoConvolutions(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels_in, channels, stride=stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)

    def skip(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.skip(x))


class BasicBlock(_TwoConvolutions):
    """A residual block whose shortcut is a 1x1 convolution where the shapes differ."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__(channels_in, channels, stride)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            convolution = _conv(channels_in, channels, 1, stride)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(channels))

    def skip(self, x: Tensor) -> Tensor:
        found: Tensor = self.shortcut(x)
        return found


class PaddingBlock(_TwoConvolutions):
    """A residual block whose shortcut has no weights: pixels skipped, channels added as 0."""

    def skip(self, x: Tensor) -> Tensor:
        stride, added = self.conv1.stride[0], self.conv1.out_channels - x.shape[1]
        return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, added // 2, added - added // 2))


class _SmallResNet(FeatureClassifier):
    """A ResNet for small images: 3x3 stem, no pooling before stages that double the channels."""

    def __init__(
        self, block: type[nn.Module], blocks: Sequence[int], width: int, num_classes: int
    ) -> None:
        super().__init__()
        self.conv1 = _conv(3, width)
        self.bn1 = nn.BatchNorm2d(width)
        channels, self.stages = width, len(blocks)
        for stage, count in enumerate(blocks):
            before, channels = channels, width * 2**stage
            layer = _stage(block, count, before, channels, min(stage + 1, 2))
            self.add_module(f"layer{stage + 1}", layer)
        self.fc = nn.Linear(channels, num_classes)

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


class ResNet18_32x32(_SmallResNet):
    """ResNet-18 for small images: 3x3 stem, no pooling before the four stages.

    `width` is the number of channels in the first stage; 64 in OpenOOD.
    """

    def __init__(self, num_classes: int = 10, width: int = 64) -> None:
        super().__init__(BasicBlock, (2, 2, 2, 2), width, num_classes)
        self.architecture = "ResNet18_32x32" if width == 64 else f"ResNet18_32x32 of width {width}"


class CifarResNet(_SmallResNet):
    """ResNet-(6n + 2) for 32x32 images, with three stages of n blocks, 16, 32 and 64 channels wide.

    The state-dict keys are those of the public repository akamaster/pytorch_resnet_cifar10, except
    that its last layer is called `linear`; `load_network` reads both. `width` is the number of
    channels in the first stage, 16 in the paper. ConfigError for a depth that is not 6n + 2.

    Source: He et al., CVPR 2016, section 4.2, with shortcuts of option A.
    """

    def __init__(self, depth: int = 20, num_classes: int = 10, width: int = 16) -> None:
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ConfigError(f"depth must be 6n + 2, for example 20 or 32, got {depth}")
        super().__init__(PaddingBlock, (blocks,) * 3, width, num_classes)
        self.architecture = f"ResNet-{depth}"


class _TorchvisionResNet(FeatureClassifier):
    """torchvision's ResNet, split into features and classifier."""

    name: str

    def __init__(self, num_classes: int = 1000) -> None:
        from torchvision import models  # takes a second to import

        super().__init__()
        for name, module in models.get_model(self.name, num_classes=num_classes).named_children():
            self.add_module(name, module)

    def features(self, x: Tensor) -> Tensor:
        stem = ("conv1", "bn1", "relu", "maxpool")
        for name in (*stem, "layer1", "layer2", "layer3", "layer4", "avgpool"):
            x = self.get_submodule(name)(x)
        return x.flatten(1)


class ResNet18_224x224(_TorchvisionResNet):
    """torchvision's ResNet-18, for 224x224 images."""

    name = "resnet18"


class ResNet50(_TorchvisionResNet):
    """torchvision's ResNet-50, for 224x224 images."""

    name = "resnet50"


def _stage(
    block: type[nn.Module], count: int, before: int, channels: int, stride: int
) -> nn.Sequential:
    """Residual blocks, the first of which changes channels and resolution."""
    others = (block(channels, channels, 1) for _ in range(count - 1))
    return nn.Sequential(block(before, channels, stride), *others)


class PreActBlock(nn.Module):
    """Pre-activation residual block of Wide ResNets."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = _conv(channels_in, channels, stride=stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels)
        differs = channels_in != channels
        self.convShortcut = _conv(channels_in, channels, 1, stride) if differs else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(y)
        residual: Tensor = self.conv2(F.relu(self.bn2(self.conv1(y))))
        return shortcut + residual


class WideResNetStage(nn.Sequential):
    """A stage of a Wide ResNet; in OpenOOD's keys its blocks are `layer.0`, `layer.1`, ..."""


class WideResNet(FeatureClassifier):
    """WRN-depth-widen_factor, for 32x32 images; ConfigError for a depth that is not 6n + 4."""

    def __init__(self, depth: int = 16, widen_factor: int = 8, num_classes: int = 10) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ConfigError(f"depth must be 6n + 4, for example 16 or 28, got {depth}")
        self.architecture = f"WRN-{depth}-{widen_factor}"
        self.conv1 = _conv(3, 16)
        channels = 16
        for stage in range(3):
            before, channels = channels, 16 * widen_factor * 2**stage
            layer = _stage(PreActBlock, blocks, before, channels, min(stage + 1, 2))
            self.add_module(f"block{stage + 1}", WideResNetStage(OrderedDict(layer=layer)))
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)

    def features(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for stage in range(3):
            x = self.get_submodule(f"block{stage + 1}")(x)
        return F.adaptive_avg_pool2d(F.relu(self.bn1(x)), 1).flatten(1)


class T2FNormNet(nn.Module):
    """A backbone whose classifier receives features of norm 1/tau.

    The backbone has `forward(x, return_feature=True)` and a linear layer `fc`.

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
        feature = self.backbone(x, return_feature=True)[1]
        found: Tensor = self.backbone.fc(F.normalize(feature, dim=-1) / self.tau)  # type: ignore[operator]
        return found

    def forward_ood_inference(self, x: Tensor) -> Tensor:
        """Logits `[B, K]` of unnormalised features, for OOD scores."""
        feature = self.backbone(x, return_feature=True)[1]
        feature = feature if self.num_classes == IMAGENET_CLASSES else feature / self.tau
        found: Tensor = self.backbone.fc(feature)  # type: ignore[operator]
        return found


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
