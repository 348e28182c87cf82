"""What all detectors share: batches, loops and checks."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from typing_extensions import Self

from fusenorm_openood.detectors.enough import LEAST, known_count, needed, warn_if_few
from fusenorm_openood.errors import DataError, NotFittedError, TapError, ZeroRangeError
from fusenorm_openood.forward.batches import Readings, checked_images, not_finite
from fusenorm_openood.forward.observed import Heard, Listener, Observed, Recorder, observed
from fusenorm_openood.forward.panel import Fitted, Panel
from fusenorm_openood.forward.recorded import dealt_out
from fusenorm_openood.forward.recording import recording_listener
from fusenorm_openood.forward.samples import BlockSums, FeatureSample
from fusenorm_openood.forward.thresholds import react_thresholds
from fusenorm_openood.kernels.devices import moved
from fusenorm_openood.method.experts import Output
from fusenorm_openood.method.posthoc import POSTHOC, Head, Seen
from fusenorm_openood.network.fingerprint import Fingerprint, identify
from fusenorm_openood.network.named import LazyNetwork
from fusenorm_openood.network.running import network_errors, unwrapped
from fusenorm_openood.network.structure import Structure
from fusenorm_openood.network.understanding import understand

Images = Tensor | Image.Image | str | Path  # the last three where preprocessing is known


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
    """Loops, batches and checks; a subclass defines how experts score."""

    experts: tuple[str, ...]
    companions: tuple[str, ...] = ()
    _random = "refuse"  # see `Settings`

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        known = net.known if isinstance(net, LazyNetwork) else None
        self._structure: Structure | None = known and known.structure

    @property
    def known_structure(self) -> Structure | None:
        """How the network is built, None before the first images."""
        return self._structure

    def _known(self) -> Structure:
        assert self._structure is not None  # since the first images
        return self._structure

    def structure(self, images: Tensor) -> Structure:
        """How the network is built, understood at the first images `[B, C, H, W]`."""
        if self._structure is None:
            self._structure = self._understood(images)
        return self._structure

    def _understood(self, images: Tensor) -> Structure:
        structure = understand(self.net, images)
        self._check_structure(structure)
        return structure

    def _check_structure(self, structure: Structure) -> None:
        """Tell of a network whose logits are not what the experts take them for.

        Raises:
            TapError: a network that is random, unless it is allowed.
        """
        if structure.random:
            tell_random(self.net, self._random)

    def _begin(self, loader: Iterable[Any]) -> Iterable[Any]:
        """Understand the network at a loader's first two images, and try all experts on them.

        A recorded loader does without if the network was understood before.

        Returns:
            The loader, to be read instead of it.
        """
        if isinstance(loader, Recorder) and self._structure is not None:
            self._check_structure(self._structure)
            return loader
        readings = loader if isinstance(loader, Recorder) else Readings(loader)
        images = self._moved(readings.first[:2])
        self._structure = self._understood(images)
        self._try(images)
        return readings

    def _identified(self, readings: Any) -> Fingerprint | None:
        """What the network is recognised by; None of one that is only loaded when it is to run."""
        if isinstance(self.net, LazyNetwork):
            return None
        return identify(self.net, readings.first.shape[1:])

    def prepare(self, loaders: Iterable[Any], progress: bool = False) -> list[Any]:
        """Let recorded loaders keep their images, each process its share, before any is waited for.

        Returns:
            The loaders, recorded or not, to be read instead.
        """
        dealt = dealt_out(loaders)
        for loader in dealt:
            if isinstance(loader, Recorder):
                if self._structure is None:
                    self.structure(self._moved(loader.first))
                loader.prepare(self.net, self._listener(recorded=True), progress)
        return dealt

    @abstractmethod
    def _try(self, images: Tensor) -> None:
        """Score two images, so that what cannot work fails before a loader is read."""

    @abstractmethod
    def _listener(self, recorded: bool = False) -> Listener:
        """The pass that the scores of the experts come from, live or to be recorded."""

    def _listener_of(self, panel: Panel, fitted: Fitted, recorded: bool) -> Listener:
        if recorded:
            return recording_listener(self.net, self._known(), panel, fitted)

        def listen(images: Tensor) -> Heard:
            return panel.listen(self.net, self.structure(images), images, fitted)

        return Listener(listen, panel.what(fitted))

    def _expert_scores(self, observed: Observed) -> Tensor:
        """Expert scores `[L, B]` from what a pass has heard."""
        return observed.rows

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the rows of `Scored.experts`: the experts and their companions."""
        return (*self.experts, *self.companions)

    def _collect(
        self,
        loader: Iterable[Any],
        progress: bool,
        desc: str,
        listener: Listener | None = None,
        score: Callable[[Observed], Tensor] | None = None,
    ) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
        rows, waiting = [], []
        score = score or self._expert_scores
        recorded = isinstance(loader, Recorder)
        if isinstance(loader, Recorder) and self._structure is None:
            self.structure(self._moved(loader.first))
        listener = listener or self._listener(recorded)
        for heard in observed(self.net, loader, listener, progress, desc):
            waiting.append((score(heard), heard))
            # A GPU scores one batch while the next one is loaded and copied to it.
            if heard.rows.device.type == "cpu" or len(waiting) > 1:
                rows.append(self._read(*waiting.pop(0)))
        rows += [self._read(*batch) for batch in waiting]
        if not rows:
            raise DataError(f"loader must give at least one image, got none ({desc})")
        experts, pred, label = zip(*rows, strict=True)
        return (
            np.concatenate(experts, axis=1),
            np.concatenate(pred).astype(np.int64),
            np.concatenate(label).astype(np.int64),
        )

    def _heard(self, batch: Tensor) -> tuple[NDArray[Any], Tensor]:
        """Expert scores `[L, B]` on the host and predicted classes `[B]` of images."""
        with network_errors(self.net, batch):
            images = self._moved(batch)
            self.structure(images)
            rows, pred, seen = self._listener().listen(images)
            scores = self._expert_scores(Observed(rows, pred, np.full(len(batch), -1), seen))
        experts: NDArray[Any] = scores.cpu().numpy()
        self._check_finite(batch, experts)
        return experts, pred

    def _moved(self, images: Tensor) -> Tensor:
        return moved(self.net, images)

    def _read(
        self, scores: Tensor, heard: Observed
    ) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
        """Scores, predictions and labels of a batch on the host, which waits for the device."""
        experts: NDArray[Any] = scores.cpu().numpy()
        self._check_finite(heard.images, experts)
        return experts, heard.pred.cpu().numpy(), heard.label

    def _check_finite(self, images: Tensor | None, experts: NDArray[Any]) -> None:
        if not np.isfinite(experts).all():
            expert, image = np.argwhere(~np.isfinite(experts))[0]
            what = f"the score {experts[expert, image]} from expert {self.rows[expert]!r}"
            raise not_finite(images, int(image), what)


