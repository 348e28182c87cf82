"""How many ID images a fit takes, and a warning if there are fewer."""

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from fusenorm_openood.errors import TapError
from fusenorm_openood.forward.batches import Readings, batches
from fusenorm_openood.forward.panel import Panel
from fusenorm_openood.forward.react import head_of
from fusenorm_openood.method.posthoc import POSTHOC
from fusenorm_openood.network.structure import Structure

LEAST = 20  # images, with which the 5th percentile lies among the scores
SHORT = 0.9  # a fit on a tenth fewer images than are enough is nearly as good


def enough_for(percentile: float) -> int:
    """The number of images with which a percentile in [0, 100] lies among their scores.

    >>> enough_for(5), enough_for(1), enough_for(0)
    (20, 100, 20)
    """
    return max(LEAST, math.ceil(100 / percentile - 1e-6)) if percentile else LEAST


def needed(
    net: nn.Module, structure: Structure, panel: Panel, least: int = LEAST
) -> dict[str, int]:
    """The numbers of ID images that a fit of a panel takes, by what takes them."""
    features = _width(net, structure) if panel.posthoc else 0
    classes = structure.classes
    needs = {"percentiles of the scores": least, f"{classes} classes": classes}
    for name, arguments in panel.posthoc:
        count = POSTHOC[name].enough(dict(arguments), features, classes)
        needs[f"{name} with {features} features"] = count
    return needs


def _width(net: nn.Module, structure: Structure) -> int:
    """The number of features, 0 of a head that is no linear function of them."""
    try:
        return head_of(net, structure).weight.shape[1]
    except TapError:
        return 0


def known_count(loader: Iterable[Any]) -> int | None:
    """The number of images of a loader, if it is known before they are read."""
    given: Any = loader.loader if isinstance(loader, Readings) else loader
    if isinstance(given, list | tuple):
        return sum(len(images) for images, _ in batches(given))
    if getattr(given, "batch_sampler", None) is not None and given.batch_size is None:
        return None
    try:
        return len(getattr(given, "sampler", None) or given.dataset)
    except (AttributeError, NotImplementedError, TypeError):
        return None


def warn_if_few(images: int | None, needs: Mapping[str, int], stacklevel: int = 4) -> bool:
    """Whether a number of images is known; warn if it is too small, and say which is enough."""
    few = [what for what, count in needs.items() if images is not None and images < SHORT * count]
    if few:
        warnings.warn(
            f"{images} ID images are too few for {', '.join(few)}: fit on at least "
            f"{max(needs.values())}",
            UserWarning,
            stacklevel=stacklevel,
        )
    return images is not None
