"""Verdicts on images, of which some are rejected before the network has finished."""

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusenorm_openood.detectors.statistics import DetectorStatistics
from fusenorm_openood.errors import CalibrationError, ConfigError, DataError
from fusenorm_openood.forward.early import Exit, early_scores, stage_ends
from fusenorm_openood.forward.experts import Scoring
from fusenorm_openood.forward.given import check_finite, checked_images
from fusenorm_openood.kernels.devices import moved
from fusenorm_openood.method.calibration import Calibration, group_names
from fusenorm_openood.method.conformal import check_enough, threshold
from fusenorm_openood.method.joint import JointDistance
from fusenorm_openood.network.running import network_errors

if TYPE_CHECKING:
    from fusenorm_openood.detectors.fusenorm import FuseNorm

MODES = ("certain", "spending")
ROUNDING = 1e-5  # of bounds, relative to those above 1: another batch has other last digits


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
    with network_errors(detector.net, checked_images(images)):
        on_device = moved(detector.net, images)
        scoring = detector.scoring(lambda: on_device)
        exits, accepted = exits_of(detector, on_device, acceptance, mode)
        done = early_scores(scoring, on_device, exits)
    detector.check_size(images)
    kept = done.kept.cpu().numpy()
    numbers = done.exits.numpy()
    ood = numbers >= 0
    experts, pred = np.empty((len(detector.rows), 0)), np.empty(0, np.int64)
    if done.scores is not None:
        experts = done.scores.matrix(detector.rows).cpu().numpy()
        pred = done.scores.pred.cpu().numpy()
        stayed = images[done.kept.to(images.device)]
        check_finite(stayed, experts, detector.rows)
        given = None if groups is None else np.array(group_names(groups))[kept]
        group = calibration.numbers(pred, given, stayed)
        ood[kept] = detector.confidence(experts) < calibration.thresholds(accepted)[group]
    layers = [None if number < 0 else exits[number].layers[-1] for number in numbers.tolist()]
    bounds = done.statistics.numpy()
    if mode != "certain":
        bounds = np.full_like(bounds, np.nan)
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
    key = (scoring, detector.check_fitted(), detector.check_calibrated(), acceptance, mode)
    known = detector.exits
    same = known is not None and all(a is b for a, b in zip(key[:3], known[0][:3], strict=True))
    if known is None or not same or known[0][3:] != key[3:]:
        known = detector.exits = key, _new_exits(detector, images, *key)
    return known[1]


def _new_exits(
    detector: "FuseNorm",
    images: Tensor,
    scoring: Scoring,
    statistics: DetectorStatistics,
    calibration: Calibration,
    acceptance: float,
    mode: str,
) -> tuple[list[Exit], float]:
    if scoring.by_network:
        raise ConfigError(
            "early works with strong experts that one forward pass computes, unlike odin and ReAct "
            "before a mean over pixels: leave out early"
        )
    if (known := detector.stage_ends) is None or known[0] is not scoring.structure:
        ends = stage_ends(detector.net, images, scoring.structure, detector.taps)
        known = detector.stage_ends = scoring.structure, ends
    fusion, ends = statistics.fusion, known[1]
    rows = [list(map(statistics.layers.index, layers)) for layers in ends]
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
                "and a cap above it, or choose early='spending'"
            )
        bounds = map(fusion.upper_bound, rows)
        return [Exit(*of, limit) for of in zip(ends, bounds, strict=True)], acceptance
    if calibration.by is not None or fusion.joint is None:
        raise ConfigError(
            "early='spending' needs calibration images without groups, and settings with clip or "
            "the joint penalty: choose early='certain'"
        )
    share = (1 - acceptance) / (len(ends) + 1)  # by the union bound, together the error
    try:
        check_enough(len(calibration), 1 - share)
    except CalibrationError as error:
        raise CalibrationError(
            f"early='spending' judges {len(ends) + 1} times, each with an error of {share:.3g}: "
            f"{error}"
        ) from None
    exits = []
    for layers, some in zip(ends, rows, strict=True):
        closeness = partial(_closeness, fusion.joint.of_layers(some))
        scores = np.sort(closeness(torch.from_numpy(calibration.marks[some])).numpy())
        exits.append(Exit(layers, closeness, threshold(scores, 1 - share)))
    return exits, 1 - share


def _closeness(distance: JointDistance, norms: Tensor) -> Tensor:
    return -distance.log_distance(distance.terms(norms))
