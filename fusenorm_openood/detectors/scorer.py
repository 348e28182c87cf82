"""A network that is read at its first images, and the experts that score its images."""

from collections.abc import Callable, Iterable
from functools import wraps
from operator import is_
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import Tensor, nn

from fusenorm_openood.detectors.fitting import LEAST, fit_experts, leave_one_out, try_experts
from fusenorm_openood.errors import NotFittedError, TapError, warn
from fusenorm_openood.forward.batches import Readings
from fusenorm_openood.forward.experts import BatchScores, Experts, Fitted, Scoring
from fusenorm_openood.forward.recorded import RecordedLoader, dealt_out
from fusenorm_openood.forward.taps import warn_of_left_out
from fusenorm_openood.kernels.devices import moved
from fusenorm_openood.network.fingerprint import Fingerprint, identify
from fusenorm_openood.network.running import LazyNetwork, unwrapped
from fusenorm_openood.network.structure import Structure
from fusenorm_openood.network.understanding import understand

Owner = TypeVar("Owner")
Result = TypeVar("Result")
P = ParamSpec("P")


def atomic(
    method: Callable[Concatenate[Owner, P], Result],
) -> Callable[Concatenate[Owner, P], Result]:
    """A method that works on a shallow copy, whose attributes the object takes over at the end.

    Until then, and after an exception, the object is what it was. The method must assign
    attributes, and not change what they hold. What it returns is returned, the object for the copy.
    """

    @wraps(method)
    def run(self: Owner, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        new = object.__new__(type(self))
        vars(new).update(vars(self))
        result = method(new, *args, **kwargs)
        vars(self).update(vars(new))
        return self if result is new else result  # type: ignore[return-value]

    return run


class Scorer:
    """What detectors and banks of scores share."""

    def __init__(self, net: nn.Module, structure: Structure | None, random: str) -> None:
        self.net, self._random = net, random  # left unchanged; see `Settings.random`
        if structure is None and isinstance(net, LazyNetwork) and net.stored is not None:
            structure = net.stored.structure
        self.known_structure = structure  # None before the first images
        # The experts and what is scored beside them, each once; what they have fitted.
        self.all_experts, self.fitted = Experts(), Fitted()
        self._last: Scoring | None = None

    @property
    def least(self) -> int:
        """The number of images that a fit needs."""
        return LEAST

    def structure(self, images: Tensor) -> Structure:
        """How the network is built, read at the first images `[B, C, H, W]` on its device."""
        if self.known_structure is None:
            structure = understand(self.net, images)
            check_random(self.net, structure, self._random)
            self._check_structure(structure)
            self.known_structure = structure
        return self.known_structure

    def scoring(self, first: Callable[[], Tensor] | None = None) -> Scoring:
        """How images are scored; `first` returns some that show how the network is built.

        It is the same object as long as nothing has changed. NotFittedError without any images,
        TapError or ZeroRangeError if the network does not have what an expert needs.
        """
        structure = self.known_structure
        if structure is None:
            if first is None:
                raise NotFittedError("no images of the network have been seen: call fit first")
            structure = self.structure(first())
        now, last = (self.net, structure, self.all_experts, self.fitted), self._last
        known = () if last is None else (last.net, last.structure, last.experts, last.fitted)
        if last is None or not all(map(is_, known, now)):
            last = Scoring(*now)
            self._check(last)
            self._last = last
        return last

    def prepare(self, loaders: Iterable[Any], progress: bool = False) -> list[Any]:
        """The loaders, of which recorded ones have scored this process's share of their images."""
        dealt = dealt_out(loaders)
        for loader in dealt:
            if isinstance(loader, RecordedLoader):
                scoring = self.scoring(lambda given=loader: moved(self.net, given.first))  # type: ignore[misc]
                loader.prepare(scoring, progress)
        return dealt

    def fit_on(
        self, loader: Iterable[Any], progress: bool, desc: str = "fit", may_overflow: bool = False
    ) -> tuple[Fingerprint | None, BatchScores]:
        """Fit the experts on ID images, and score these; see `fit_experts` and `leave_one_out`.

        A network that is only loaded when it is to run is not identified.
        """
        readings, images = self._begin(loader)
        if images is not None:
            try_experts(self.scoring(), images)
        network = None
        if not isinstance(self.net, LazyNetwork):  # what cannot be saved fails before the fit
            network = identify(self.net, readings.first.shape[1:])
        self.fitted, batch = fit_experts(
            self.scoring(), readings, progress, desc, self.least, may_overflow=may_overflow
        )
        return network, leave_one_out(self.scoring(), batch)

    def _begin(self, loader: Iterable[Any]) -> tuple[Any, Tensor | None]:
        """Begin to read a loader, at whose first images the network's structure is read.

        The loader to be read instead, and two images to try the experts on; None for a recorded
        loader and a known structure, which need no image. TapError as in `check_random`.
        """
        if isinstance(loader, RecordedLoader) and self.known_structure is not None:
            check_random(self.net, self.known_structure, self._random)
            return loader, None
        readings = loader if isinstance(loader, RecordedLoader) else Readings(loader)
        images = moved(self.net, readings.first[:2])
        self.known_structure = structure = understand(self.net, images)
        check_random(self.net, structure, self._random)
        for taps in self._resolve(structure):
            warn_of_left_out(self.net, taps, structure)
        return readings, images

    def _check(self, scoring: Scoring) -> None:
        """Raise ZeroRangeError for scores that are the same for every image."""

    def _check_structure(self, structure: Structure) -> None:
        """Raise ConfigError for a structure that is not that of the fit."""

    def _resolve(self, structure: Structure) -> Iterable[Any]:
        """Name the experts of a network that is built like this; the settings of its taps."""
        return ()


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
        warn(f"{text}: confidences and verdicts are random")
