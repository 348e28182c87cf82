"""The experts of a detector, and all their scores from one forward pass over images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fusenorm_openood.errors import TapError
from fusenorm_openood.forward import gradient, passes
from fusenorm_openood.forward.passes import ForwardPass, Thinning, forward_pass
from fusenorm_openood.method.atf import FeatureNorm, atf_each
from fusenorm_openood.method.scores.base import NO_HEAD, Features, Head, Score, State
from fusenorm_openood.method.scores.odin import odin_direction, odin_step
from fusenorm_openood.network.running import eval_mode, unwrapped
from fusenorm_openood.network.structure import Structure

Expert = tuple[str, FeatureNorm] | Score  # a feature norm of a layer, or another score


@dataclass(frozen=True)
class Experts:
    """Every feature norm of every layer, and other scores."""

    layers: tuple[str, ...] = ()
    norms: tuple[FeatureNorm, ...] = ()
    scores: tuple[Score, ...] = ()

    def __iter__(self) -> Iterator[Expert]:
        yield from ((layer, norm) for norm in self.norms for layer in self.layers)
        yield from self.scores

    def __or__(self, other: "Experts") -> "Experts":
        """These experts and others, each once."""
        ours, theirs = vars(self).values(), vars(other).values()
        both = (dict.fromkeys((*a, *b)) for a, b in zip(ours, theirs, strict=True))
        return Experts(*map(tuple, both))


@dataclass
class Fitted:
    """What experts have fitted on ID images."""

    thresholds: dict[float, float] = field(default_factory=dict)  # ReAct's, by percentile
    states: dict[Score, State] = field(default_factory=dict)  # on the CPU
    trust: dict[Score, float] = field(default_factory=dict)  # in [0, 1]; see `trust`


class BatchScores(NamedTuple):
    """Scores of `B` images."""

    scores: Mapping[Expert, Tensor]  # `[B]` by expert, larger = more in-distribution
    pred: Tensor  # predicted classes `[B]`
    features: Features  # and logits; features are `[B, 0]` where no expert needs them
    label: NDArray[np.int64] = np.empty(0, np.int64)  # `[B]`, -1 for images without a label
    images: Tensor | None = None  # `[B, C, H, W]`; None if the pass was recorded

    def matrix(self, experts: Sequence[Expert]) -> Tensor:
        """Scores `[L, B]` of some experts, in float64 where the device has it."""
        if not experts:
            return torch.empty(0, len(self.pred), dtype=torch.float64, device="cpu")
        rows = map(self.scores.__getitem__, experts)
        return torch.stack([(t.cpu() if t.device.type == "mps" else t).double() for t in rows])


@dataclass(frozen=True)
class Scoring:
    """How images are scored: a forward pass, and what follows from its features and logits.

    Feature norms and ODIN need the network itself. All other scores are functions of the logits and
    the penultimate feature, so that a recorded pass serves other scores, too. TapError if a score
    needs what the network does not have.
    """

    net: nn.Module  # it is left unchanged
    structure: Structure  # how it is built; see `understand`
    experts: Experts = Experts()
    fitted: Fitted = field(default_factory=Fitted)  # what they have fitted
    # Which features a pass gives: "" = those that the experts need, "all", or "activations", the
    # inputs of the layers that make the logits before any mean.
    features: Literal["", "all", "activations"] = ""

    def __post_init__(self) -> None:
        name, head = type(self.net).__name__, self.structure.head
        has_feature = bool(head.names or head.feature)
        clips = bool(self.clips) or self.features == "activations"
        if clips and not has_feature:
            raise TapError(
                f"ReAct needs the layers that make the logits, and none was found in {name}: set "
                "react_percentile=None"
            )
        has = {"": has_feature, "affine": head.is_affine, "linear": head.is_linear}
        lacking = [s.name for s in self.experts.scores if s.needs_feature and not has[s.needs_head]]
        if lacking:
            raise TapError(
                f"experts {', '.join(lacking)} need logits that are a linear function of one "
                f"feature, as those of {name} are not: set strong=['output'], or to experts that "
                "read no weights, such as ['output', 'mds++']"
            )

    def __call__(self, images: Tensor) -> BatchScores:
        """Scores of images `[B, C, H, W]` on the network's device.

        TapError if a layer gives no feature map, or no gradient reaches the images.
        """
        return self.complete(self.run(images))

    def run(self, images: Tensor) -> BatchScores:
        """As `__call__`, but only the scores that need the network."""
        split = passes.parts(images, self.structure.batch_dependent)
        with eval_mode(unwrapped(self.net)):
            batches = [self.run_part(part)[0] for part in split]  # of a pass, keep the scores
        return batches[0] if len(batches) == 1 else joined(batches)

    def run_part(
        self, images: Tensor, thinning: Thinning | None = None
    ) -> tuple[BatchScores, ForwardPass]:
        """As `run`, for a network in eval mode, without splitting the images; with the pass."""
        perturbed, layers = dict[Score, Tensor](), self.experts.layers
        if self._by_gradient:
            first, perturbed = self._with_gradients(images)
        else:
            with torch.no_grad():
                first = forward_pass(
                    self.net, images, self.structure, layers, self._norms, thinning=thinning
                )
        scores = dict[Expert, Tensor]()
        for layer in layers:
            for norm, column in zip(self.experts.norms, first.maps[layer].unbind(1), strict=True):
                scores[layer, norm] = column
        with torch.no_grad():
            for score in self.by_network:
                given, done = images, first
                if score in perturbed:
                    given = perturbed[score]
                    done = forward_pass(self.net, given, self.structure)
                logits = self._logits(given, done, score)
                scores[score] = score(Features(logits[:, :0], logits))
        feature = first.activations if self.features == "activations" else first.feature
        if feature is None or not (self.features or self.needs_feature):
            feature = first.logits[:, :0]
        features = Features(feature.detach(), first.logits.detach())
        return BatchScores(scores, first.pred, features), first

    def complete(self, batch: BatchScores) -> BatchScores:
        """All scores of a batch, from those that need the network and from its features."""
        feature, logits = batch.features
        scores, head = dict(batch.scores), self.head(logits.device)
        for score in self.by_feature:
            features, state = batch.features, State()
            if score in self.clips:
                clipped = feature.clamp(max=self.fitted.thresholds[self.clips[score]])
                features = Features(feature, passes.head_logits(self.net, self.structure, clipped))
            elif not score.needs_feature:
                features = Features(logits, logits)
            if score.needs_fit:
                state = self.state(score, logits.device)
            scores[score] = score(features, head, state)
        return batch._replace(scores=scores)

    def state(self, score: Score, device: torch.device) -> State:
        """What a score has fitted, on a device, to which it is moved once."""
        known, key = self.fitted.states[score], (score, device)
        if device.type != "cpu" and key not in self._moved:
            self._moved[key] = {name: value.to(device) for name, value in known.items()}
        return self._moved.get(key, known)

    def head(self, device: torch.device) -> Head:
        """The network's final layer as it is now, in float32; empty if no score reads it."""
        if not self._reads_head:
            return NO_HEAD
        return passes.head_of(self.net, self.structure, device, torch.float32)

    @cached_property
    def _moved(self) -> dict[tuple[Score, torch.device], State]:
        return {}

    @cached_property
    def _reads_head(self) -> bool:
        return any(score.needs_head for score in self.experts.scores)

    @cached_property
    def clips(self) -> dict[Score, float]:
        """The percentiles at which ReAct clips, by the scores for which it does."""
        given = ((score, score.clip_percentile) for score in self.experts.scores)
        return {score: q for score, q in given if q is not None}

    @property
    def width(self) -> int:
        """Number of features, 0 where the logits are no affine function of them."""
        try:
            return passes.head_of(self.net, self.structure).weight.shape[1]
        except TapError:
            return 0

    @cached_property
    def by_network(self) -> list[Score]:
        """The scores that run the network, or its head on more than one feature per image."""
        is_linear = self.structure.head.is_linear
        scores = self.experts.scores
        return [s for s in scores if s.needs_gradient or (s in self.clips and not is_linear)]

    @cached_property
    def by_feature(self) -> list[Score]:
        """The other scores, which are functions of features and logits."""
        return [score for score in self.experts.scores if score not in self.by_network]

    @cached_property
    def _by_gradient(self) -> list[Any]:
        return [score for score in self.by_network if score.needs_gradient]

    @cached_property
    def _norms(self) -> Callable[[Tensor], Tensor]:
        return partial(atf_each, settings=self.experts.norms)

    @cached_property
    def needs_feature(self) -> bool:
        """Whether a score is computed from features that a pass has given."""
        return any(s.needs_feature or s in self.clips for s in self.by_feature)

    @cached_property
    def recorded(self) -> list[Expert]:
        """The experts whose scores `run` gives, in the order in which they are recorded."""
        return [*Experts(self.experts.layers, self.experts.norms), *self.by_network]

    @property
    def record(self) -> dict[str, Any]:
        """All that `run` depends on besides the network and the images, in terms of JSON."""
        head, thresholds = self.structure.head, self.fitted.thresholds
        clips = [self.clips[score] for score in self.by_network if score in self.clips]
        return {
            "norms": [
                [layer, list(n)] for n in self.experts.norms for layer in self.experts.layers
            ],
            "scores": [score.to_json() for score in self.by_network],
            "thresholds": {str(q): thresholds[q] for q in clips},
            "features": self.features or ("all" if self.needs_feature else ""),
            "feature": [*head.feature, head.is_normalised] if head.feature else [],
            "batch_dependent": self.structure.batch_dependent,
        }

    def _logits(self, images: Tensor, done: ForwardPass, score: Score) -> Tensor:
        """Logits `[B, K]` of a pass, after ReAct if the score asks for it."""
        if score not in self.clips:
            return done.logits
        threshold = self.fitted.thresholds[self.clips[score]]
        if not self.structure.head.is_linear:
            return forward_pass(self.net, images, self.structure, threshold=threshold).logits
        assert done.feature is not None  # of the layers that make the logits
        return passes.head_logits(self.net, self.structure, done.feature.clamp(max=threshold))

    def _with_gradients(self, images: Tensor) -> tuple[ForwardPass, dict[Score, Tensor]]:
        """One pass for the layers and the gradients; ODIN's perturbed images by score."""

        def differentiate(leaf: Tensor) -> tuple[ForwardPass, dict[Score, Tensor]]:
            layers = self.experts.layers
            first = forward_pass(self.net, leaf, self.structure, layers, self._norms)
            return first, self._perturbed(leaf, first)

        split = passes.parts(images, self.structure.batch_dependent, with_graph=True)
        done = [gradient.gradients_of_images(self.net, part, differentiate) for part in split]
        perturbed = {score: torch.cat([of[score] for _, of in done]) for score in done[0][1]}
        return ForwardPass.joined([first for first, _ in done]), perturbed

    def _perturbed(self, leaf: Tensor, first: ForwardPass) -> dict[Score, Tensor]:
        """ODIN's images for each score that needs a gradient; equal gradients are shared."""
        alike: dict[tuple[float, float | None], list[Any]] = {}
        for score in self._by_gradient:
            alike.setdefault((score.temperature, self.clips.get(score)), []).append(score)
        perturbed = dict[Score, Tensor]()
        for number, ((temperature, _), scores) in enumerate(alike.items(), start=1):
            logits = self._logits(leaf, first, scores[0])
            direction = odin_direction(leaf, logits, temperature, number < len(alike))
            for score in scores:
                perturbed[score] = odin_step(leaf, direction, score.noise, score.input_std)
        return perturbed


def joined(batches: Sequence[BatchScores]) -> BatchScores:
    """The scores of the parts of a batch as those of one."""
    scores, pred, features, *_ = zip(*batches, strict=True)
    of_experts = map(torch.cat, zip(*map(dict.values, scores), strict=True))
    feature, logits = map(torch.cat, zip(*features, strict=True))
    by_expert = dict(zip(scores[0], of_experts, strict=True))
    return BatchScores(by_expert, torch.cat(pred), Features(feature, logits))
