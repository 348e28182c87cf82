"""FuseNorm as one of OpenOOD's postprocessors."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fusenorm_openood.detectors.atomic import atomic
from fusenorm_openood.detectors.bank import ScoreBank
from fusenorm_openood.detectors.configuration import read_fusenorm
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.detectors.search import UNUSABLE, choose, search, swept
from fusenorm_openood.detectors.statistics import DetectorStatistics
from fusenorm_openood.errors import ConfigError, DataError, FuseNormError, NotFittedError
from fusenorm_openood.method.settings import FUSION_SETTINGS, Settings
from fusenorm_openood.network.fingerprint import is_network
from fusenorm_openood.network.structure import Structure
from fusenorm_openood.openood.bridge import base_postprocessor


class FuseNormPostprocessor(base_postprocessor()):  # type: ignore[misc]
    """FuseNorm for OpenOOD's evaluators, a subclass of its `BasePostprocessor`.

    It pickles without the network, and gives the same scores after unpickling.

    Args:
        config: OpenOOD's configuration, or any mapping with the same keys: `postprocessor` with
            `APS_mode`, `postprocessor_args` (every setting of `Settings`) and
            `postprocessor_sweep` (lists of values to search, by setting).

    Raises:
        ConfigError: a missing or unknown key, or a value out of range.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.settings, self.args_dict, self.APS_mode = read_fusenorm(config)
        self.hyperparam_search_done = False
        self.setup_flag = False
        self.statistics: DetectorStatistics | None = None
        self._unusable: FuseNormError | None = None
        self._fitted_on: tuple[nn.Module, Iterable[Any]] | None = None
        self._bank: ScoreBank | None = None
        self._recalibrate = False  # the fusion's settings have changed since the calibration
        self._last: FuseNorm | None = None
        self._structure: Structure | None = None  # of the network in _fitted_on

    @atomic
    def setup(
        self, net: nn.Module, id_loader_dict: Mapping[str, Any], ood_loader_dict: Any = None
    ) -> None:
        """Fit the ID statistics on the ID validation images.

        A second call has no effect with the same network; with another one, or with other weights,
        the statistics are fitted again.

        If it fails, the postprocessor stays as it was.

        With `APS_mode: pseudo`, the settings are searched here, on pseudo-OOD images made from the
        ID validation images. With `APS_mode: True`, the images of both validation loaders are
        scored under every combination of the sweep, each image once, so that the search itself
        does not run the network.

        Args:
            net: network to score with.
            id_loader_dict: OpenOOD's ID loaders; `"val"` is read.
            ood_loader_dict: OpenOOD's OOD loaders; `"val"` is read for a search.
        """
        if "val" not in id_loader_dict:
            raise DataError(
                "id_loader_dict must contain 'val', the loader that FuseNorm is fitted on, got "
                f"{', '.join(id_loader_dict) or 'no loader'}"
            )
        if self.setup_flag and not self._is_of(net):
            self.setup_flag, self.statistics, self._bank, self._last = False, None, None, None
        if not self.setup_flag or self._fitted_on is None or self._fitted_on[0] is not net:
            self._structure = None
        self._fitted_on = net, id_loader_dict["val"]
        if self.setup_flag:
            return
        if self.APS_mode == "pseudo":
            found = search(net, self.settings, self.args_dict, id_loader_dict["val"])
            self.settings, self.statistics = found.settings, found.statistics
            self.APS_mode, self.hyperparam_search_done, self.setup_flag = False, True, True
        elif self.APS_mode and not self.hyperparam_search_done:
            if not ood_loader_dict or "val" not in ood_loader_dict:
                raise DataError(
                    "ood_loader_dict must contain 'val' for a search (APS_mode: True), got "
                    f"{', '.join(ood_loader_dict or ()) or 'no loader'}"
                )
            self._bank = ScoreBank(net, swept(self.settings, self.args_dict))
            self._bank.fit(id_loader_dict["val"]).add(ood_loader_dict["val"])
            self._structure = self._bank.known_structure
            # Raise a clear error if no combination is usable: OpenOOD's loop raises a TypeError.
            choose(self._bank, self.settings, self.args_dict, [ood_loader_dict["val"]])
            self.setup_flag = True
        else:
            self._fit()

    def _is_of(self, net: nn.Module) -> bool:
        """Whether the ID statistics, or the scores for a search, are those of a network."""
        fitted: ScoreBank | DetectorStatistics | None = self._bank or self.statistics
        network = None if fitted is None else fitted.network
        return network is None or is_network(net, network)

    def postprocess(self, net: nn.Module, data: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions `[B]` and confidences `[B]`, larger = more in-distribution."""
        return self._detector(net).predict(data)

    def inference(
        self, net: nn.Module, data_loader: Iterable[Any], progress: bool = True
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
        """Predictions, confidences and labels `[N]` of a loader, on the network's device."""
        bank = self._bank
        if bank is None or bank.net is not net or not bank.holds(data_loader):
            scored = self._detector(net).infer(data_loader, progress)
        elif self._unusable is None and bank.has(self.settings):
            scored = bank.scored(self.settings, data_loader)
        elif self._unusable is None:
            scored = self._detector(net).infer(data_loader, progress)
        else:
            # Let the search continue past these settings: an AUROC of 0 is never the best.
            warnings.warn(f"settings skipped: {self._unusable}", RuntimeWarning, stacklevel=2)
            scored = bank.worst(data_loader)
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
        before, self._unusable = self.settings, None
        if self._bank is None:
            self.settings = before.replace(**values)
            self._refit(before)
            return
        self.statistics = None
        try:
            self.settings = before.replace(**values)
            if self._bank.has(self.settings):
                self.statistics = self._bank.statistics(self.settings)
        except UNUSABLE as error:
            self._unusable = error

    def get_hyperparam(self) -> list[Any]:
        """The current value of each key of `args_dict`, in its order."""
        return [getattr(self.settings, name) for name in self.args_dict]

    def _refit(self, before: Settings) -> None:
        changed = {n for n, v in vars(self.settings).items() if v != getattr(before, n)}
        if self.statistics is None or not changed:
            return
        self._recalibrate = changed <= FUSION_SETTINGS
        if self._fitted_on is not None and self._recalibrate:
            self._detector(self._fitted_on[0])
        elif not self._recalibrate:
            self.setup_flag, self.statistics = False, None
            self._fit()

    def _fit(self) -> None:
        if self._fitted_on is not None:
            net, id_loader = self._fitted_on
            if self._bank is not None and self._bank.has(self.settings):
                self.statistics = self._bank.statistics(self.settings)
            else:
                detector = FuseNorm(net, self.settings, self._structure).fit(id_loader)
                self.statistics = detector.id_statistics_
                self._structure = detector.known_structure
            self.setup_flag = True

    def _detector(self, net: nn.Module) -> FuseNorm:
        if self._unusable is not None:
            raise self._unusable
        if self.statistics is None and self._bank is not None:
            self._fit()  # images are scored before the search
        known = self._last
        if (
            known
            and known.net is net
            and known.settings == self.settings
            and (known.id_statistics_ is self.statistics and known.is_fitted)
        ):
            return known
        same = self._fitted_on is not None and self._fitted_on[0] is net
        detector = FuseNorm(net, self.settings, self._structure if same else None)
        if self._recalibrate and self.statistics is not None:
            self._recalibrate = False
            c = self.statistics
            detector.name_as(c)
            if c.experts == detector.experts:
                self.statistics = detector.learn(c.id_scores, c.fitted, c.network)
            else:  # other strong experts
                self.setup_flag, self.statistics = False, None
                self._fit()
        if self.statistics is None:
            raise NotFittedError("FuseNorm has no ID statistics: call setup(net, loaders) first")
        use = detector.adopt if same else detector.with_statistics
        self._last = use(self.statistics)
        return self._last

    def __getstate__(self) -> dict[str, Any]:
        ready = (
            self.setup_flag and self.statistics is not None
        )  # else the bank, not pickled, has it
        gone = {"_fitted_on": None, "_bank": None, "_last": None, "_structure": None}
        return {**vars(self), **gone, "setup_flag": ready}
