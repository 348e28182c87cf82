"""What every detector shares: batches, loops, checks."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import Self

from fusenorm_openood.devices import device_of
from fusenorm_openood.errors import DataError, NotFittedError
from fusenorm_openood.listening.batches import batches, checked_images, not_finite


class Scored(NamedTuple):
    """What a detector says of ``N`` images.

    conf: confidences ``[N]``, larger = more in-distribution.
    pred: predicted classes ``[N]``.
    label: labels ``[N]`` as the loader gave them, -1 where it gave none.
    experts: scores of the single experts ``[L, N]``, larger = more in-distribution.
    """

    conf: NDArray[Any]
    pred: NDArray[np.int64]
    label: NDArray[np.int64]
    experts: NDArray[Any]


class ExpertScorer(ABC):
    """Loops, batches and checks; a child says how experts score."""

    experts: tuple[str, ...]
    companions: tuple[str, ...] = ()

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    @abstractmethod
    def _expert_scores(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Expert scores ``[L, B]`` and predicted classes ``[B]`` of images on the net's device."""

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the rows of :attr:`Scored.experts`: the experts and their companions."""
        return (*self.experts, *self.companions)

    def _collect(
        self, loader: Iterable[Any], progress: bool, desc: str
    ) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
        rows, waiting = [], []
        for images, labels in batches(loader, progress, desc):
            scores, pred = self._expert_scores(self._moved(images))
            waiting.append((images, scores, pred, labels))
            # A device scores one batch while the next is loaded and sent to it.
            if scores.device.type == "cpu" or len(waiting) > 1:
                rows.append(self._read(*waiting.pop(0)))
        rows += [self._read(*batch) for batch in waiting]
        if not rows:
            raise DataError(f"the loader gave no batch ({desc}): give it at least one image")
        experts, pred, label = zip(*rows, strict=True)
        return (
            np.concatenate(experts, axis=1),
            np.concatenate(pred).astype(np.int64),
            np.concatenate(label).astype(np.int64),
        )

    def _moved(self, images: Tensor) -> Tensor:
        return images.to(device_of(self.net), non_blocking=True)

    def _read(
        self, images: Tensor, scores: Tensor, pred: Tensor, labels: Any = None
    ) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
        """Scores, predictions and labels of a batch on the host, which waits for the device."""
        experts: NDArray[Any] = scores.cpu().numpy()
        self._check_finite(images, experts)
        label = torch.full_like(pred, -1) if labels is None else torch.as_tensor(labels)
        return experts, pred.cpu().numpy(), label.cpu().numpy()

    def _check_finite(self, images: Tensor, experts: NDArray[Any]) -> None:
        if not np.isfinite(experts).all():
            expert, image = np.argwhere(~np.isfinite(experts))[0]
            what = f"the score {experts[expert, image]} under {self.rows[expert]!r}"
            raise not_finite(images, int(image), what)


class Detector(ExpertScorer):
    """From images to confidences; a child says how experts score and how they make one."""

    @abstractmethod
    def fit(self, loader: Iterable[Any], progress: bool = False) -> Self:
        """Learn from ID images what is normal; see :meth:`score_loader` for the loaders taken."""

    @abstractmethod
    def confidence(self, experts: NDArray[Any]) -> NDArray[Any]:
        """Confidences ``[N]`` from expert scores ``[L, N]``."""

    @abstractmethod
    def _check_fitted(self) -> Any:
        """Raise NotFittedError where :meth:`fit` is still to come."""

    @property
    def is_fitted(self) -> bool:
        """Whether nothing is left to :meth:`fit`."""
        try:
            self._check_fitted()
        except NotFittedError:
            return False
        return True

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted classes ``[B]`` and confidences ``[B]`` of images ``[B, C, H, W]``.

        Both are on the device of the images; confidences are float64 where it has that type.

        Raises:
            NotFittedError: before :meth:`fit`.
            NonFiniteError: NaN or infinity in the images or in the features they give.
        """
        self._check_fitted()
        scores, pred = self._expert_scores(self._moved(checked_images(images)))
        experts, *_ = self._read(images, scores, pred)
        conf = torch.from_numpy(self.confidence(experts))
        conf = conf.float() if images.device.type == "mps" else conf
        return pred.to(images.device), conf.to(images.device)

    def score(self, images: Tensor) -> Tensor:
        """Confidences ``[B]`` of images ``[B, C, H, W]``, larger = more in-distribution."""
        return self.predict(images)[1]

    def score_loader(self, loader: Iterable[Any], progress: bool = False) -> Tensor:
        """Confidences ``[N]``, float64 on the CPU, of all images of a loader.

        A loader gives batches ``(images, labels)``, ``{"data": images, "label": labels}`` or
        images alone. Memory grows by the expert scores only.
        """
        return torch.from_numpy(self.infer(loader, progress).conf).double()

    def infer(self, loader: Iterable[Any], progress: bool = False, desc: str = "score") -> Scored:
        """Confidences, predictions, labels and expert scores of all images of a loader.

        Raises:
            DataError: a loader without images, or a batch of another kind.
        """
        self._check_fitted()
        experts, pred, label = self._collect(loader, progress, desc)
        return Scored(self.confidence(experts), pred, label, experts)
