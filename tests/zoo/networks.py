"""The networks of the catalogue with random weights, so that scores differ between images."""

from typing import Any

import torch
import torchvision
from torch import Tensor, nn

CLASSES = 10
_STAGES = {"hidden_sizes": [16, 32, 64, 128], "depths": [2, 2, 2, 2]}
_TRANSFORMER = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
SMALL: dict[str, dict[str, Any]] = {
    "Beit": {**_TRANSFORMER, "intermediate_size": 64},
    "Bit": {**_STAGES, "embedding_size": 16, "num_groups": 4},
    "ConvNext": {**_STAGES, "depths": [2, 2, 3, 2]},
    "DeiT": {**_TRANSFORMER, "intermediate_size": 64},
    "Dinov2": {**_TRANSFORMER, "patch_size": 14},
    "MobileNetV2": {},
    "PoolFormer": {**_STAGES, "depths": [2, 2, 3, 2]},
    "RegNet": {**_STAGES, "embedding_size": 16, "groups_width": 8},
    "ResNet": {**_STAGES, "embedding_size": 16, "layer_type": "basic"},
    "Swin": {"embed_dim": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 4], "window_size": 2},
    "ViT": {**_TRANSFORMER, "intermediate_size": 64},
}


def build(network: str, images: Tensor) -> nn.Module:
    """A network `library:name` for images of this size, in eval mode."""
    library, _, name = network.partition(":")
    torch.manual_seed(0)
    net = {"torchvision": _torchvision, "timm": _timm, "transformers": _transformers}[library](
        name, tuple(images.shape[2:])
    ).eval()
    with torch.no_grad():
        for module in net.modules():
            weight = getattr(module, "weight", None)
            head = isinstance(module, nn.Linear) and module.out_features == CLASSES
            if head or (isinstance(weight, Tensor) and weight.ndim > 1 and not weight.any()):
                nn.init.normal_(weight, std=0.1)
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()
                module.momentum = None
        net(images)
    return net.eval()


def _torchvision(name: str, image: tuple[int, ...]) -> nn.Module:
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True
    if name.startswith("vit_"):
        options["image_size"] = image[0]
    return torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options)


def _timm(name: str, image: tuple[int, ...]) -> nn.Module:
    import timm

    try:
        return timm.create_model(name, num_classes=CLASSES, img_size=image)
    except TypeError:  # it takes images of any size
        return timm.create_model(name, num_classes=CLASSES)


def _transformers(name: str, image: tuple[int, ...]) -> nn.Module:
    import transformers

    base = name.removesuffix("WithTeacher").removesuffix("ForImageClassification")
    config = getattr(transformers, f"{base}Config")
    return getattr(transformers, name)(
        config(**SMALL[base], image_size=image[0], num_labels=CLASSES)
    )
