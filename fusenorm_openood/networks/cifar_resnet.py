"""The residual networks for CIFAR of He et al.: ResNet-20, -32, -44, -56, -110."""

from torch import Tensor, nn
from torch.nn import functional as F

from fusenorm_openood.errors import ConfigError
from fusenorm_openood.networks.resnet import FeatureClassifier


class PaddingBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut without weights: pixels skipped, channels added as 0."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.added = stride, channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        before, after = self.added // 2, self.added - self.added // 2
        kept = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(kept, (0, 0, 0, 0, before, after)))


class CifarResNet(FeatureClassifier):
    """ResNet-(6n + 2) for 32x32 images, with three stages of n blocks, 16, 32 and 64 channels wide.

    The state-dict keys are those of the public repository akamaster/pytorch_resnet_cifar10, except
    that its last layer is called `linear`; `load_network` reads both.

    Args:
        depth: 20, 32, 44, 56, 110 or another 6n + 2.
        num_classes: number of ID classes.
        width: number of channels in the first stage; 16 in the paper.

    Raises:
        ConfigError: a depth that is not 6n + 2.

    Source: He et al., CVPR 2016, section 4.2, with shortcuts of option A.
    """

    def __init__(self, depth: int = 20, num_classes: int = 10, width: int = 16) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ConfigError(f"depth must be 6n + 2, for example 20 or 32, got {depth}")
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = [width, width, 2 * width, 4 * width]
        for stage in range(1, 4):
            first = PaddingBlock(channels[stage - 1], channels[stage], 1 if stage == 1 else 2)
            others = [PaddingBlock(channels[stage], channels[stage], 1) for _ in range(1, blocks)]
            self.add_module(f"layer{stage}", nn.Sequential(first, *others))
        self.fc = nn.Linear(channels[3], num_classes)

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(1, 4):
            x = self.get_submodule(f"layer{stage}")(x)
        return F.adaptive_avg_pool2d(x, 1).flatten(1)
