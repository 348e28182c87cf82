"""FuseNorm as one of OpenOOD's postprocessors, and its registration with OpenOOD."""

import warnings
from collections.abc import Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fusenorm_openood.detectors.bank import ScoreBank
from fusenorm_openood.detectors.configuration import read_fusenorm
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.detectors.scorer import atomic
from fusenorm_openood.detectors.search import UNUSABLE, choose, search, swept
from fusenorm_openood.detectors.statistics import DetectorStatistics
from fusenorm_openood.errors import ConfigError, DataError, FuseNormError, NotFittedError
from fusenorm_openood.method.settings import FUSION_SETTINGS, METHODS
from fusenorm_openood.network.fingerprint import is_network
from fusenorm_openood.network.structure import Structure
from fusenorm_openood.openood.bridge import base_postprocessor, openood_module, rebind
from fusenorm_openood.storage import configs


class FuseNormPostprocessor(base_postprocessor()):  # type: ignore[misc]
    """FuseNorm for OpenOOD's evaluators, a subclass of its `BasePostprocessor`.

    It pickles without the network, and gives the same scores after unpickling.

    Args:
        config: OpenOOD's configuration, or any mapping with the same keys: `postprocessor` with
            `APS_mode`, `postprocessor_args` (every setting of `Settings`) and
            `postprocessor_sweep` (lists of values to search, by setting).

    Raises:
        ConfigError: a missing or unknown key, or a value out of range.

    Examples:
        >>> config = configs.read_config(configs.config_root() / "postprocessors" / "fusenorm.yml")
        >>> FuseNormPostprocessor(config).settings.penalty
        'joint'
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.settings, self.args_dict, self.APS_mode = read_fusenorm(config)
        self.hyperparam_search_done = self.setup_flag = False
        self.statistics: DetectorStatistics | None = None
        self._fitted_on: tuple[nn.Module, Iterable[Any]] | None = None
        self._structure: Structure | None = None  # of the network in _fitted_on
        self._last: FuseNorm | None = None
        self._bank: ScoreBank | None = None
        self._unusable: FuseNormError | None = None  # why the settings of a search are

    @atomic
    def setup(
        self, net: nn.Module, id_loader_dict: Mapping[str, Any], ood_loader_dict: Any = None
    ) -> None:
        """Fit the ID statistics on the ID validation images.

        A second call has no effect with the same network; with another one, or with other weights,
        the statistics are fitted again. If it fails, the postprocessor stays as it was.

        With `APS_mode: pseudo`, the settings are searched here, on pseudo-OOD images made from the
        ID validation images. With `APS_mode: True`, the images of both validation loaders are
        scored under every combination of the sweep, each image once, so that the search itself
        does not run the network.

        Args:
            net: network to score with.
            id_loader_dict: OpenOOD's ID loaders; `"val"` is read.
            ood_loader_dict: OpenOOD's OOD loaders; `"val"` is read for a search.
        """
        id_loader = _validation(id_loader_dict, "id_loader_dict", "to fit on")
        if self.setup_flag and not self._is_of(net):
            self.setup_flag, self.statistics, self._bank, self._last = False, None, None, None
        if not self.setup_flag or self._fitted_on is None or self._fitted_on[0] is not net:
            self._structure = None
        self._fitted_on = net, id_loader
        if self.setup_flag:
            return
        if self.APS_mode == "pseudo":
            found = search(net, self.settings, self.args_dict, id_loader)
            self.settings, self.statistics = found.settings, found.statistics
            self.APS_mode, self.hyperparam_search_done = False, True
        elif self.APS_mode and not self.hyperparam_search_done:
            ood_loader = _validation(ood_loader_dict, "ood_loader_dict", "for a search")
            self._bank = ScoreBank(net, swept(self.settings, self.args_dict))
            self._bank.fit(id_loader).add(ood_loader)
            self._structure = self._bank.known_structure
            # Raise a clear error if no combination is usable: OpenOOD's loop raises a TypeError.
            choose(self._bank, self.settings, self.args_dict, [ood_loader])
        else:
            self._fit()
        self.setup_flag = True

    def postprocess(self, net: nn.Module, data: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions `[B]` and confidences `[B]`, larger = more in-distribution."""
        return self._detector(net).predict(data)

    def inference(
        self, net: nn.Module, data_loader: Iterable[Any], progress: bool = True
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
        """Predictions, confidences and labels `[N]` of a loader, on the network's device."""
        bank = self._bank
        if bank is not None and not (bank.net is net and bank.holds(data_loader)):
            bank = None
        if bank is not None and self._unusable is not None:
            # Let the search continue past these settings: an AUROC of 0 is never the best.
            warnings.warn(f"settings skipped: {self._unusable}", RuntimeWarning, stacklevel=2)
            scored = bank.worst(data_loader)
        elif bank is not None and bank.has(self.settings):
            scored = bank.scored(self.settings, data_loader)
        else:
            scored = self._detector(net).infer(data_loader, progress)
        return scored.pred, scored.conf, scored.label

    @atomic
    def set_hyperparam(self, hyperparam: list[Any]) -> None:
        """Set one value for each key of `args_dict`, in its order, and refit where necessary.

        The ID images are scored again only if the expert scores change. That requires the network
        and the images passed to `setup`; an unpickled postprocessor must be set up again. During a
        search nothing is scored again, and incompatible values raise no error here, but only when
        images other than the validation images are scored with them.
        """
        if len(hyperparam) != len(self.args_dict):
            raise ConfigError(
                f"hyperparam must have {len(self.args_dict)} values "
                f"({', '.join(self.args_dict) or 'no sweep'}), got {hyperparam}"
            )
        values = dict(zip(self.args_dict, hyperparam, strict=True))
        self._unusable = None
        try:
            self.settings = self.settings.replace(**values)
            if self._bank is not None:
                self.statistics = self._from_bank()
            elif self.statistics is not None and self._fitted_on is not None:
                self._detector(self._fitted_on[0])
        except UNUSABLE as error:
            if self._bank is None:
                raise
            self.statistics, self._unusable = None, error

    def get_hyperparam(self) -> list[Any]:
        """The current value of each key of `args_dict`, in its order."""
        return [getattr(self.settings, name) for name in self.args_dict]

    def _is_of(self, net: nn.Module) -> bool:
        """Whether the ID statistics, or the scores for a search, are those of a network."""
        fitted: ScoreBank | DetectorStatistics | None = self._bank or self.statistics
        network = None if fitted is None else fitted.network
        return network is None or is_network(net, network)

    def _from_bank(self) -> DetectorStatistics | None:
        bank = self._bank
        return bank.statistics(self.settings) if bank and bank.has(self.settings) else None

    def _fit(self) -> None:
        """Find the statistics under the current settings, from the images passed to `setup`."""
        self.statistics, self.setup_flag = self._from_bank(), False
        if self._fitted_on is None:
            return
        if self.statistics is None:
            net, id_loader = self._fitted_on
            detector = FuseNorm(net, self.settings, self._structure).fit(id_loader)
            self.statistics, self._structure = detector.id_statistics_, detector.known_structure
        self.setup_flag = True

    def _detector(self, net: nn.Module) -> FuseNorm:
        """The detector under the current settings, which may differ from those of the last fit."""
        if self._unusable is not None:
            raise self._unusable
        last = self._last
        is_current = last is not None and last.net is net and last.id_statistics_ is self.statistics
        if last is not None and is_current and last.settings == self.settings:
            return last
        is_fitted_on = self._fitted_on is not None and self._fitted_on[0] is net
        detector = FuseNorm(net, self.settings, self._structure if is_fitted_on else None)
        if self._needs_fit(detector):
            self._fit()
        if self.statistics is None:
            raise NotFittedError("FuseNorm has no ID statistics: call setup(net, loaders) first")
        adopt = detector.adopt if is_fitted_on else detector.with_statistics
        self._last = adopt(self.statistics)
        self.statistics = self._last.id_statistics_
        return self._last

    def _needs_fit(self, detector: FuseNorm) -> bool:
        """Whether the ID statistics do not follow from the scores of the last fit."""
        fitted = self.statistics
        if fitted is None:
            return self._bank is not None  # images are scored before the search
        then = vars(fitted.settings)
        changed = {name for name, value in vars(self.settings).items() if value != then[name]}
        if changed and changed <= FUSION_SETTINGS:
            detector.name_as(fitted)
            return fitted.experts != detector.experts  # other strong experts
        return bool(changed)

    def __getstate__(self) -> dict[str, Any]:
        # During a search the bank, which is not pickled, has the statistics.
        ready = self.setup_flag and self.statistics is not None
        gone = dict.fromkeys(("_fitted_on", "_bank", "_last", "_structure"))
        return {**vars(self), **gone, "setup_flag": ready}


def _validation(loaders: Mapping[str, Any] | None, name: str, purpose: str) -> Iterable[Any]:
    if not loaders or "val" not in loaders:
        found = ", ".join(loaders or ()) or "no loader"
        raise DataError(f"{name} must contain 'val', the loader {purpose}, got {found}")
    loader: Iterable[Any] = loaders["val"]
    return loader


def register() -> None:
    """Register `fusenorm`, `fusenorm_published` and `fusenorm_deviation` with OpenOOD.

    OpenOOD looks them up in its `Evaluator` (`postprocessor_name="fusenorm"`), `get_postprocessor`
    of its evaluation API, and the pipelines in its YAML files. None of OpenOOD's files is changed,
    other names keep their meaning, and a second call has no effect. If OpenOOD's configuration
    folder has no file `postprocessors/NAME.yml`, this package's file is read.

    Raises:
        OpenOODError: OpenOOD is absent or broken.
    """
    api = openood_module("evaluation_api.postprocessor")
    api.postprocessors.update(dict.fromkeys(METHODS, FuseNormPostprocessor))
    by_name: Any = api.get_postprocessor
    by_config: Any = openood_module("postprocessors.utils").get_postprocessor

    @wraps(by_name)
    def get_by_name(config_root: str, postprocessor_name: str, id_data_name: str) -> Any:
        own = Path(config_root, "postprocessors", f"{postprocessor_name}.yml")
        if postprocessor_name in METHODS and not own.is_file():
            config_root = str(configs.config_root())
        return by_name(config_root, postprocessor_name, id_data_name)

    @wraps(by_config)
    def get_by_config(config: Any) -> Any:
        is_ours = config.postprocessor.name in METHODS
        return FuseNormPostprocessor(config) if is_ours else by_config(config)

    pairs: list[tuple[Any, Any]] = [(by_name, get_by_name), (by_config, get_by_config)]
    for original, wrapper in pairs:
        if not hasattr(original, "has_fusenorm"):
            wrapper.has_fusenorm = True
            rebind(original, wrapper)
