"""What all detectors share: reading the network at the first images, scores, verdicts."""

import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.detectors.repeats import (
    check_apart,
    data_of,
    distinct_columns,
    projections,
    repeated_columns,
)
from fusenorm_openood.detectors.statistics import DetectorStatistics
from fusenorm_openood.detectors.watch import Watch
from fusenorm_openood.errors import (
    CalibrationError,
    ConfigError,
    DataError,
    NotFittedError,
    TapError,
    ZeroRangeError,
)
from fusenorm_openood.forward.batches import LABELS, Readings, checked_images, not_finite, noting
from fusenorm_openood.forward.experts import BatchScores, Expert, Experts, Fitted, Scoring
from fusenorm_openood.forward.recorded import RecordedLoader, ScoringOf, batch_scores, dealt_out
from fusenorm_openood.kernels.devices import moved
from fusenorm_openood.method.calibration import (
    LEAST,
    PREDICTED,
    Calibrated,
    Calibration,
    group_names,
    listed,
)
from fusenorm_openood.method.conformal import Guarantee, rejects
from fusenorm_openood.method.scores.base import Score
from fusenorm_openood.method.scores.energy import Energy
from fusenorm_openood.network.fingerprint import Fingerprint, identify
from fusenorm_openood.network.running import LazyNetwork, network_errors, unwrapped
from fusenorm_openood.network.structure import Structure
from fusenorm_openood.network.understanding import understand

# Tensors as the network takes them; or, where preprocessing is known, pictures, their files, uint8
# pixels (tensors [C, H, W], arrays [H, W, C], or batches of them), and lists of these.
Images = Tensor | NDArray[np.uint8] | Image.Image | str | Path | Sequence[Any]
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


def known_structure(net: nn.Module, structure: Structure | None) -> Structure | None:
    """How a network is built, as far as that is known before its first images."""
    if structure is None and isinstance(net, LazyNetwork) and net.stored is not None:
        found: Structure = net.stored.structure
        return found
    return structure


def begin(
    net: nn.Module, loader: Iterable[Any], structure: Structure | None, random: str
) -> tuple[Any, Structure, Tensor | None]:
    """Begin to read a loader, and read the network's structure at its first images.

    Returns the loader to be read instead of the given one, the structure, and two images on the
    network's device to try the experts on; None for a recorded loader and a known structure, which
    need no image. TapError for a random network, unless that is allowed; see `Settings`.
    """
    if isinstance(loader, RecordedLoader) and structure is not None:
        check_random(net, structure, random)
        return loader, structure, None
    readings = loader if isinstance(loader, RecordedLoader) else Readings(loader)
    images = moved(net, readings.first[:2])
    structure = understand(net, images)
    check_random(net, structure, random)
    return readings, structure, images


def check_random(net: nn.Module, structure: Structure, random: str) -> None:
    """Raise TapError for a network that is random, or warn if that is allowed."""
    if structure.random:
        name = type(unwrapped(net)).__name__
        text = f"{name} gives other logits for the same images in each pass"
        if random != "allow":
            raise TapError(
                f"{text}, and so would its verdicts: turn off what is random in eval mode "
                "(dropout, noise, random crops), or set random='allow'"
            )
        text = f"{text}: confidences and verdicts are random"
        warnings.warn(text, UserWarning, stacklevel=4)


def identified(net: nn.Module, loader: Any) -> Fingerprint | None:
    """What a network is recognised by; None of one that is only loaded when it is to run."""
    return None if isinstance(net, LazyNetwork) else identify(net, loader.first.shape[1:])


def prepared(
    net: nn.Module, scoring_of: ScoringOf, loaders: Iterable[Any], progress: bool = False
) -> list[Any]:
    """The loaders, of which recorded ones have scored this process's share of their images."""
    dealt = dealt_out(loaders)
    for loader in dealt:
        if isinstance(loader, RecordedLoader):
            scoring = scoring_of(lambda given=loader: moved(net, given.first))  # type: ignore[misc]
            loader.prepare(scoring, progress)
    return dealt


