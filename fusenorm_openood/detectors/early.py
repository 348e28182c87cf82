"""Verdicts on images, of which some are rejected before the network has finished."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fusenorm_openood import errors
from fusenorm_openood.errors import CalibrationError, ConfigError, DataError, TapError
from fusenorm_openood.forward.experts import BatchScores, joined
from fusenorm_openood.forward.given import check_finite, checked_images
from fusenorm_openood.forward.passes import forward_pass, parts
from fusenorm_openood.kernels.devices import moved
from fusenorm_openood.method.calibration import group_names
from fusenorm_openood.method.conformal import check_enough, needed_images, threshold
from fusenorm_openood.method.joint import JointDistance
from fusenorm_openood.network import running
from fusenorm_openood.network.running import eval_mode, unwrapped
from fusenorm_openood.network.structure import Structure

if TYPE_CHECKING:
    from fusenorm_openood.detectors.fusenorm import FuseNorm

MODES = ("certain", "spending")
ROUNDING = 1e-5  # of bounds, relative to those above 1: another batch has other last digits
AGREES = 1e-3  # largest difference of logits of a thinned batch, relative to the largest logit


class Exit(NamedTuple):
    """After which layer images leave a batch: those whose statistic is below a limit."""

    layers: tuple[str, ...]  # that have run by then, the last of which it is
    # From their norms `[l, B]` to `[B]`, larger = more in-distribution.
    statistic: Callable[[Tensor], Tensor]
    limit: float  # images below it leave


class _AllLeft(BaseException):  # no `except Exception` on its way stops it
    pass


class _Leaving:
    """The images of a batch that leave it at exits, part by part; see `passes.Thinning`."""

    def __init__(self, images: int, exits: Sequence[Exit]) -> None:
        # With which statistics and at which exits images have left; NaN and -1 of those that stay.
        self.statistics, self.exits = np.full(images, np.nan), np.full(images, -1)
        self._of = {found.layers[-1]: (number, found) for number, found in enumerate(exits)}
        self._first = self._next = 0  # image of the part, and of the next one
        self.kept = torch.empty(0)

    def begin(self, part: Tensor) -> None:
        self._first, self._next = self._next, self._next + len(part)
        self.kept = torch.arange(len(part), device=part.device)

    def after(self, name: str, reduced: Mapping[str, Tensor]) -> Tensor | None:
        if name not in self._of:
            return None
        number, (layers, statistic, limit) = self._of[name]
        # On the CPU, where the ID statistics are. NaN stays, and is told where all scores are.
        norms = torch.stack([reduced[layer][:, 0] for layer in layers]).cpu().double()
        found = statistic(norms)
        leaves = found < limit
        if not leaves.any():
            return None
        kept = (~leaves).nonzero()[:, 0].to(self.kept.device)
        gone = self._first + self.kept.cpu()[leaves].numpy()
        self.statistics[gone], self.exits[gone] = found[leaves].numpy(), number
        self.kept = self.kept[kept]
        if not len(kept):
            raise _AllLeft
        return kept


class EarlyVerdicts(NamedTuple):
    """Verdicts on `B` images, of which some were rejected before the network had finished.

    Of these, no class and no exact confidence is known.
    """

    ood: NDArray[np.bool_]  # the verdicts `[B]`, True = OOD
    exits: tuple[str | None, ...]  # the layer `[B]` after which an image was rejected, or None
    kept: NDArray[np.int64]  # numbers `[b]` of the images that the whole network has seen
    experts: NDArray[np.float64]  # their scores `[L, b]`
    pred: NDArray[np.int64]  # their predicted classes `[b]`
    # What confidences `[B]` of rejected images are at most, with certain exits; NaN of all others.
    bounds: NDArray[np.float64]


def judge_early(
    detector: "FuseNorm",
    images: Tensor,
    acceptance: float = 0.95,
    mode: str = "certain",
    groups: Any = None,
) -> EarlyVerdicts:
    """Verdicts on images `[B, C, H, W]`; see `FuseNorm.is_ood`."""
    if not len(images):
        raise DataError("there must be at least one image, got none")
    calibration = detector.check_calibrated()
    if groups is not None or calibration.function is None:
        calibration.numbers(np.zeros(len(images), np.int64), groups)  # or an error
    batches = list[BatchScores]()
    with running.network_errors(detector.net, checked_images(images)):
        on_device = moved(detector.net, images)
        scoring = detector.scoring(lambda: on_device)
        exits, accepted = exits_of(detector, on_device, acceptance, mode)
        leaving = _Leaving(len(images), exits)
        with eval_mode(unwrapped(detector.net)):
            for part in parts(on_device):
                leaving.begin(part)
                with suppress(_AllLeft):
                    batches.append(scoring.run_part(part, leaving)[0])
        batch = scoring.complete(joined(batches)) if batches else None
    detector.check_size(images)
    ood = leaving.exits >= 0
    kept = np.flatnonzero(~ood)
    experts, pred = np.empty((len(detector.rows), 0)), np.empty(0, np.int64)
    if batch is not None:
        experts = batch.matrix(detector.rows).cpu().numpy()
        pred = batch.pred.cpu().numpy()
        stayed = images[torch.from_numpy(kept).to(images.device)]
        check_finite(stayed, experts, detector.rows)
        given = None if groups is None else np.array(group_names(groups))[kept]
        group = calibration.numbers(pred, given, stayed)
        ood[kept] = detector.confidence(experts) < calibration.thresholds(accepted)[group]
    layers = [exits[n].layers[-1] if n >= 0 else None for n in leaving.exits.tolist()]
    bounds = leaving.statistics if mode == "certain" else np.full(len(images), np.nan)
    return EarlyVerdicts(ood, tuple(layers), kept, experts, pred, bounds)


def exits_of(
    detector: "FuseNorm", images: Tensor, acceptance: float, mode: str
) -> tuple[list[Exit], float]:
    """The exits, and the acceptance of the confidence after them; see `FuseNorm.is_ood`.

    `images` on the network's device show where a batch can be thinned.
    """
    if mode not in MODES:
        raise ConfigError(f"early must be True (certain) or spending, got {mode!r}")
    scoring = detector.scoring(lambda: images)
    statistics, calibration = detector.check_fitted(), detector.check_calibrated()
    key = scoring, statistics, calibration, acceptance, mode
    known = detector.exits
    if known and all(map(is_, key[:3], known[0])) and known[0][3:] == key[3:]:
        return known[1]
    if scoring.by_network:
        raise ConfigError(
            "early works with strong experts that one forward pass computes, unlike odin and ReAct "
            "before a mean over pixels: leave out early"
        )
    if (tried := detector.stage_ends) is None or tried[0] is not scoring.structure:
        ends = stage_ends(detector.net, images, scoring.structure, detector.taps)
        tried = detector.stage_ends = scoring.structure, ends
    fusion, ends = statistics.fusion, tried[1]
    rows = [list(map(statistics.layers.index, layers)) for layers in ends]
    exits = list[Exit]()
    if mode == "certain":
        limit = float(calibration.thresholds(acceptance).min())
        limit -= ROUNDING * max(1.0, abs(limit))
        least = fusion.most_of_strong - fusion.largest_penalty
        if not least < limit:
            needed = fusion.most_of_strong - limit
            raise ConfigError(
                f"no image can be rejected before its strong experts are known: they reach "
                f"{fusion.most_of_strong:.3g}, and an acceptance of {acceptance:g} rejects below "
                f"{limit:.3g}, so that the penalty has to reach {needed:.3g}; fit with clip=True "
                "and a cap > 0, or choose early='spending'"
            )
        exits += [Exit(e, fusion.upper_bound(r), limit) for e, r in zip(ends, rows, strict=True)]
        detector.exits = key, (exits, acceptance)
        return exits, acceptance
    if calibration.by is not None or fusion.joint is None:
        raise ConfigError(
            "early='spending' needs calibration images without groups, and settings with clip or "
            "the joint penalty: choose early='certain'"
        )
    # By the union bound, the confidence at the end and the exits together reject at most the error.
    # An exit has the more of it, the more stages an image skips that leaves there.
    error, count = 1 - acceptance, len(ends) + 1
    share = error / count
    try:
        check_enough(len(calibration), 1 - share)
    except CalibrationError as few:
        raise CalibrationError(
            f"early='spending' judges {count} times, at the end with an error of {share:.3g}: {few}"
        ) from None
    for skipped, layers, some in zip(range(len(ends), 0, -1), ends, rows, strict=True):
        at_exit = 1 - 2 * skipped * error / count**2
        if len(calibration) < needed_images(at_exit):
            break  # so few that no image could leave
        closeness = partial(_closeness, fusion.joint.of_layers(some))
        scores = np.sort(closeness(torch.from_numpy(calibration.marks[some])).numpy())
        exits.append(Exit(layers, closeness, threshold(scores, at_exit)))
    detector.exits = key, (exits, 1 - share)
    return exits, 1 - share


def _closeness(distance: JointDistance, norms: Tensor) -> Tensor:
    return -distance.log_distance(distance.terms(norms))


def stage_ends(
    net: nn.Module, images: Tensor, structure: Structure, taps: Sequence[str]
) -> list[tuple[str, ...]]:
    """The layers that have run by the end of each stage but the last, where a batch can be thinned.

    It can where the rest of the network depends on the last layer's output alone, as in sequential
    and residual networks: a trial shows it, on noise of the size of images `[B, C, H, W]`. TapError
    if it cannot, for example with connections around stages, if images depend on each other, or if
    there is only one stage.
    """
    name, ran = type(unwrapped(net)).__name__, list[str]()
    advice = "judge its images without early"
    if structure.batch_dependent or structure.random or structure.smallest_batch > 1:
        raise TapError(
            f"the logits of {name} depend on the other images of a batch, or on chance: {advice}"
        )
    last = [stage[-1] for stage in structure.stages(taps)[:-1]]
    if not last:
        raise TapError(f"the layers of {name} are one stage, so nothing is saved: {advice}")
    size = len(last) + 2
    shape, generator = (size, *images.shape[1:]), torch.Generator("cpu").manual_seed(0)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    trial = drawn.to(images)

    def norms(x: Tensor) -> Tensor:
        ran.append("")
        return x.flatten(1)[:, :1]

    class Trial:
        kept = torch.arange(size, device=images.device)

        def after(self, layer: str, reduced: Mapping[str, Tensor]) -> Tensor | None:
            ran[-1] = layer
            if layer not in last:
                return None
            self.kept = self.kept[:-1]
            return torch.arange(len(self.kept), device=images.device)

    reason = "what follows also reads what was computed before"
    try:
        with (
            eval_mode(unwrapped(net)),
            torch.no_grad(),
            running.preserved_randomness(images.device),
        ):
            whole = forward_pass(net, trial, structure).logits[:2]
            thinned = forward_pass(net, trial, structure, taps, norms, thinning=Trial()).logits
        agrees = thinned.shape == whole.shape
        difference = float((thinned - whole).abs().max()) if agrees else float("inf")
    except Exception as error:
        if errors.is_out_of_memory(error):
            raise
        difference = float("inf")
        reason = f"the rest fails on fewer images ({errors.first_sentence(error)})"
    if not difference <= AGREES * max(structure.largest_logit, 1):
        raise TapError(
            f"images cannot leave a batch of {name} after {', '.join(last)}, because {reason}: "
            f"{advice}"
        )
    return [tuple(ran[: ran.index(layer) + 1]) for layer in last]
