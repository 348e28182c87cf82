"""What all detectors share: the network's structure, loops over loaders, checks, verdicts."""

import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from fusenorm_openood.detectors.repeats import check_apart, data_of, distinct_columns, projections
from fusenorm_openood.errors import (
    CalibrationError,
    DataError,
    NotFittedError,
    TapError,
    ZeroRangeError,
)
from fusenorm_openood.forward.batches import Readings, checked_images, not_finite
from fusenorm_openood.forward.experts import BatchScores, Expert, Experts, Fitted, Scoring
from fusenorm_openood.forward.loops import Recorder, batch_scores
from fusenorm_openood.forward.recorded import dealt_out
from fusenorm_openood.kernels.devices import moved
from fusenorm_openood.method.conformal import (
    Guarantee,
    check_enough,
    conformal_p_values,
    guarantee,
    rejects,
)
from fusenorm_openood.method.scores.base import Score
from fusenorm_openood.method.scores.energy import Energy
from fusenorm_openood.network.fingerprint import Fingerprint, identify
from fusenorm_openood.network.running import LazyNetwork, network_errors, unwrapped
from fusenorm_openood.network.structure import Structure
from fusenorm_openood.network.understanding import understand

Images = Tensor | Image.Image | str | Path  # the last three where preprocessing is known
REPEATED = 0.1  # share of calibration images that may look like images of the fit
D = TypeVar("D", bound="Detector")


class Scored(NamedTuple):
    """Results of a detector on `N` images.

    Attributes:
        conf: confidences `[N]`, larger = more in-distribution.
        pred: predicted classes `[N]`.
        label: labels `[N]` from the loader, -1 where it gives none.
        experts: scores of the experts `[L, N]`, larger = more in-distribution.
    """

    conf: NDArray[Any]
    pred: NDArray[np.int64]
    label: NDArray[np.int64]
    experts: NDArray[Any]