def check_energy(net: nn.Module, structure: Structure, outputs: Iterable[Output]) -> None:
    """Raise ZeroRangeError for an energy of log-probabilities, which is 0 for every image."""
    flat = any(o.output == "energy" and o.temperature == 1 for o in outputs)
    if flat and structure.activation == "log_softmax":
        raise ZeroRangeError(
            f"{type(unwrapped(net)).__name__} returns log-probabilities, whose energy is 0 for "
            "every image: choose the output expert 'msp', or wrap the network so that its forward "
            "returns what its log_softmax is applied to"
        )


def tell_random(net: nn.Module, random: str) -> None:
    """Raise TapError for a network that is random, or warn if that is allowed; see `Settings`."""
    said = f"{type(unwrapped(net)).__name__} gives other logits for the same images in each pass"
    if random != "allow":
        raise TapError(
            f"{said}, and so would its verdicts: turn off what is random in evaluation mode "
            "(dropout, noise, random crops), or set random='allow'"
        )
    warnings.warn(f"{said}: confidences and verdicts are random", UserWarning, stacklevel=4)


class PanelFit(NamedTuple):
    """What `fit_panel` gives: the fitted experts, and for `N` ID images what was seen of them.

    Attributes:
        fitted: what the experts have fitted.
        experts: scores `[R, N]` of the panel.
        pred: predicted classes `[N]`.
        label: labels `[N]`, -1 where the loader gives none.
        seen: features and logits, None without post-hoc experts.
    """

    fitted: Fitted
    experts: NDArray[Any]
    pred: NDArray[np.int64]
    label: NDArray[np.int64]
    seen: Seen | None


