"""Small networks of many kinds, and what plain torch says of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusenorm_openood import FuseNorm, atf

CLASSES = 5


class Foo(nn.Module):
    """A residual block whose name does not say so."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, stride, 1)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.skip = nn.Conv2d(channels, channels, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.conv2(F.relu(self.conv1(x))))


class Net(nn.Module):
    """Two stages of two blocks, and a linear head."""

    def __init__(self, seed: int = 0, channels: int = 8, classes: int = CLASSES) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, channels, 3, 1, 1)
        self.a = nn.Sequential(Foo(channels), Foo(channels))
        self.b = nn.Sequential(Foo(channels, 2), Foo(channels))
        self.fc = nn.Linear(channels, classes)
        self.eval()

    def feature(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.stem(x))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.feature(x))


class Custom(Net):
    """A network whose forward pass is a function of it and the images, and more parts."""

    def __init__(
        self, run: Callable[[Any, Tensor], Any], classes: int = CLASSES, **parts: Any
    ) -> None:
        super().__init__(classes=classes)
        self.run = run
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def within(context: Callable[[], Any], of: Any = Net.forward) -> Callable[[Net, Tensor], Any]:
    """The forward pass, or another method of a network, in a context."""

    def run(net: Net, x: Tensor) -> Any:
        with context():
            return of(net, x)

    return run


BLOCKS = ("a.0", "a.1", "b.0", "b.1")


def some_images(count: int = 24, size: tuple[int, int] = (12, 12), seed: int = 1) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def listed(images: Tensor, classes: int = CLASSES) -> list[dict[str, Tensor | int]]:
    """A data set of images in OpenOOD's format."""
    return [{"data": image, "label": n % classes} for n, image in enumerate(images)]


def outputs_of(net: nn.Module, names: tuple[str, ...], images: Tensor) -> list[Tensor]:
    """What modules return in one pass, by plain hooks."""
    kept: dict[str, Tensor] = {}
    hooks = [
        net.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: kept.update({name: output})
        )
        for name in names
    ]
    with torch.no_grad():
        net(images)
    for hook in hooks:
        hook.remove()
    return [kept[name] for name in names]


def norms_of(net: nn.Module, names: tuple[str, ...], images: Tensor) -> Tensor:
    """Feature norms `[L, B]` of modules that return `[B, C, H, W]`."""
    return torch.stack([atf(x) for x in outputs_of(net, names, images)])


def energies(net: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return net(images).double().logsumexp(1)


def energy_detector(net: nn.Module, images: Tensor, **settings: object) -> FuseNorm:
    """Strong experts that read the logits alone, fitted on a few images."""
    return FuseNorm(net, strong=["output"], **settings).fit([images])