class ExpertScorer(ABC):
    """A network whose images are scored by experts.

    Args:
        net: any network; it is left unchanged.
        structure: how it is built, if that is known already.
        random: whether the network may be random, `refuse` or `allow`; see `Settings`.
    """

    def __init__(
        self, net: nn.Module, structure: Structure | None = None, random: str = "refuse"
    ) -> None:
        self.net, self._random = net, random
        if structure is None and isinstance(net, LazyNetwork) and net.stored is not None:
            structure = net.stored.structure
        self._structure = structure
        self._last: Scoring | None = None

    @property
    def known_structure(self) -> Structure | None:
        """How the network is built, None before the first images."""
        return self._structure

    def structure(self, images: Tensor) -> Structure:
        """How the network is built, read at the first images `[B, C, H, W]` on its device."""
        if self._structure is None:
            structure = understand(self.net, images)
            self._check_structure(structure)
            self._structure = structure
        return self._structure

    @abstractmethod
    def scoring(self, images: Tensor | None = None) -> Scoring:
        """How images `[B, C, H, W]` on the network's device are scored.

        They tell how the network is built; None once that is known.
        """

    def _scoring(self, experts: Experts, fitted: Fitted, images: Tensor | None) -> Scoring:
        """How these experts score images; the same object as long as nothing has changed."""
        structure, last = self._known(images), self._last
        same = last is not None and last.net is self.net and last.structure is structure
        if last is None or not (same and last.experts is experts and last.fitted is fitted):
            last = self._last = Scoring(self.net, structure, experts, fitted)
        return last

    def _known(self, images: Tensor | None) -> Structure:
        """The structure, read at images if it is not known yet."""
        assert images is not None or self._structure is not None
        return self._structure if images is None else self.structure(images)  # type: ignore

    def _check_structure(self, structure: Structure) -> None:
        """Raise TapError for a network that is random, or warn if that is allowed."""
        if structure.random:
            name = type(unwrapped(self.net)).__name__
            text = f"{name} gives other logits for the same images in each pass"
            if self._random != "allow":
                raise TapError(
                    f"{text}, and so would its verdicts: turn off what is random in eval mode "
                    "(dropout, noise, random crops), or set random='allow'"
                )
            text = f"{text}: confidences and verdicts are random"
            warnings.warn(text, UserWarning, stacklevel=4)

    def _begin(self, loader: Iterable[Any]) -> Any:
        """Read the network's structure at a loader's first images, and try all experts on them.

        A recorded loader does without if the structure is known.

        Returns:
            The loader, to be read instead of it.
        """
        if isinstance(loader, Recorder) and self._structure is not None:
            self._check_structure(self._structure)
            return loader
        readings = loader if isinstance(loader, Recorder) else Readings(loader)
        images = moved(self.net, readings.first[:2])
        self._structure = None
        self._try(images)
        return readings

    def _try(self, images: Tensor) -> None:
        """Score two images, so that what cannot work fails before a loader is read."""
        scoring = self.scoring(images)
        clips = {q: float("inf") for q in scoring.experts.percentiles}
        replace(scoring, fitted=Fitted(clips)).run(images)

    def _identified(self, loader: Any) -> Fingerprint | None:
        """What the network is recognised by; None of one that is only loaded when it is to run."""
        if isinstance(self.net, LazyNetwork):
            return None
        return identify(self.net, loader.first.shape[1:])

    def prepare(self, loaders: Iterable[Any], progress: bool = False) -> list[Any]:
        """Let recorded loaders score their images, each process its share, before any waits.

        Returns:
            The loaders, recorded or not, to be read instead.
        """
        dealt = dealt_out(loaders)
        for loader in dealt:
            if isinstance(loader, Recorder):
                self._read_first(loader)
                loader.prepare(self.scoring(), progress)
        return dealt

    def _read_first(self, loader: Iterable[Any]) -> None:
        """Read the structure at the first images of a recorded loader, unless it is known."""
        if isinstance(loader, Recorder) and self._structure is None:
            self.structure(moved(self.net, loader.first))

    def collect(
        self,
        scoring_of: Callable[[Tensor | None], Scoring],
        loader: Iterable[Any],
        rows: Sequence[Expert],
        progress: bool,
        desc: str,
        each: Callable[[BatchScores], None] | None = None,
    ) -> Scored:
        """Scores `[L, N]` of experts, predictions and labels of a loader's images.

        Args:
            scoring_of: see `batch_scores`.
            loader: images; see `Detector.score_loader`.
            rows: the experts.
            progress, desc: the progress bar.
            each: called with each batch.

        Raises:
            DataError: a loader without images, or an unknown kind of batch.
            NonFiniteError: a score that is not finite.
            NetworkError: the network fails on images.
        """
        self._read_first(loader)
        done: list[tuple[NDArray[Any], ...]] = []
        waiting: list[tuple[Tensor, BatchScores]] = []

        def read(matrix: Tensor, batch: BatchScores) -> None:
            experts = matrix.cpu().numpy()  # waits for the device
            self._check_finite(batch.images, experts, rows)
            done.append((experts, batch.pred.cpu().numpy(), batch.label))

        for batch in batch_scores(self.net, scoring_of, loader, progress, desc):
            if each is not None:
                each(batch)
            waiting.append((batch.matrix(rows), batch))
            # A GPU scores one batch while the next one is loaded and copied to it.
            if batch.pred.device.type == "cpu" or len(waiting) > 1:
                read(*waiting.pop(0))
        for left in waiting:
            read(*left)
        if not done:
            raise DataError(f"loader must give at least one image, got none ({desc})")
        experts, pred, label = zip(*done, strict=True)
        pred, label = (np.concatenate(arrays).astype(np.int64) for arrays in (pred, label))
        return Scored(np.empty(0), pred, label, np.concatenate(experts, axis=1))

    def _check_finite(
        self, images: Tensor | None, experts: NDArray[Any], rows: Sequence[Expert]
    ) -> None:
        if not np.isfinite(experts).all():
            row, image = np.argwhere(~np.isfinite(experts))[0]
            expert = rows[row]
            name = expert.name if isinstance(expert, Score) else expert[0]
            what = f"the score {experts[row, image]} from expert {name!r}"
            raise not_finite(images, int(image), what)