def fit_panel(
    scorer: ExpertScorer,
    panel: Panel,
    readings: Iterable[Any],
    progress: bool,
    desc: str,
    least: int = LEAST,
) -> PanelFit:
    """Fit a panel's experts on ID images, and score these.

    Fewer images than `least`, or than an expert takes, are a warning, before the fit if their
    number is known.

    The loader is read once, and once more before if ReAct needs a threshold. With post-hoc experts,
    only the images of an even sample of at most `LIMIT` are returned: they are the neighbours, none
    of which is its own. Means and covariances are those of all images.

    Raises:
        DataError: a loader that gives other batches when it is read again.
        TapError: the network lacks what an expert needs.
        NonFiniteError: a score or a feature is not finite.
    """
    net, sample, sums = scorer.net, FeatureSample(), BlockSums(panel.posthoc)
    structure = scorer._known()
    recorded = isinstance(readings, Recorder)
    needs = needed(net, structure, panel, least)
    is_counted = warn_if_few(known_count(readings), needs, stacklevel=5)
    fitted = Fitted(react_thresholds(net, structure, readings, panel, progress))

    def score(heard: Observed) -> Tensor:
        if heard.seen is not None:
            sample.add(heard.seen)
            sums.add(heard.seen, heard.pred)  # labels would make more than the images count
        return heard.rows

    listener = scorer._listener_of(panel, fitted, recorded)
    rows, pred, label = scorer._collect(readings, progress, desc, listener, score)
    if not is_counted:
        warn_if_few(len(pred), needs, stacklevel=5)
    if not panel.posthoc:
        return PanelFit(fitted, rows, pred, label, None)
    kept, seen = sample.indices, sample.seen
    rows, pred, label = rows[:, kept], pred[kept], label[kept]
    head = Head(*(t.cpu().float() for t in panel.head(net, structure)))
    classes, scored = torch.from_numpy(pred), []
    for expert in panel.posthoc:
        fitted.states[expert] = state = expert.fitted(sums.of(expert), seen, head)
        score_fit, arguments = POSTHOC[expert.name].score_fit, dict(expert.arguments)
        scored.append(score_fit(seen, head, state, arguments, classes))
    experts = np.concatenate([rows, torch.stack(scored).numpy()])
    return PanelFit(fitted, experts, pred, label, seen)


class Detector(ExpertScorer):
    """Turns images into confidences; a subclass defines the expert scores and their fusion.

    Attributes:
        fitted_on: the ID images of a benchmark that it is fitted on, `val` or `train`.
    """

    fitted_on = "val"

    @abstractmethod
    def fit(self, loader: Iterable[Any], progress: bool = False) -> Self:
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

    def _images(self, images: Images) -> Tensor:
        """The tensor of images that are given in another form; a subclass may know how."""
        return checked_images(images) if not isinstance(images, Tensor) else images

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
        single = tensor.ndim == 3
        batch = checked_images(tensor.unsqueeze(0) if single else tensor)
        experts, pred = self._heard(batch)
        conf = torch.from_numpy(self.confidence(experts))
        conf = conf.float() if tensor.device.type == "mps" else conf
        pred, conf = pred.to(tensor.device), conf.to(tensor.device)
        return (pred[0], conf[0]) if single else (pred, conf)

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
        experts, pred, label = self._collect(loader, progress, desc)
        return Scored(self.confidence(experts), pred, label, experts)
