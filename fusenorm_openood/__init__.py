"""FuseNorm: out-of-distribution detection by fusing feature norms, a plugin for OpenOOD."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fusenorm_openood.version import __version__

# Public names are imported on first use, so that importing the package loads neither torch nor
# OpenOOD.
_HOME = {
    "FuseNorm": "detectors.fusenorm",
    "FuseNormPostprocessor": "openood.postprocessor",
    "IDStatistics": "method.statistics",
    "Settings": "method.settings",
    "atf": "method.atf",
    "compute_id_statistics": "method.statistics",
    "fuse": "method.fusion",
    "load_network": "network",
    "normalise": "method.statistics",
    "on_device": "kernels.devices",
    "ood_metrics": "method.metrics",
    "register": "openood.postprocessor",
    "search": "detectors.search",
    "tap_candidates": "forward.taps",
}
__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from fusenorm_openood.detectors.fusenorm import FuseNorm as FuseNorm
    from fusenorm_openood.detectors.search import search as search
    from fusenorm_openood.forward.taps import tap_candidates as tap_candidates
    from fusenorm_openood.kernels.devices import on_device as on_device
    from fusenorm_openood.method.atf import atf as atf
    from fusenorm_openood.method.fusion import fuse as fuse
    from fusenorm_openood.method.metrics import ood_metrics as ood_metrics
    from fusenorm_openood.method.settings import Settings as Settings
    from fusenorm_openood.method.statistics import IDStatistics as IDStatistics
    from fusenorm_openood.method.statistics import compute_id_statistics as compute_id_statistics
    from fusenorm_openood.method.statistics import normalise as normalise
    from fusenorm_openood.network import load_network as load_network
    from fusenorm_openood.openood.postprocessor import (
        FuseNormPostprocessor as FuseNormPostprocessor,
    )
    from fusenorm_openood.openood.postprocessor import register as register


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
