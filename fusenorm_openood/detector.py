"""FuseNorm, the detector: any torch network, no OpenOOD."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm
from typing_extensions import Self

from fusenorm_openood.atf import atf
from fusenorm_openood.errors import ConfigError, DataError, NonFiniteError, NotFittedError, TapError
from fusenorm_openood.experts import DEFAULT_TEMPERATURE, odin_perturb, score_logits
from fusenorm_openood.forward import Pass, device_of, final_linear, forward_pass
from fusenorm_openood.fusion import fuse
from fusenorm_openood.settings import Settings
from fusenorm_openood.statistics import (
    ActivationSample,
    IDStatistics,
    compute_id_statistics,
    normalise,
)
from fusenorm_openood.taps import first_of_last_stage, resolve_taps, undisturbed


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


class Detector(ABC):
    """Loops, batches and checks; a child says how experts score and how a confidence is made."""

    experts: tuple[str, ...]
    companions: tuple[str, ...] = ()

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    @abstractmethod
    def fit(self, loader: Iterable[Any], progress: bool = False) -> Self:
        """Learn from ID images what is normal; see :meth:`score_loader` for the loaders taken."""

    @abstractmethod
    def _expert_scores(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Expert scores ``[L, B]`` and predicted classes ``[B]`` of images on the net's device."""

    @abstractmethod
    def _confidence(self, experts: NDArray[Any]) -> NDArray[Any]:
        """Confidences ``[N]`` from expert scores ``[L, N]``."""

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the rows of :attr:`Scored.experts`: the experts and their companions."""
        return (*self.experts, *self.companions)

    @abstractmethod
    def _check_fitted(self) -> Any:
        """Raise NotFittedError where :meth:`fit` is still to come."""

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted classes ``[B]`` and confidences ``[B]`` of images ``[B, C, H, W]``.

        Both are on the device of the images; confidences are float64 where it has that type.

        Raises:
            NotFittedError: before :meth:`fit`.
            NonFiniteError: NaN or infinity in the images or in the features they give.
        """
        self._check_fitted()
        experts, pred = self._checked_scores(images)
        conf = torch.from_numpy(self._confidence(experts))
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
        return Scored(self._confidence(experts), pred, label, experts)

    def _collect(
        self, loader: Iterable[Any], progress: bool, desc: str
    ) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
        rows = []
        for images, labels in batches(loader, progress, desc):
            experts, pred = self._checked_scores(images)
            label = torch.full_like(pred, -1) if labels is None else torch.as_tensor(labels)
            rows.append((experts, pred.cpu().numpy(), label.cpu().numpy()))
        if not rows:
            raise DataError(f"the loader gave no batch ({desc}): give it at least one image")
        experts, pred, label = zip(*rows, strict=True)
        return (
            np.concatenate(experts, axis=1),
            np.concatenate(pred).astype(np.int64),
            np.concatenate(label).astype(np.int64),
        )

    def _checked_scores(self, images: Tensor) -> tuple[NDArray[Any], Tensor]:
        scores, pred = self._expert_scores(images.to(device_of(self.net), non_blocking=True))
        experts: NDArray[Any] = scores.cpu().numpy()  # the one time a batch waits for the device
        finite = np.isfinite(experts)
        if not finite.all():
            expert, image = np.argwhere(~finite)[0]
            where = "image" if not torch.isfinite(images[image]).all() else "network"
            way_out = {
                "image": "the image itself holds NaN or infinity: repair or leave out that image",
                "network": "the image is finite, so the network overflows: look at its weights",
            }
            raise NonFiniteError(
                f"image {image} of the batch has the score {experts[expert, image]} under "
                f"{self.rows[expert]!r}; {way_out[where]}"
            )
        return experts, pred

    def _react_threshold(self, loader: Iterable[Any], percentile: float, progress: bool) -> float:
        """Percentile of the penultimate activations of ID images, where ReAct clips."""
        sample = ActivationSample()
        with undisturbed(self.net), torch.no_grad():
            for images, _ in batches(loader, progress, "ReAct"):
                first = forward_pass(self.net, images.to(device_of(self.net), non_blocking=True))
                if first.feature is None or (sample.is_empty and not self._head_gives(first)):
                    raise self._no_head()
                sample.update(first.feature.float().cpu().numpy())
        return sample.percentile(percentile)

    def _head_gives(self, first: Pass) -> bool:
        """Whether the final linear layer, and nothing behind it, makes the logits."""
        head = final_linear(self.net)
        return (
            head is not None
            and first.feature is not None
            and first.logits.shape == (len(first.feature), head.out_features)
            and torch.allclose(head(first.feature), first.logits, rtol=1e-3, atol=1e-4)
        )

    def _react(self, done: Pass, threshold: float | None) -> Tensor:
        """Logits of a pass, its penultimate feature clipped at the threshold, if there is one."""
        if threshold is None:
            return done.logits
        head = final_linear(self.net)
        if head is None or done.feature is None:
            raise self._no_head()
        logits: Tensor = head(done.feature.clamp(max=threshold))
        return logits

    def _no_head(self) -> TapError:
        return TapError(
            f"ReAct needs a final linear layer that gives the logits, and "
            f"{type(self.net).__name__} has none: choose react_percentile=None"
        )