def collect(
    batches: Iterable[BatchScores],
    rows: Sequence[Expert],
    each: Callable[[BatchScores], None] | None = None,
    may_overflow: bool = False,
) -> Scored:
    """Scores `[L, N]` of experts, predictions and labels of all batches, without confidences.

    `each` is called with each batch.

    Raises:
        DataError: there are no images.
        NonFiniteError: a score that is not finite; if these may overflow, an image that is not.
    """
    done: list[tuple[NDArray[Any], ...]] = []
    waiting: list[tuple[Tensor, BatchScores]] = []

    def read(matrix: Tensor, batch: BatchScores) -> None:
        experts = matrix.cpu().numpy()  # waits for the device
        check_finite(batch.images, experts, rows, may_overflow)
        done.append((experts, batch.pred.cpu().numpy(), batch.label))

    for batch in batches:
        if each is not None:
            each(batch)
        waiting.append((batch.matrix(rows), batch))
        # A GPU scores one batch while the next one is loaded and copied to it.
        if batch.pred.device.type == "cpu" or len(waiting) > 1:
            read(*waiting.pop(0))
    for left in waiting:
        read(*left)
    if not done:
        raise DataError("loader must give at least one image, got none")
    experts, pred, label = zip(*done, strict=True)
    pred, label = (np.concatenate(arrays).astype(np.int64) for arrays in (pred, label))
    return Scored(np.empty(0), pred, label, np.concatenate(experts, axis=1))


def check_finite(
    images: Tensor | None,
    scores: NDArray[Any],
    rows: Sequence[Expert],
    may_overflow: bool = False,
) -> None:
    """Raise NonFiniteError for a score of `[L, B]`, or, if these may overflow, an image that is."""
    if may_overflow:
        if images is not None and not (finite := images.flatten(1).isfinite().all(dim=1)).all():
            image = int((~finite).nonzero()[0, 0])
            raise not_finite(images, image, "scores that are not finite")
    elif not np.isfinite(scores).all():
        row, image = np.argwhere(~np.isfinite(scores))[0]
        expert = rows[row]
        name = expert.name if isinstance(expert, Score) else expert[0]
        what = f"the score {scores[row, image]} from expert {name!r}"
        raise not_finite(images, int(image), what)


