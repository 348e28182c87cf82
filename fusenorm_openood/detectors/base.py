"""What all detectors share: scores, calibration, verdicts."""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusenorm_openood import errors
from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.detectors.calibrating import calibration_of, data_of
from fusenorm_openood.detectors.scorer import Scorer
from fusenorm_openood.detectors.statistics import DetectorStatistics
from fusenorm_openood.detectors.watch import Watch
from fusenorm_openood.forward.experts import Expert, Scoring
from fusenorm_openood.forward.given import Given, Images, check_finite, checked_images
from fusenorm_openood.forward.recorded import Scored, collect
from fusenorm_openood.kernels.devices import moved
from fusenorm_openood.method.calibration import LEAST, PREDICTED, Calibration, GroupsOf, by_group
from fusenorm_openood.method.conformal import Guarantee
from fusenorm_openood.method.scores.energy import Energy
from fusenorm_openood.network.fingerprint import Fingerprint, identify
from fusenorm_openood.network.running import network_errors, unwrapped

D = TypeVar("D", bound="Detector")


class Detector(Scorer, ABC):
    """Turns images into confidences and, after `calibrate`, into p-values and verdicts.

    Attributes:
        experts: names of the experts.
        rows: the experts whose scores are the rows of `Scored.experts`, which may be more.
        fitted_on: the ID images of a benchmark that it is fitted on, `val` or `train`.
        calibration_: what `calibrate` keeps, None before; see `Calibration`.
        id_statistics_: what `fit` has found of a fusion, None before and of single scores.
        preprocessing: how pictures and image files become tensors, if it is set.
    """

    experts: tuple[str, ...] = ()
    rows: Sequence[Expert] = ()
    _estimator_type = "outlier_detector"  # for scikit-learn
    fitted_on = "val"
    calibration_: Calibration | None = None
    preprocessing: Preprocessing | None = None
    id_statistics_: DetectorStatistics | None = None
    fit_data: Any = None  # a weak reference to what it was fitted on
    other_network: Fingerprint | None = None  # that it was neither fitted nor calibrated with

    @abstractmethod
    def fit(self: D, loader: Iterable[Any], progress: bool = False) -> D:
        """Fit the detector on ID images; see `score_loader` for the accepted loaders."""

    @abstractmethod
    def confidence(self, experts: NDArray[Any]) -> NDArray[Any]:
        """Confidences `[N]` from expert scores `[L, N]`."""

    @abstractmethod
    def check_fitted(self) -> Any:
        """Raise NotFittedError if `fit` has to be called first."""

    @property
    def is_fitted(self) -> bool:
        """Whether the detector can score without a further call of `fit`."""
        try:
            self.check_fitted()
        except errors.NotFittedError:
            return False
        return True

    @property
    def row_names(self) -> tuple[str, ...]:
        """Names of the rows of `Scored.experts`."""
        return self.experts

    def predict(self, images: Images) -> tuple[Tensor, Tensor]:
        """Predicted classes `[B]` and confidences `[B]` of images `[B, C, H, W]`, on their device.

        Of one image `[C, H, W]`, both are without a dimension. Confidences are float64 where that
        is supported.

        Raises:
            NotFittedError: before `fit`.
            NonFiniteError: NaN or infinity in the images or in their features.
            DataError, NetworkError: images of another kind, or that the network fails on.
        """
        given, pred, conf = self._judged(images)
        return given.results(pred), given.results(conf)

    def _judged(self, images: Images) -> tuple[Given, NDArray[np.int64], NDArray[Any]]:
        """Images, and their predicted classes and confidences `[B]`."""
        self.check_fitted()
        given = Given.of(images, self.known_preprocessing)
        experts, pred = self.expert_scores(given.batch)
        return given, pred, self.confidence(experts)

    def expert_scores(self, images: Tensor) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Scores `[L, B]` of the experts and predicted classes `[B]`; see `predict`."""
        self.check_fitted()
        with network_errors(self.net, checked_images(images)):
            on_device = moved(self.net, images)
            scoring = self.scoring(lambda: on_device)
            batch = scoring.complete(scoring.run(on_device))
        experts = batch.matrix(self.rows).cpu().numpy()
        check_finite(images, experts, self.rows)
        self.check_size(images)
        return experts, batch.pred.cpu().numpy()

    def check_size(self, images: Tensor) -> None:
        """Warn of images of another size than those of the fit, whose norms are others."""
        network = None if self.id_statistics_ is None else self.id_statistics_.network
        fitted, given = () if network is None else network.image, tuple(images.shape[1:])
        if fitted and tuple(fitted) != given:
            errors.warn(
                f"images of size {list(given)} are compared with ID statistics of images of size "
                f"{list(fitted)}, from which their norms may differ: resize them, or fit on such"
            )

    def score(self, images: Images) -> Tensor:
        """Confidences `[B]` of images `[B, C, H, W]`, larger = more in-distribution.

        Where `preprocessing` is set, images may also be paths, PIL images, uint8 tensors
        `[B, 3, H, W]` or arrays `[B, H, W, 3]` of any size, or a list of these.
        """
        given, _, conf = self._judged(images)
        return given.results(conf)

    def decision_function(self, images: Images) -> NDArray[np.float64]:
        """The confidences `[B]` as an array, as scikit-learn's outlier detectors give them."""
        return np.atleast_1d(self.score(images).double().cpu().numpy())

    def __sklearn_is_fitted__(self) -> bool:
        return self.is_fitted

    def __sklearn_tags__(self) -> object:
        from sklearn.utils import Tags, TargetTags  # since 1.6; before, the attribute counts

        return Tags(self._estimator_type, TargetTags(required=False))

    def threshold(self, acceptance: float = 0.95, group: int | str | None = None) -> float:
        """The smallest confidence that is accepted, of a group if there are groups.

        Raises:
            CalibrationError: before `calibrate`, or too few calibration images for the acceptance.
            ConfigError: an acceptance outside (0, 1), or a group that is missing or unknown.
        """
        calibration = self.check_calibrated()
        number = self._group_number(calibration, group)
        if calibration.by is not None and number is None:
            raise errors.ConfigError(f"thresholds are by {calibration.by}: give its group")
        return float(calibration.thresholds(acceptance)[number or 0])

    def score_loader(self, loader: Iterable[Any], progress: bool = False) -> Tensor:
        """Confidences `[N]`, float64 on the CPU, of all images of a loader.

        A loader gives batches `(images, labels)`, `{"data": images, "label": labels}` or
        images alone. Memory grows only with the expert scores.
        """
        return torch.from_numpy(self.infer(loader, progress).conf).double()

    def infer(self, loader: Iterable[Any], progress: bool = False, desc: str = "score") -> Scored:
        """Confidences, predictions, labels and expert scores of all images of a loader."""
        self.check_fitted()
        scored = collect(self.net, self.scoring, loader, self.rows, progress, desc)
        return scored._replace(conf=self.confidence(scored.experts))

    def calibrate(
        self: D,
        loader: Iterable[Any],
        progress: bool = False,
        by: str | GroupsOf | None = None,
        least: int = LEAST,
        merge: bool = False,
        newest: int | None = None,
        source: str | None = None,
    ) -> D:
        """Score ID images that neither trained the network nor fitted the detector.

        p-values compare an image with their confidences. Images that repeat each other count once,
        with a warning, because p-values need images that are drawn independently.

        With `by`, an image is compared with the calibration images of its own group, so that the
        guarantee holds for each group. Groups with fewer than `least` images are pooled, with a
        warning: see `Calibration`.

        Args:
            loader: ID images; see `score_loader`.
            progress: whether to show a progress bar.
            by: what the groups are: `"predicted"` = the predicted classes, all those of the
                network; else a key of batches that are dicts, such as `"camera"`, or `"label"`, and
                `p_values` and `is_ood` need the groups of their images; or a function `by(images,
                pred)` of images `[B, C, H, W]`, as the network takes them, and predicted classes
                `[B]` that gives one name or number for each, of which a file and a pickle keep the
                name alone, so that they need the groups, too; None = one group.
            least: the number of images with which a group is compared with itself alone; 19 are
                needed for an acceptance of 95 %, 99 for 99 %.
            merge: whether to keep the images of earlier calls, grouped in the same way.
            newest: how many images to keep at most, the newest; None = all.
            source: where the images are from, for people; None = the type of the data set.

        Raises:
            NotFittedError: before `fit`.
            ConfigError: `least` or `newest` below 1, or groups that cannot be merged.
            DataError: a loader or a function that does not give the groups.
            CalibrationError: the loader, its data set, one of its files or more than a tenth of its
                images are those of `fit`; or images of another network are to be merged.
        """
        self.check_fitted()
        how = progress, by, least, merge, newest, source
        calibration, fit = calibration_of(self, loader, *how), self.id_statistics_
        if self.other_network is not None and fit is not None:  # p-values are now those of this one
            network = identify(self.net, self.other_network.image)
            self.id_statistics_, self.other_network = replace(fit, network=network), None
        self.calibration_ = calibration
        return self

    @property
    def calibration_scores_(self) -> NDArray[np.float64] | None:
        """Confidences `[n]` of the calibration images, sorted; None before `calibrate`."""
        return None if self.calibration_ is None else np.sort(self.calibration_.scores)

    def p_values(self, images: Images, groups: Any = None) -> Tensor:
        """Conformal p-values `[B]` of images `[B, C, H, W]`, larger = more in-distribution.

        An ID image that is exchangeable with the calibration images (of its group) has a p-value of
        at most a with a probability of at most a.

        Args:
            images: `[B, C, H, W]`, or one image `[C, H, W]`.
            groups: the group of each image, where the loader of `calibrate` gave groups, or a
                function that a file has not kept.

        Raises:
            CalibrationError: before `calibrate`.
            ConfigError: groups that are missing, unknown, or that are not asked for.

        Source: Bates et al., Annals of Statistics 2023; see `conformal_p_values`.
        """
        calibration = self.check_calibrated()
        given, pred, conf = self._judged(images)
        p = calibration.p_values(conf, calibration.numbers(pred, groups, given.batch))
        return given.results(p.astype(conf.dtype))

    def is_ood(self, images: Images, acceptance: float = 0.95, groups: Any = None) -> Tensor:
        """Verdicts `[B]`, True = OOD, that accept a share `acceptance` of ID images on average.

        Args:
            images: `[B, C, H, W]`, or one image `[C, H, W]`.
            acceptance: share of ID images to accept, in (0, 1); it may change at any time.
            groups: see `p_values`.

        Raises:
            CalibrationError: before `calibrate`, or too few calibration images for it.
            ConfigError: an acceptance outside (0, 1), or groups as in `p_values`.
        """
        calibration = self.check_calibrated()
        thresholds = calibration.thresholds(acceptance)
        given, pred, conf = self._judged(images)
        return given.results(conf < thresholds[calibration.numbers(pred, groups, given.batch)])

    def guarantee(
        self, acceptance: float = 0.95, confidence: float = 0.95, group: int | str | None = None
    ) -> Guarantee:
        """What the calibration images promise for the share of accepted ID images.

        Calibrated by groups, they promise it for each `group`: its name, or the number or name of a
        class.

        Raises:
            ConfigError: a group is missing, unknown, or not asked for.
            CalibrationError: too few images for the acceptance, or for a promise to this group.
        """
        calibration = self.check_calibrated()
        number = self._group_number(calibration, group)
        return calibration.guarantee(acceptance, confidence, number)

    def _group_number(self, calibration: Calibration, group: int | str | None) -> int | None:
        names = self.names_of_groups(calibration)
        if group is None:
            return None
        if names.count(group) > 1:
            raise errors.ConfigError(
                f"several groups are named {group!r}: give the number of a class"
            )
        return names.index(group) if group in names else calibration.number(str(group))

    def names_of_groups(self, calibration: Calibration) -> Sequence[str]:
        """Names of groups, or of classes as far as they are known."""
        names = getattr(self, "class_names", None) if calibration.by == PREDICTED else None
        return names or calibration.names

    def watch(
        self, acceptance: float = 0.95, level: float = 0.01, path: str | Path | None = None
    ) -> Watch:
        """An alarm for drift, to be updated with confidences; its arguments are those of `Watch`.

        Calibrated by groups, it is updated with these, too: the numbers of predicted classes, or
        the names of other groups.

        Raises:
            CalibrationError: before `calibrate`, or too few calibration images for the acceptance.
            ConfigError: what `path` holds is of another calibration, acceptance or level.
        """
        c = self.check_calibrated()
        scores = by_group(c.scores, c.group, c.names) if c.by else c.scores
        return Watch(scores, acceptance, level, path, least=c.least)

    def _begin(self, loader: Iterable[Any]) -> tuple[Any, Tensor | None]:
        begun = super()._begin(loader)
        self.calibration_ = self.other_network = None
        try:
            self.fit_data = weakref.ref(data_of(loader))
        except TypeError:  # a list, whose images are recognised instead
            self.fit_data = None
        return begun

    def known_preprocessing(self) -> Preprocessing:
        """The preprocessing; DataError if it is not set."""
        if not isinstance(self.preprocessing, Preprocessing):
            if self.preprocessing is not None:
                kind = type(self.preprocessing).__name__
                raise errors.DataError(
                    f"detector.preprocessing must be a Preprocessing, got {kind}"
                )
            raise errors.DataError(
                "this detector does not know how its network's images are preprocessed: set "
                "detector.preprocessing, or give tensors as the network takes them"
            )
        return self.preprocessing

    @property
    def _calibrated(self) -> str:
        other = " with other weights" if self.other_network is not None else ""
        return "not calibrated" if self.calibration_ is None else f"{self.calibration_}{other}"

    def check_calibrated(self) -> Calibration:
        self.check_fitted()
        if self.calibration_ is None:
            raise errors.CalibrationError(
                f"this {type(self).__name__} has no calibration images: call calibrate(loader) "
                "with ID images that it was not fitted on"
            )
        return self.calibration_

    def _check(self, scoring: Scoring) -> None:
        scores = scoring.experts.scores
        flat = any(isinstance(score, Energy) and score.temperature == 1 for score in scores)
        if flat and scoring.structure.activation == "log_softmax":
            raise errors.ZeroRangeError(
                f"{type(unwrapped(self.net)).__name__} returns log-probabilities, whose energy is "
                "0 for every image: choose the output expert 'msp', or wrap the network so that "
                "its forward returns what its log_softmax is applied to"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "fit_data": None, "_last": None, "exits": None}