def batches(
    loader: Iterable[Any], progress: bool = False, desc: str = ""
) -> Iterator[tuple[Tensor, Any]]:
    """Images and labels (or None) of each batch, whatever kind of batch the loader gives."""
    for batch in _told_plainly(tqdm(loader, desc=desc, disable=not progress, leave=False)):
        if isinstance(batch, dict):
            images, labels = batch.get("data"), batch.get("label")
        elif isinstance(batch, tuple | list) and len(batch) >= 1:
            images, labels = batch[0], batch[1] if len(batch) > 1 else None
        else:
            images, labels = batch, None
        if not isinstance(images, Tensor) or images.ndim != 4:
            found = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise DataError(
                f"a batch holds {found} in the place of images [B, C, H, W]: give batches "
                "(images, labels), {'data': images, 'label': labels} or images alone"
            )
        if len(images):
            yield images, labels


def _told_plainly(loader: Iterable[Any]) -> Iterator[Any]:
    """A loader whose worker processes wrap no traceback around an error of ours."""
    try:
        yield from loader
    except DataError as error:
        sentence = str(error).rstrip().splitlines()[-1]
        prefix = f"{DataError.__module__}.{DataError.__name__}: "
        raise DataError(sentence.removeprefix(prefix)) from None


@dataclass(frozen=True)
class Calibration:
    """What :meth:`FuseNorm.fit` learns; needs no network, and pickles."""

    experts: tuple[str, ...]
    react_threshold: float | None
    id_scores: NDArray[np.float64]
    statistics: IDStatistics


