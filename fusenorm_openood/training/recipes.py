"""How networks are trained: the published settings, by ID data set and training method."""

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from fusenorm_openood.errors import ConfigError, unknown
from fusenorm_openood.method.validation import COUNT, POSITIVE, check_fields, checked
from fusenorm_openood.network import ResNet18_32x32, ResNet18_224x224, ResNet50, T2FNormNet
from fusenorm_openood.storage.configs import config_root, lookup, read_config

METHODS = {"base": "baseline", "t2fnorm": "train_t2fnorm"}  # method -> configs/pipelines/train
NETWORKS: dict[str, type[nn.Module]] = {
    "resnet18_32x32": ResNet18_32x32,
    "resnet18_224x224": ResNet18_224x224,
    "resnet50": ResNet50,
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What determines a network's weights, apart from images and machine (T2FNorm, OpenOOD v1.5).

    ConfigError for an invalid value.
    """

    id_data: str  # name of the ID data set
    method: str = "base"  # base (cross-entropy) or t2fnorm
    network: str = "resnet18_32x32"  # the classifier, or T2FNorm's backbone
    width: int = 64  # number of channels in the network's first stage
    epochs: int = checked(100, COUNT)
    lr: float = checked(0.1, POSITIVE)  # initial learning rate of SGD
    batch_size: int = checked(128, COUNT)  # images per step, over all processes
    tau: float = checked(0.1, POSITIVE)  # T2FNorm's temperature
    seed: int = 0  # of the weights, and of the order and augmentation of the images
    amp: bool = False  # whether to compute in bfloat16 where that is safe; weights stay in float32
    init: str | None = None  # checkpoint to start from, plain or T2FNorm's; None = random weights
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(unknown("training method", self.method, METHODS))
        check_fields(self)

    def batch_per_process(self, processes: int) -> int:
        """Images per step and process; ConfigError if the batch cannot be divided evenly."""
        if self.batch_size % processes:
            raise ConfigError(
                f"batch_size must be a multiple of the number of processes, got batch_size="
                f"{self.batch_size} for {processes} processes"
            )
        return self.batch_size // processes

    @property
    def run_name(self) -> str:
        """Folder of the training run in OpenOOD's naming scheme, ending in `s<seed>`."""
        plain = self.method == "base"
        net, alpha = (self.network, "") if plain else ("t2fnorm_net", f"_alpha{self.tau:g}")
        method = f"{self.method}_e{self.epochs}_lr{self.lr:g}{alpha}"
        return f"{self.id_data}_{net}_{method}_default/s{self.seed}"

    def build(self, num_classes: int) -> nn.Module:
        """The untrained network, with weights drawn from torch's current random state."""
        args = {} if self.width == Recipe.width else {"width": self.width}
        net = NETWORKS[self.network](num_classes=num_classes, **args)
        if self.method == "base":
            return net
        wrapped = T2FNormNet(net, num_classes)
        wrapped.set_tau(self.tau)
        return wrapped

    def learning_rate(self, step: int, steps: int) -> float:
        """Cosine schedule from `lr` at step 0 to 1e-6 at the end, as in OpenOOD."""
        floor = 1e-6 / self.lr
        return self.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(step / steps * math.pi)))


def find_recipe(id_data: str, **changes: Any) -> Recipe:
    """The published recipe of an ID data set, with some values changed.

    Read from `configs/pipelines/train`, `configs/datasets` (the batch size) and `configs/recipes`
    (the differences of the data set), which OpenOOD's pipelines read as well. ConfigError for a
    data set without a recipe, an invalid value, or a recipe that fine-tunes without `init`.
    """
    root = config_root()
    names = sorted(path.stem for path in (root / "recipes").glob("*.yml"))
    if id_data not in names:
        raise ConfigError(unknown("ID data set", id_data, names))
    pipeline = METHODS[Recipe(id_data=id_data, **changes).method]  # the changes are valid
    general = read_config(root / "pipelines" / "train" / f"{pipeline}.yml")
    dataset = read_config(root / "datasets" / id_data / f"{id_data}.yml")
    own = read_config(root / "recipes" / f"{id_data}.yml")

    optimiser = {**lookup(general, "optimizer"), **own.get("optimizer", {})}
    trainer = {**lookup(general, "trainer"), **own.get("trainer", {})}
    backbone = lookup(own, "network", "backbone")
    published = {
        "network": lookup(backbone, "name"),
        "width": backbone.get("width", Recipe.width),
        "epochs": lookup(optimiser, "num_epochs"),
        **{name: lookup(optimiser, name) for name in ("lr", "momentum", "weight_decay")},
        "batch_size": lookup(dataset, "dataset", "train", "batch_size"),
        "tau": trainer.get("trainer_args", {}).get("tau", Recipe.tau),
    }
    recipe = Recipe(id_data=id_data, **{**published, **changes})
    if backbone.get("pretrained") and recipe.init is None:
        raise ConfigError(
            f"the recipe of {id_data} fine-tunes a trained {recipe.network} for {recipe.epochs} "
            "epochs, but init is missing: give the checkpoint to start from (--init)"
        )
    return recipe