class Detector(ABC):
    """Turns images into confidences and, after `calibrate`, into p-values and verdicts.

    Args:
        net: any network; it is left unchanged.
        structure: how it is built, if that is known already.
        random: whether the network may be random, `refuse` or `allow`; see `Settings`.

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
    fitted_on = "val"
    calibration_: Calibration | None = None
    preprocessing: Preprocessing | None = None
    id_statistics_: DetectorStatistics | None = None
    _data: Any = None  # a weak reference to what it was fitted on
    _other: Fingerprint | None = None  # of a network that it was neither fitted nor calibrated with

    def __init__(self, net: nn.Module, structure: Structure | None, random: str) -> None:
        self.net, self._random = net, random
        self._structure = known_structure(net, structure)
        self._experts, self._fitted = Experts(), Fitted()
        self._last: Scoring | None = None

    @abstractmethod
    def fit(self: D, loader: Iterable[Any], progress: bool = False) -> D:
        """Fit the detector on ID images; see `score_loader` for the accepted loaders."""

    @abstractmethod
    def confidence(self, experts: NDArray[Any]) -> NDArray[Any]:
        """Confidences `[N]` from expert scores `[L, N]`."""

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

    @property
    def row_names(self) -> tuple[str, ...]:
        """Names of the rows of `Scored.experts`."""
        return self.experts

    @property
    def known_structure(self) -> Structure | None:
        """How the network is built, None before the first images."""
        return self._structure

    def structure(self, images: Tensor) -> Structure:
        """How the network is built, read at the first images `[B, C, H, W]` on its device."""
        if self._structure is None:
            structure = understand(self.net, images)
            check_random(self.net, structure, self._random)
            self._structure = structure
        return self._structure

    def scoring(self, first: Callable[[], Tensor] | None = None) -> Scoring:
        """How images are scored; `first` returns some that show how the network is built.

        It is the same object as long as nothing has changed.

        Raises:
            TapError, ZeroRangeError: the network does not have what an expert needs.
        """
        structure = self._structure
        if structure is None:
            assert first is not None
            structure = self.structure(first())
        last, experts, fitted = self._last, self._experts, self._fitted
        same = last is not None and last.net is self.net and last.structure is structure
        if last is None or not (same and last.experts is experts and last.fitted is fitted):
            check_energy(self.net, structure, experts.scores)
            last = self._last = Scoring(self.net, structure, experts, fitted)
        return last

    def predict(self, images: Images) -> tuple[Tensor, Tensor]:
        """Predicted classes `[B]` and confidences `[B]` of images `[B, C, H, W]`, on their device.

        Of one image `[C, H, W]`, both are without a dimension. Confidences are float64 where that
        is supported.

        Raises:
            NotFittedError: before `fit`.
            NonFiniteError: NaN or infinity in the images or in their features.
            DataError, NetworkError: images of another kind, or that the network fails on.
        """
        self._check_fitted()
        tensor = self._tensor(images)
        experts, pred = self.expert_scores(tensor.unsqueeze(0) if tensor.ndim == 3 else tensor)
        conf = torch.from_numpy(self.confidence(experts))
        conf = (conf.float() if tensor.device.type == "mps" else conf).to(tensor.device)
        predicted = torch.from_numpy(pred).to(tensor.device)
        return (predicted[0], conf[0]) if tensor.ndim == 3 else (predicted, conf)

    def expert_scores(self, images: Tensor) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Scores `[L, B]` of the experts and predicted classes `[B]`; see `predict`."""
        self._check_fitted()
        with network_errors(self.net, checked_images(images)):
            on_device = moved(self.net, images)
            scoring = self.scoring(lambda: on_device)
            batch = scoring.complete(scoring.run(on_device))
        experts = batch.matrix(self.rows).cpu().numpy()
        check_finite(images, experts, self.rows)
        self._check_size(images)
        return experts, batch.pred.cpu().numpy()

    def _check_size(self, images: Tensor) -> None:
        """Warn of images of another size than those of the fit, whose norms are others."""
        network = None if self.id_statistics_ is None else self.id_statistics_.network
        fitted, given = () if network is None else network.image, tuple(images.shape[1:])
        if fitted and tuple(fitted) != given:
            warnings.warn(
                f"images of size {list(given)} are compared with ID statistics of images of size "
                f"{list(fitted)}, from which their norms may differ: resize them, or fit on such",
                UserWarning,
                stacklevel=4,
            )

    def score(self, images: Images) -> Tensor:
        """Confidences `[B]` of images `[B, C, H, W]`, larger = more in-distribution.

        Where `preprocessing` is set, images may also be paths, PIL images, uint8 tensors
        `[B, 3, H, W]` or arrays `[B, H, W, 3]` of any size, or a list of these.
        """
        return self.predict(images)[1]

    def decision_function(self, images: Images) -> NDArray[np.float64]:
        """The confidences `[B]` as an array, as scikit-learn's outlier detectors give them."""
        return np.atleast_1d(self.score(images).double().cpu().numpy())

    def threshold(self, acceptance: float = 0.95, group: int | str | None = None) -> float:
        """The smallest confidence that is accepted, of a group if there are groups.

        Raises:
            CalibrationError: before `calibrate`, or too few calibration images for the acceptance.
            ConfigError: an acceptance outside (0, 1), or a group that is missing or unknown.
        """
        calibration = self._check_calibrated()
        number = self._group_number(calibration, group)
        if calibration.by is not None and number is None:
            raise ConfigError(f"thresholds are by {calibration.by}: give its group")
        return float(calibration.thresholds(acceptance)[number or 0])

    def score_loader(self, loader: Iterable[Any], progress: bool = False) -> Tensor:
        """Confidences `[N]`, float64 on the CPU, of all images of a loader.

        A loader gives batches `(images, labels)`, `{"data": images, "label": labels}` or
        images alone. Memory grows only with the expert scores.
        """
        return torch.from_numpy(self.infer(loader, progress).conf).double()

    def prepare(self, loaders: Iterable[Any], progress: bool = False) -> list[Any]:
        """Let recorded loaders score their images before any is waited for; see `prepared`."""
        return prepared(self.net, self.scoring, loaders, progress)

    def infer(self, loader: Iterable[Any], progress: bool = False, desc: str = "score") -> Scored:
        """Confidences, predictions, labels and expert scores of all images of a loader."""
        self._check_fitted()
        scored = collect(batch_scores(self.net, self.scoring, loader, progress, desc), self.rows)
        return scored._replace(conf=self.confidence(scored.experts))

    def calibrate(
        self: D,
        loader: Iterable[Any],
        progress: bool = False,
        by: str | None = None,
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
                `p_values` and `is_ood` need the groups of their images; None = one group.
            least: the number of images with which a group is compared with itself alone; 19 are
                needed for an acceptance of 95 %, 99 for 99 %.
            merge: whether to keep the images of earlier calls, grouped in the same way.
            newest: how many images to keep at most, the newest; None = all.
            source: where the images are from, for people; None = the type of the data set.

        Raises:
            NotFittedError: before `fit`.
            ConfigError: `least` or `newest` below 1, or groups that cannot be merged.
            DataError: a loader that does not give the groups.
            CalibrationError: the loader, its data set, one of its files or more than a tenth of its
                images are those of `fit`; or images of another network are to be merged.
        """
        self._check_fitted()
        for name, number in (("least", least), ("newest", newest)):
            if number is not None and number < 1:
                raise ConfigError(f"{name} must be >= 1, got {number}")
        if merge and self._other is not None:
            raise CalibrationError(
                "the calibration images were scored by other weights, and cannot be merged with "
                "new ones: calibrate without merge"
            )
        if merge and self.calibration_ is not None:
            self.calibration_.check_mergeable(by)
        fitted_on = self._data and self._data()
        if fitted_on is not None:
            check_apart(fitted_on, data_of(loader))
        marks: list[NDArray[np.float64]] = []
        given: list[str] = []

        def mark(batch: BatchScores) -> None:
            marks.append(projections(batch.features if batch.images is None else [batch.images]))

        noted = by not in (None, PREDICTED, *LABELS)
        images = noting(loader, str(by), given) if noted else loader
        batches = batch_scores(self.net, self.scoring, images, progress, "calibrate")
        # Two images may well have a single score in common.
        scored = collect(batches, self.rows, mark if len(self.experts) == 1 else None)
        conf = self.confidence(scored.experts).astype(np.float64)
        if (fit := self.id_statistics_) is not None:
            layers = len(fit.layers)  # others may score the images of their fit in another way
            repeated = repeated_columns(fit.id_scores[:layers], scored.experts[:layers])
            if repeated > REPEATED * len(conf):
                raise CalibrationError(
                    f"{repeated} of {len(conf)} calibration images are among those that the "
                    "detector is fitted on: give ID images that it has not seen"
                )
        names, group = self._groups(scored, by, given)
        told = [scored.experts[: len(self.experts)], *([np.hstack(marks)] if marks else [])]
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        source = type(data_of(loader)).__name__ if source is None else source
        history = (Calibrated(now, len(conf), source),)
        new = Calibration(
            conf, np.vstack(told).astype(np.float64), history, by, names, group, least
        )
        if merge and self.calibration_ is not None:
            new = self.calibration_.then(new)
        first = np.sort(distinct_columns(new.marks))
        if len(first) < len(new):
            warnings.warn(
                f"{len(new) - len(first)} of {len(new)} calibration images repeat others: "
                f"p-values and the guarantee are those of the {len(first)} distinct images",
                UserWarning,
                stacklevel=2,
            )
        new = new.keep(first if newest is None else first[-newest:])
        if pooled := new.pooled:
            warnings.warn(
                f"{len(pooled)} of {len(new.names)} groups by {by} have fewer than {least} "
                f"calibration images, so theirs are compared with the {len(new.cells[-1])} of "
                f"{'such' if new.is_pooled else 'all'} groups, and nothing is promised for one of "
                f"them alone: {listed([self._group_names(new)[number] for number in pooled])}",
                UserWarning,
                stacklevel=2,
            )
        if self._other is not None and fit is not None:  # p-values are now those of this network
            network = identify(self.net, self._other.image)
            self.id_statistics_, self._other = replace(fit, network=network), None
        self.calibration_ = new
        return self

    def _groups(
        self, scored: Scored, by: str | None, given: Sequence[str]
    ) -> tuple[tuple[str, ...], NDArray[np.int64]]:
        """Names of the groups, and the number of each image's group."""
        if by is None:
            return ("all",), np.zeros_like(scored.pred)
        if by == PREDICTED:
            assert self._structure is not None
            return tuple(map(str, range(self._structure.classes))), scored.pred
        if by in LABELS:
            if (scored.label < 0).any():
                raise DataError(f"by={by!r} needs a loader that gives labels >= 0")
            given = group_names(scored.label)
        names, group = np.unique(given, return_inverse=True)
        return tuple(names.tolist()), group.astype(np.int64)

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
            groups: the group of each image, where the loader of `calibrate` gave groups.

        Raises:
            CalibrationError: before `calibrate`.
            ConfigError: groups that are missing, unknown, or that are not asked for.

        Source: Bates et al., Annals of Statistics 2023; see `conformal_p_values`.
        """
        calibration = self._check_calibrated()
        pred, conf = self.predict(images)
        group = calibration.numbers(np.atleast_1d(pred.cpu().numpy()), groups)
        p = calibration.p_values(np.atleast_1d(conf.cpu().numpy()), group)
        return torch.from_numpy(p).reshape(conf.shape).to(conf)

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
        self._check_calibrated().check_enough(acceptance)
        p = self.p_values(images, groups)
        rejected = rejects(p.cpu().numpy(), acceptance)
        return torch.from_numpy(np.asarray(rejected)).to(p.device)

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
        calibration = self._check_calibrated()
        number = self._group_number(calibration, group)
        return calibration.guarantee(acceptance, confidence, number)

    def _group_number(self, calibration: Calibration, group: int | str | None) -> int | None:
        names = self._group_names(calibration)
        if group is None:
            return None
        if names.count(group) > 1:
            raise ConfigError(f"several groups are named {group!r}: give the number of a class")
        return names.index(group) if group in names else calibration.number(str(group))

    def _group_names(self, calibration: Calibration) -> Sequence[str]:
        """Names of groups, or of classes as far as they are known."""
        names = getattr(self, "class_names", None) if calibration.by == PREDICTED else None
        return names or calibration.names

    def watch(
        self, acceptance: float = 0.95, level: float = 0.01, path: str | Path | None = None
    ) -> Watch:
        """An alarm for drift, to be updated with confidences; its arguments are those of `Watch`.

        Raises:
            CalibrationError: before `calibrate`, or too few calibration images for the acceptance.
            ConfigError: what `path` holds is of another calibration, acceptance or level.
        """
        return Watch(self._check_calibrated().scores, acceptance, level, path)

    def _begin(self, loader: Iterable[Any]) -> tuple[Any, Tensor | None]:
        """Begin a fit: the loader to be read, and images to try the experts on; see `begin`."""
        readings, self._structure, images = begin(self.net, loader, self._structure, self._random)
        self.calibration_ = self._other = None
        try:
            self._data = weakref.ref(data_of(loader))
        except TypeError:  # a list, whose images are recognised instead
            self._data = None
        return readings, images

    def known_preprocessing(self) -> Preprocessing:
        """The preprocessing; DataError if it is not set."""
        if self.preprocessing is None:
            raise DataError(
                "this detector does not know how its network's images are preprocessed: set "
                "detector.preprocessing, or give tensors as the network takes them"
            )
        return self.preprocessing

    @property
    def _calibrated(self) -> str:
        other = " with other weights" if self._other is not None else ""
        return "not calibrated" if self.calibration_ is None else f"{self.calibration_}{other}"

    def _tensor(self, images: Images) -> Tensor:
        """Images that may be given in other ways; see `Images`."""
        if isinstance(images, list | tuple):
            tensors = [self._tensor(image) for image in images]
            if len({tensor.shape for tensor in tensors}) != 1:
                shapes = [list(tensor.shape) for tensor in tensors[:3]]
                raise DataError(f"a list must have images of one size, got {shapes or 'none'}")
            return torch.stack(tensors)
        if isinstance(images, Tensor) and images.dtype == torch.uint8 and images.ndim > 2:
            images = images.movedim(-3, -1).cpu().numpy()
        if isinstance(images, np.ndarray) and images.dtype == np.uint8:
            if images.ndim == 4:
                return self._tensor(list(images))
            grey = images[..., 0] if images.ndim == 3 and images.shape[-1] == 1 else images
            if grey.ndim != 2 and grey.shape[2:] != (3,):
                raise DataError(
                    "uint8 images must be arrays [H, W, 3] or [H, W], or tensors [3, H, W], got "
                    f"pixels [H, W, C] of shape {list(images.shape)}: give files, or tensors as "
                    "the network takes them"
                )
            images = Image.fromarray(grey)
        if isinstance(images, str | Path):
            return self.known_preprocessing().read(images)
        if isinstance(images, Image.Image):
            return self.known_preprocessing()(images)
        return images if isinstance(images, Tensor) else checked_images(images)

    def _check_calibrated(self) -> Calibration:
        self._check_fitted()
        if self.calibration_ is None:
            raise CalibrationError(
                f"this {type(self).__name__} has no calibration images: call calibrate(loader) "
                "with ID images that it was not fitted on"
            )
        return self.calibration_

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_data": None, "_last": None, "_exits": None}


def check_energy(net: nn.Module, structure: Structure, scores: Iterable[Score]) -> None:
    """Raise ZeroRangeError for an energy of log-probabilities, which is 0 for every image."""
    flat = any(isinstance(score, Energy) and score.temperature == 1 for score in scores)
    if flat and structure.activation == "log_softmax":
        raise ZeroRangeError(
            f"{type(unwrapped(net)).__name__} returns log-probabilities, whose energy is 0 for "
            "every image: choose the output expert 'msp', or wrap the network so that its forward "
            "returns what its log_softmax is applied to"
        )
