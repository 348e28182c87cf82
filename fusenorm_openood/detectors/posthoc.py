"""Single post-hoc experts as postprocessors, with OpenOOD's names and arguments."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import Self

from fusenorm_openood.detectors.atomic import atomic
from fusenorm_openood.detectors.decisions import DecidingDetector
from fusenorm_openood.detectors.enough import known_count, needed, warn_if_few
from fusenorm_openood.errors import NotFittedError
from fusenorm_openood.forward.observed import Listener, Observed, finite_feature
from fusenorm_openood.forward.panel import Fitted, Panel
from fusenorm_openood.forward.samples import BlockSums, FeatureSample
from fusenorm_openood.method.posthoc import Head, Posthoc

UNFITTED = ("gen", "scale", "ash")  # need no ID images


class PosthocBaseline(DecidingDetector):
    """One post-hoc expert, fitted on all images that it is given, in bounded memory.

    KNN's neighbours and the scale of ViM's virtual logit are those of all images if their features
    and logits take at most 1 GiB, else those of an even sample.

    Args:
        net: any network whose logits are the output of a final linear layer.
        name: one of `POSTHOC`.
        random: whether the network may be random, `refuse` or `allow`; see `Settings`.
        args: the postprocessor's arguments; the others have their defaults.

    Raises:
        ConfigError: an unknown postprocessor, or invalid arguments.
    """

    fitted_on = "train"

    def __init__(self, net: nn.Module, name: str, random: str = "refuse", **args: Any) -> None:
        super().__init__(net)
        self._random = random
        self.experts, self.expert = (name,), Posthoc.of(name, args)
        self._panel = Panel((), (), (), (self.expert,))
        self._fitted = Fitted(states={self.expert: {}} if name in UNFITTED else {})

    @atomic
    def fit(self, loader: Iterable[Any], progress: bool = False) -> Self:
        """Fit the expert, as OpenOOD does on the training images.

        Raises:
            NonFiniteError: a feature is not finite.
            DataError: the loader gives no images, or labels that are no class of the network.
        """
        if self.experts[0] in UNFITTED:
            return self
        sample, sums = FeatureSample(limit=math.inf), BlockSums([self.expert])
        readings = self._begin(loader)
        needs = needed(self.net, self._known(), self._panel)
        is_counted = warn_if_few(known_count(readings), needs)

        def keep(heard: Observed) -> Tensor:
            if heard.seen is not None:
                finite_feature(heard)
                label = torch.from_numpy(heard.label)
                sample.add(heard.seen)
                sums.add(heard.seen, torch.where(label < 0, heard.pred.cpu(), label))
            return heard.rows

        _, pred, _ = self._collect(readings, progress, "fit", score=keep)
        if not is_counted:
            warn_if_few(len(pred), needs)
        head = Head(*(t.cpu().float() for t in self._panel.head(self.net, self._known())))
        state = self.expert.fitted(sums.of(self.expert), sample.seen, head)
        self._fitted = Fitted(states={self.expert: state})
        return self

    def _try(self, images: Tensor) -> None:
        self._panel.listen(self.net, self.structure(images), images, Fitted())

    def _check_fitted(self) -> None:
        if self.expert not in self._fitted.states:
            raise NotFittedError(f"this {self.expert.name} is not fitted: call fit(loader) first")

    def _listener(self, recorded: bool = False) -> Listener:
        return self._listener_of(self._panel, self._fitted, recorded)

    def _expert_scores(self, observed: Observed) -> Tensor:
        return self._panel.completed(self.net, self._known(), observed, self._fitted)

    def confidence(self, experts: NDArray[Any]) -> NDArray[Any]:
        conf: NDArray[Any] = experts[0]
        return conf