class Detector(ExpertScorer):
    """Turns images into confidences and, after `calibrate`, into p-values and verdicts.

    Attributes:
        experts: names of the experts.
        fitted_on: the ID images of a benchmark that it is fitted on, `val` or `train`.
        calibration_scores_: confidences `[n]` of the calibration images, sorted; None before
            `calibrate`.
    """

    experts: tuple[str, ...] = ()
    fitted_on = "val"
    calibration_scores_: NDArray[np.float64] | None = None
    _data: Any = None  # a weak reference to what it was fitted on

    @abstractmethod
    def fit(self: D, loader: Iterable[Any], progress: bool = False) -> D:
        """Fit the detector on ID images; see `score_loader` for the accepted loaders."""

    @abstractmethod
    def confidence(self, experts: NDArray[Any]) -> NDArray[Any]:
        """Confidences `[N]` from expert scores `[L, N]`."""

    @abstractmethod
    def rows(self) -> list[Expert]:
        """The experts, in the order of `Scored.experts`."""

    @property
    def row_names(self) -> tuple[str, ...]:
        """Names of the rows of `Scored.experts`."""
        return self.experts

    @abstractmethod
    def _check_fitted(self) -> Any:
        """Raise NotFittedError if `fit` has to be called first."""

    @property
    def is_fitted(self) -> bool:
        """Whether the detector can score without a further call of `fit`."""
        try:
            self._check_fitted()
        except NotFittedError:
            return False
        return True

    def predict(self, images: Images) -> tuple[Tensor, Tensor]:
        """Predicted classes `[B]` and confidences `[B]` of images `[B, C, H, W]`.

        Of one image `[C, H, W]`, both are without a dimension. They are on the device of the
        images; confidences are float64 where it is supported.

        Raises:
            NotFittedError: before `fit`.
            NonFiniteError: NaN or infinity in the images or in their features.
            DataError: images of another kind.
            NetworkError: the network fails on them.
        """
        self._check_fitted()
        tensor = self._images(images)
        experts, pred = self.expert_scores(tensor.unsqueeze(0) if tensor.ndim == 3 else tensor)
        conf = torch.from_numpy(self.confidence(experts))
        conf = (conf.float() if tensor.device.type == "mps" else conf).to(tensor.device)
        predicted = torch.from_numpy(pred).to(tensor.device)
        return (predicted[0], conf[0]) if tensor.ndim == 3 else (predicted, conf)

    def expert_scores(self, images: Tensor) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Scores `[L, B]` of the experts and predicted classes `[B]` of images `[B, C, H, W]`.

        Raises:
            NotFittedError, NonFiniteError, DataError, NetworkError: as in `predict`.
        """
        self._check_fitted()
        with network_errors(self.net, checked_images(images)):
            on_device = moved(self.net, images)
            batch = self.scoring(on_device)(on_device)
        rows = self.rows()
        experts = batch.matrix(rows).cpu().numpy()
        self._check_finite(images, experts, rows)
        return experts, batch.pred.cpu().numpy()

    def score(self, images: Images) -> Tensor:
        """Confidences `[B]` of images `[B, C, H, W]`, larger = more in-distribution."""
        return self.predict(images)[1]

    def score_loader(self, loader: Iterable[Any], progress: bool = False) -> Tensor:
        """Confidences `[N]`, float64 on the CPU, of all images of a loader.

        A loader gives batches `(images, labels)`, `{"data": images, "label": labels}` or
        images alone. Memory grows only with the expert scores.
        """
        return torch.from_numpy(self.infer(loader, progress).conf).double()

    def infer(self, loader: Iterable[Any], progress: bool = False, desc: str = "score") -> Scored:
        """Confidences, predictions, labels and expert scores of all images of a loader.

        Raises:
            DataError: a loader without images, or an unknown kind of batch.
            NetworkError: the network fails on images.
        """
        self._check_fitted()
        scored = self.collect(self.scoring, loader, self.rows(), progress, desc)
        return scored._replace(conf=self.confidence(scored.experts))

    def calibrate(self: D, loader: Iterable[Any], progress: bool = False) -> D:
        """Score ID images that neither trained the network nor fitted the detector.

        Their confidences are what p-values compare an image with. The confidences themselves do
        not change. Images that repeat each other are counted once, with a warning, because p-values
        need images that are drawn independently.

        Raises:
            NotFittedError: before `fit`.
            CalibrationError: the loader, its data set, one of its files or more than a tenth of its
                images are those of `fit`.
            DataError, NonFiniteError: as in `infer`.
        """
        self._check_fitted()
        fitted_on = self._data and self._data()
        if fitted_on is not None:
            check_apart(fitted_on, data_of(loader))
        marks: list[NDArray[np.float64]] = []

        def mark(batch: BatchScores) -> None:
            given = batch.features if batch.images is None else [batch.images]
            marks.append(projections(given))

        # Two images may well have a single score in common.
        each = mark if len(self.experts) == 1 else None
        scored = self.collect(self.scoring, loader, self.rows(), progress, "calibrate", each)
        conf = self.confidence(scored.experts).astype(np.float64)
        repeated = self._repeated(scored.experts)
        if repeated > REPEATED * len(conf):
            raise CalibrationError(
                f"{repeated} of {len(conf)} calibration images are among those that the "
                "detector is fitted on: give ID images that it has not seen"
            )
        told = np.concatenate([scored.experts, *([np.concatenate(marks, axis=1)] if marks else [])])
        first = distinct_columns(told) if len(told) > 1 else np.arange(len(conf))
        if len(first) < len(conf):
            warnings.warn(
                f"{len(conf) - len(first)} of {len(conf)} calibration images repeat others: "
                f"p-values and the guarantee are those of the {len(first)} distinct images",
                UserWarning,
                stacklevel=2,
            )
        self.calibration_scores_ = np.sort(conf[first])
        return self

    def p_values(self, images: Images) -> Tensor:
        """Conformal p-values `[B]` of images `[B, C, H, W]`, larger = more in-distribution.

        An ID image that is exchangeable with the calibration images has a p-value of at most a
        with a probability of at most a.

        Raises:
            CalibrationError: before `calibrate`.
            NonFiniteError: NaN or infinity in the images or in their features.

        Source: Bates et al., Annals of Statistics 2023; see `conformal_p_values`.
        """
        calibration = self._check_calibrated()
        conf = self.score(images)
        p = conformal_p_values(conf.cpu().numpy(), calibration)
        return torch.from_numpy(np.asarray(p)).to(conf)

    def is_ood(self, images: Images, acceptance: float = 0.95) -> Tensor:
        """Verdicts `[B]`, True = OOD, that accept a share `acceptance` of ID images on average.

        Args:
            images: `[B, C, H, W]`, or one image `[C, H, W]`.
            acceptance: share of ID images to accept, in (0, 1); it may change at any time.

        Raises:
            CalibrationError: before `calibrate`, or too few calibration images for it.
            ConfigError: an acceptance outside (0, 1).
        """
        check_enough(len(self._check_calibrated()), acceptance)
        p = self.p_values(images)
        rejected = rejects(p.cpu().numpy(), acceptance)
        return torch.from_numpy(np.asarray(rejected)).to(p.device)

    def guarantee(self, acceptance: float = 0.95, confidence: float = 0.95) -> Guarantee:
        """What the calibration images promise for the share of accepted ID images.

        Raises:
            CalibrationError: before `calibrate`, or too few calibration images.
            ConfigError: an acceptance or a confidence outside (0, 1).
        """
        return guarantee(len(self._check_calibrated()), acceptance, confidence)

    def _begin(self, loader: Iterable[Any]) -> Any:
        begun = super()._begin(loader)
        self.calibration_scores_ = None
        try:
            self._data = weakref.ref(data_of(loader))
        except TypeError:  # a list, whose images are recognised instead
            self._data = None
        return begun

    def _images(self, images: Images) -> Tensor:
        """The tensor of images that are given in another form; a subclass may know how."""
        return checked_images(images) if not isinstance(images, Tensor) else images

    def _repeated(self, experts: NDArray[Any]) -> int:
        """How many images with these expert scores `[L, N]` were in the fit, as far as known."""
        return 0

    def _check_calibrated(self) -> NDArray[np.float64]:
        self._check_fitted()
        if self.calibration_scores_ is None:
            raise CalibrationError(
                f"this {type(self).__name__} has no calibration images: call calibrate(loader) "
                "with ID images that it was not fitted on"
            )
        return self.calibration_scores_

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_data": None}


def check_energy(net: nn.Module, structure: Structure, scores: Iterable[Score]) -> None:
    """Raise ZeroRangeError for an energy of log-probabilities, which is 0 for every image."""
    flat = any(isinstance(score, Energy) and score.temperature == 1 for score in scores)
    if flat and structure.activation == "log_softmax":
        raise ZeroRangeError(
            f"{type(unwrapped(net)).__name__} returns log-probabilities, whose energy is 0 for "
            "every image: choose the output expert 'msp', or wrap the network so that its forward "
            "returns what its log_softmax is applied to"
        )