class FuseNorm(Detector):
    """OOD detector that fuses feature norms of all residual blocks with an output expert.

    >>> detector = FuseNorm(net, alpha=0.5).fit(id_loader)  # doctest: +SKIP
    >>> confidence = detector.score(images)                 # doctest: +SKIP

    Args:
        net: any network that returns logits ``[B, K]``; it stays as it is.
        settings: all settings at once; None = the published ones.
        changes: single settings by name; see :class:`Settings`.

    Attributes:
        experts: names of the experts: the taps in their order, and ``"output"``.
        strong: names of the strong experts; the others are weak.
        calibration_: ID statistics, after :meth:`fit`.

    Raises:
        ConfigError, TapError: settings that do not fit the network.
    """

    def __init__(self, net: nn.Module, settings: Settings | None = None, **changes: Any) -> None:
        super().__init__(net)
        self.settings = (settings or Settings()).replace(**changes)
        self.taps = resolve_taps(net, self.settings.taps)
        self.experts = (*self.taps, "output")
        self.strong = self._resolve_strong()
        self.calibration_: Calibration | None = None
        self._threshold: float | None = None

    def fit(self, loader: Iterable[Any], progress: bool = False) -> Self:
        """Fit the ID statistics on ID images that are neither trained nor tested on, if possible.

        The loader is read twice where ReAct needs a threshold first, so it must not be an
        iterator that runs dry.

        Raises:
            ZeroRangeError: an expert that gives all ID images the same score.
            DataError, NonFiniteError, TapError: images or a network that give no scores.
        """
        self.calibration_ = None
        percentile = self.settings.react_percentile
        self._threshold = (
            None if percentile is None else self._react_threshold(loader, percentile, progress)
        )
        id_scores = self._collect(loader, progress, "fit")[0][: len(self.experts)]
        self.calibration_ = calibrate(self.experts, id_scores, self._threshold, self.settings)
        return self

    def with_calibration(self, calibration: Calibration) -> Self:
        """Take the ID statistics of an earlier fit on the same network instead of fitting."""
        if calibration.experts != self.experts:
            raise ConfigError(
                f"a calibration of {', '.join(calibration.experts)} found for a detector of "
                f"{', '.join(self.experts)}: fit again"
            )
        self._threshold, self.calibration_ = calibration.react_threshold, calibration
        return self

    def with_companions(self) -> Self:
        """Also score the output experts that come free with the forward pass, for comparison.

        They take no part in the fusion; their scores follow those of the experts in
        :attr:`Scored.experts`, under the names in :attr:`companions`.
        """
        free = ("msp", "mls", "energy")
        clipped = (
            () if self.settings.react_percentile is None else tuple(f"{e}+react" for e in free)
        )
        self.companions = (*free, *clipped)
        return self

    def _expert_scores(self, images: Tensor) -> tuple[Tensor, Tensor]:
        s = self.settings
        reduce = partial(atf, k_min=s.k_min, k_max=s.k_max, alpha=s.alpha, eps=s.eps)
        temperature = s.effective_temperature
        with undisturbed(self.net):
            if s.needs_gradient:
                # One pass for the taps and for the gradient, which stops at the image.
                with torch.inference_mode(False), torch.enable_grad():
                    leaf = images.detach().clone().requires_grad_()
                    first = forward_pass(self.net, leaf, self.taps, reduce)
                    logits = self._react(first, self._threshold)
                    images = odin_perturb(leaf, logits, temperature, s.noise, s.input_std)
                with torch.no_grad():
                    logits = self._react(forward_pass(self.net, images), self._threshold)
            else:
                with torch.no_grad():
                    first = forward_pass(self.net, images, self.taps, reduce)
                    logits = self._react(first, self._threshold)
            output = score_logits(s.output, logits, temperature)
            companions = [self._companion(name, first) for name in self.companions]
        return torch.cat([first.norms.to(output), torch.stack([output, *companions])]), first.pred

    def _companion(self, name: str, first: Pass) -> Tensor:
        expert, _, react = name.partition("+")
        with torch.no_grad():
            logits = self._react(first, self._threshold if react else None)
        return score_logits(expert, logits, DEFAULT_TEMPERATURE[expert])

    def _confidence(self, experts: NDArray[Any]) -> NDArray[np.float64]:
        z = normalise(experts[: len(self.experts)], self._check_fitted().statistics)
        strong = [self.experts.index(name) for name in self.strong]
        weak = [i for i in range(len(z)) if i not in strong]
        s = self.settings
        return fuse(z[strong], z[weak], s.weights, s.base, s.cap)

    def _check_fitted(self) -> Calibration:
        if self.calibration_ is None:
            raise NotFittedError("this FuseNorm has no ID statistics: call fit(loader) first")
        return self.calibration_

    def _resolve_strong(self) -> tuple[str, ...]:
        if isinstance(self.settings.strong, str):
            return first_of_last_stage(self.net, self.taps), "output"
        strong = []
        for expert in self.settings.strong:
            number = expert if isinstance(expert, int) else None
            if number is not None and not 0 <= number < len(self.taps):
                raise ConfigError(
                    f"strong expert {number} is out of range: there are {len(self.taps)} taps, "
                    f"numbered from 0: {', '.join(self.taps)}"
                )
            name = expert if isinstance(expert, str) else self.taps[expert]
            if name not in self.experts:
                raise ConfigError(
                    f"strong expert {name!r} unknown: the experts are {', '.join(self.experts)}"
                )
            strong.append(name)
        return tuple(strong)


def calibrate(
    experts: tuple[str, ...],
    id_scores: NDArray[np.float64],
    react_threshold: float | None,
    settings: Settings,
) -> Calibration:
    """ID statistics of expert scores ``[L, N]`` under the settings' percentiles."""
    low, high = settings.percentile_low, settings.percentile_high
    statistics = compute_id_statistics(id_scores, low, high, experts)
    return Calibration(experts, react_threshold, id_scores, statistics)
