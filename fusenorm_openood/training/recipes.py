"""How networks are trained: OpenOOD's settings, by ID data set and method."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from fusenorm_openood.errors import ConfigError
from fusenorm_openood.networks import (
    ResNet18_32x32,
    ResNet18_224x224,
    ResNet50,
    T2FNormNet,
)

METHODS = ("base", "t2fnorm")
NETWORKS: dict[str, type[nn.Module]] = {
    "resnet18_32x32": ResNet18_32x32,
    "resnet18_224x224": ResNet18_224x224,
    "resnet50": ResNet50,
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides a network's weights, apart from the images and the machine.

    Attributes:
        id_data: the ID data set.
        method: ``base`` (cross-entropy) or ``t2fnorm``.
        network: the classifier, or T2FNorm's backbone; width: channels of its first stage.
        epochs, lr, batch_size: of SGD, the batch of one process.
        tau: T2FNorm's temperature.
        seed: of the weights, of the order of the images and of their augmentation.
        amp: compute in bfloat16 where it is safe (the weights stay in float32).
        init: checkpoint to start from, plain or T2FNorm's; None = random weights.

    Raises:
        ConfigError: a value that cannot be used.

    Source: the scripts of T2FNorm and OpenOOD v1.5.
    """

    id_data: str
    method: str = "base"
    network: str = "resnet18_32x32"
    width: int = 64
    epochs: int = 100
    lr: float = 0.1
    batch_size: int = 128
    tau: float = 0.1
    seed: int = 0
    amp: bool = False
    init: str | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(
                f"training method {self.method!r} unknown: choose {', '.join(METHODS)}"
            )
        for name in ("epochs", "lr", "batch_size", "tau"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{name} = {value} found: choose a number above 0")

    @property
    def run_name(self) -> str:
        """Folder of the training run under OpenOOD's naming, ``s<seed>`` at its end."""
        base = self.method == "base"
        net = self.network if base else "t2fnorm_net"
        alpha = "" if base else f"_alpha{self.tau:g}"
        epochs = f"e{self.epochs}_lr{self.lr:g}"
        return f"{self.id_data}_{net}_{self.method}_{epochs}{alpha}_default/s{self.seed}"

    def build(self, num_classes: int) -> nn.Module:
        """The untrained network, its weights drawn from torch's present random state."""
        args = {} if self.width == Recipe.width else {"width": self.width}
        net = NETWORKS[self.network](num_classes=num_classes, **args)
        if self.method == "base":
            return net
        wrapped = T2FNormNet(net, num_classes)
        wrapped.set_tau(self.tau)
        return wrapped

    def learning_rate(self, step: int, steps: int) -> float:
        """Cosine from ``lr`` at step 0 down to 1e-6 at the end, as OpenOOD anneals it."""
        floor = 1e-6 / self.lr
        return self.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(step / steps * math.pi)))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


_RECIPES = {
    "cifar10": Recipe(id_data="cifar10"),
    "cifar100": Recipe(id_data="cifar100"),
    "imagenet200": Recipe(id_data="imagenet200", network="resnet18_224x224", epochs=90),
    "imagenet": Recipe(id_data="imagenet", network="resnet50", epochs=30, lr=0.001, tau=0.05),
    "digits": Recipe(id_data="digits", width=16, epochs=16, lr=0.05, batch_size=64),
}


def find_recipe(id_data: str, **changes: Any) -> Recipe:
    """The published recipe of an ID data set, with some values changed.

    Raises:
        ConfigError: a data set without a recipe, or a value that cannot be used.
    """
    if id_data not in _RECIPES:
        raise ConfigError(f"ID data set {id_data!r} unknown: choose {', '.join(_RECIPES)}")
    return replace(_RECIPES[id_data], **changes)
