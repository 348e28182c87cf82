"""FuseNorm: out-of-distribution detection by fusing feature norms, a plugin for OpenOOD."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Names are imported where they are first used: neither torch nor OpenOOD loads before that.
_HOME = {
    "FuseNorm": "detector",
    "FuseNormPostprocessor": "postprocessor",
    "IDStatistics": "statistics",
    "Settings": "settings",
    "atf": "atf",
    "compute_id_statistics": "statistics",
    "fuse": "fusion",
    "load_network": "networks",
    "normalise": "statistics",
    "on_device": "devices",
    "ood_metrics": "metrics",
    "register": "openood_bridge",
    "tap_candidates": "taps",
}
__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from fusenorm_openood.atf import atf as atf
    from fusenorm_openood.detector import FuseNorm as FuseNorm
    from fusenorm_openood.devices import on_device as on_device
    from fusenorm_openood.fusion import fuse as fuse
    from fusenorm_openood.metrics import ood_metrics as ood_metrics
    from fusenorm_openood.networks import load_network as load_network
    from fusenorm_openood.openood_bridge import register as register
    from fusenorm_openood.postprocessor import FuseNormPostprocessor as FuseNormPostprocessor
    from fusenorm_openood.settings import Settings as Settings
    from fusenorm_openood.statistics import IDStatistics as IDStatistics
    from fusenorm_openood.statistics import compute_id_statistics as compute_id_statistics
    from fusenorm_openood.statistics import normalise as normalise
    from fusenorm_openood.taps import tap_candidates as tap_candidates


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps the submodule ``atf``, once imported, from hiding the function ``atf``."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
