"""Build a network from its name: torchvision's, timm's, or a function in any module."""

import inspect
import re
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from math import nextafter
from operator import attrgetter
from typing import Any

from torch import nn

from fusenorm_openood.errors import ConfigError

_CATALOGUED = re.compile(r"(torchvision|timm):([A-Za-z0-9_.-]+)")


def build_network(
    spec: str,
    num_classes: int | None = None,
    image_size: int | None = None,
    pretrained: bool = False,
) -> nn.Module:
    """A network, with random weights unless `pretrained`, in eval mode.

    Args:
        spec: `torchvision:NAME`, `timm:NAME` or `package.module:factory`, a function or class.
        num_classes: number of ID classes, None = the default; not passed to a factory without an
            argument of that name.
        image_size: height and width of the images, for networks that are built for one size.
        pretrained: whether to load, and download once, the default weights of torchvision or timm.

    Raises:
        ConfigError: the network is unknown or cannot be built, or its library is not installed.
    """
    source, _, name = spec.partition(":")
    if not (source and name):
        raise ConfigError(
            "network must be torchvision:NAME, timm:NAME or package.module:factory, for example "
            f"torchvision:resnet18, got {spec!r}"
        )
    if pretrained and source not in ("torchvision", "timm"):
        raise ConfigError(f"only torchvision and timm have pretrained weights, got {spec!r}")
    classes = {} if num_classes is None else {"num_classes": num_classes}
    try:
        if source == "torchvision" and pretrained:
            net = _with_weights(import_module("torchvision").models, name, classes)
        elif source == "torchvision":
            create, size = import_module("torchvision").models.get_model, {"image_size": image_size}
            net = _sized(create, name, size, {"weights": None, **classes})
        elif source == "timm":
            create = _module(spec, source).create_model
            size = {"img_size": image_size}
            net = _sized(create, name, size, {"pretrained": pretrained, **classes})
        else:
            factory = attrgetter(name)(_module(spec, source))
            net = factory(**classes if _takes_classes(factory) else {})
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # code of others, which may raise anything
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"network {spec!r} cannot be built ({type(error).__name__}: {reason}): "
            f"{_near(source, name) or 'check its name and its arguments'}"
        ) from error
    if not isinstance(net, nn.Module):
        raise ConfigError(
            f"network {spec!r} must be a function that returns a torch.nn.Module, got "
            f"{type(net).__name__}: name another"
        )
    return net.eval()


def _with_weights(models: Any, name: str, classes: dict[str, int]) -> Any:
    """A network of torchvision with its weights; it declares their preprocessing as timm's do."""
    weights = models.get_model_weights(name).DEFAULT
    net, how = models.get_model(name, weights=weights, **classes), weights.transforms()
    side, resize = how.crop_size[0], how.resize_size[0]
    net.pretrained_cfg = {
        "input_size": (3, side, side),
        "crop_pct": nextafter(side / resize, 0),  # of which `Preprocessing.of` takes the floor
        "interpolation": how.interpolation.value,
        "mean": tuple(how.mean),
        "std": tuple(how.std),
    }
    return net


def _sized(
    create: Callable[..., Any], name: str, size: dict[str, int | None], given: dict[str, Any]
) -> Any:
    """Create a network for a size of images, or for any size if it takes no such argument."""
    if None not in size.values():
        try:
            return create(name, **given, **size)
        except Exception:  # networks refuse a size in many ways
            pass
    return create(name, **given)


def _near(source: str, name: str) -> str:
    """Networks of torchvision or timm with similar names, if no network has this name."""
    if source == "timm":
        listed = import_module(source).list_models()
    elif source == "torchvision":
        listed = import_module(source).models.list_models()
    else:
        return ""
    near = [] if name in listed else get_close_matches(name, listed, 3)
    return f"did you mean {', '.join(near)}?" if near else ""


def _module(spec: str, name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        way_out = "pip install timm" if name == "timm" else "put its folder on PYTHONPATH"
        raise ConfigError(
            f"network {spec!r} needs the module {name}, which cannot be imported ({error}): "
            f"{way_out}"
        ) from error


def _takes_classes(factory: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:  # written in C
        return False
    return any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in parameters)


def is_catalogued(spec: str) -> bool:
    """Whether a network is one of torchvision's classifiers or timm's architectures.

    Such a name runs the code of these packages only, and downloads nothing, unlike a name of a hub,
    a folder or any other module, or a detector of torchvision's, whose backbone has weights.
    """
    found = _CATALOGUED.fullmatch(spec)
    if found is None:
        return False
    source, name = found.groups()
    if source == "timm":
        return bool(_module(spec, source).is_model(name))
    models = import_module("torchvision").models
    listed = [*models.list_models(models), *models.list_models(models.quantization)]
    return name.lower() in listed
