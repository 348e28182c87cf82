"""FuseNorm behind OpenOOD's postprocessor contract."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fusenorm_openood.detector import Calibration, FuseNorm, calibrate
from fusenorm_openood.errors import ConfigError, DataError, NotFittedError
from fusenorm_openood.openood_bridge import base_postprocessor
from fusenorm_openood.settings import FUSION_SETTINGS, read_fusenorm


class FuseNormPostprocessor(base_postprocessor()):  # type: ignore[misc]
    """FuseNorm for OpenOOD's evaluators, a subclass of its ``BasePostprocessor``.

    Pickles without the network, and scores the same after unpickling.

    Args:
        config: OpenOOD's configuration, or any mapping of the same keys: ``postprocessor`` with
            ``APS_mode``, ``postprocessor_args`` (every setting of :class:`Settings`) and
            ``postprocessor_sweep`` (lists of values to search, by setting).

    Raises:
        ConfigError: a missing or unknown key, or a value out of range.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.settings, self.args_dict, self.APS_mode = read_fusenorm(config)
        self.hyperparam_search_done = False
        self.setup_flag = False
        self.calibration: Calibration | None = None
        self._fitted_on: tuple[nn.Module, Iterable[Any]] | None = None

    def setup(
        self, net: nn.Module, id_loader_dict: Mapping[str, Any], ood_loader_dict: Any = None
    ) -> None:
        """Fit the ID statistics on the ID validation images; a second call changes nothing.

        Args:
            net: the network to be scored with.
            id_loader_dict: OpenOOD's ID loaders; ``"val"`` is read.
            ood_loader_dict: not read.
        """
        if "val" not in id_loader_dict:
            raise DataError(
                f"ID loaders {', '.join(id_loader_dict) or 'none'} found: FuseNorm fits on 'val'"
            )
        self._fitted_on = net, id_loader_dict["val"]
        if not self.setup_flag:
            self._fit()

    def postprocess(self, net: nn.Module, data: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions ``[B]`` and confidences ``[B]``, larger = more in-distribution."""
        return self._detector(net).predict(data)

    def inference(
        self, net: nn.Module, data_loader: Iterable[Any], progress: bool = True
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
        """Predictions, confidences and labels ``[N]`` of a loader, on the network's own device."""
        scored = self._detector(net).infer(data_loader, progress)
        return scored.pred, scored.conf, scored.label

    def set_hyperparam(self, hyperparam: list[Any]) -> None:
        """Take one value for each key of ``args_dict``, in its order, and recompute what follows.

        The ID images are scored anew only where the expert scores change. That needs the network
        and the images of :meth:`setup`; an unpickled postprocessor must be set up again.
        """
        if len(hyperparam) != len(self.args_dict):
            raise ConfigError(
                f"{len(hyperparam)} hyperparameters {hyperparam} found: give one each for "
                f"{', '.join(self.args_dict) or 'nothing'}"
            )
        before = self.settings
        self.settings = before.replace(**dict(zip(self.args_dict, hyperparam, strict=True)))
        changed = {n for n, v in vars(self.settings).items() if v != getattr(before, n)}
        if self.calibration is None or not changed:
            return
        if changed <= FUSION_SETTINGS:
            c = self.calibration
            self.calibration = calibrate(c.experts, c.id_scores, c.react_thresholds, self.settings)
        else:
            self.setup_flag, self.calibration = False, None
            if self._fitted_on is not None:
                self._fit()

    def get_hyperparam(self) -> list[Any]:
        """The present value of each key of ``args_dict``, in its order."""
        return [getattr(self.settings, name) for name in self.args_dict]

    def _fit(self) -> None:
        if self._fitted_on is not None:
            net, id_loader = self._fitted_on
            self.calibration = FuseNorm(net, self.settings).fit(id_loader).calibration_
            self.setup_flag = True

    def _detector(self, net: nn.Module) -> FuseNorm:
        if self.calibration is None:
            raise NotFittedError("FuseNorm has no ID statistics: call setup(net, loaders) first")
        return FuseNorm(net, self.settings).with_calibration(self.calibration)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_fitted_on": None}
