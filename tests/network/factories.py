"""Networks that are not this package's, for `--network`."""

from torch import Tensor, nn


class Own(nn.Module):
    """A network with other keys than this package's, inside a wrapper of its own."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.model = nn.DataParallel(
            nn.ModuleDict({"stem": stem, "out": nn.Linear(4, num_classes)})
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = self.model.module
        return parts["out"](parts["stem"](x).mean(dim=(2, 3)))


def with_seven() -> nn.Module:
    return Own(7)


def convolutional(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, num_classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def broken(num_classes: int) -> nn.Module:
    raise RuntimeError("no weights today\nsecond line")


def not_a_network() -> int:
    return 3
