"""The images of a benchmark that a report shows."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fusenorm_openood.data.benchmarks import Benchmark, ImageSet
from fusenorm_openood.detectors.base import Scored
from fusenorm_openood.method.conformal import conformal_p_values
from fusenorm_openood.report.gallery import PER_GROUP, Chosen
from fusenorm_openood.report.sections import GROUPS

Values = NDArray[np.float64]


class _Place(NamedTuple):
    """Where an image is, and what was said of it."""

    group: str
    name: str
    position: int
    conf: float
    pred: int
    label: int


def picks(
    sets: Mapping[str, Mapping[str, Scored]],
    benchmark: Benchmark,
    cut: float,
    reference: Values | None,
    split: str = "test",
) -> dict[str, list[Chosen]]:
    """The images to show, by group: extreme and doubtful ones, and the worst mistakes.

    Args:
        sets: `Evaluation.sets`.
        benchmark: where the images come from.
        cut: the threshold of the confidence.
        reference: confidences of calibration images, for p-values; None = no p-values.
        split: which ID images were tested.
    """
    ood = [(group, name) for group in GROUPS for name in sets.get(group, ())]
    known = [(group, name) for group in ("id", "csid") for name in sets[group]]

    def nearest(keys: list[tuple[str, str]], distance: Callable[[Values], Values]) -> list[Chosen]:
        found = []
        for group, name in keys:
            s = sets[group][name]
            far = np.array(distance(s.conf), np.float64)
            if reference is not None and group not in GROUPS:
                far[::2] = np.inf  # these calibrate
            for index in map(int, np.argsort(far, kind="stable")[:PER_GROUP]):
                said = float(s.conf[index]), int(s.pred[index]), int(s.label[index])
                found.append((far[index], _Place(group, name, index, *said)))
        found.sort(key=lambda pair: pair[0])
        return [
            _chosen(place, benchmark, reference, split)
            for distance_, place in found[:PER_GROUP]
            if np.isfinite(distance_)
        ]

    return {
        "Most rejected": nearest([*known, *ood], lambda conf: conf),
        "Most doubtful": nearest([*known, *ood], lambda conf: np.abs(conf - cut)),
        "Most trusted": nearest([*known, *ood], lambda conf: -conf),
        "OOD images that are trusted most": nearest(ood, lambda conf: -conf),
        "ID images that are rejected most": nearest(known, lambda conf: conf),
    }


def _chosen(place: _Place, benchmark: Benchmark, reference: Values | None, split: str) -> Chosen:
    image_set = _image_set(place, benchmark, split)
    kind = GROUPS.get(place.group, "ID" if place.group == "id" else "covariate-shifted ID")
    is_known = place.group not in GROUPS
    truth = f"{kind}, class {place.label}" if is_known else f"{kind}, {place.name}"
    facts = [("truth", truth), ("predicted", f"class {place.pred}")]
    facts.append(("confidence", f"{place.conf:.3f}"))
    if reference is not None:
        facts.append(("p-value", f"{float(conformal_p_values(place.conf, reference)):.3g}"))
    images = image_set.images()

    def read(position: int = place.position) -> Tensor:
        tensor: Tensor = images[position]["data"]
        return tensor

    return Chosen(images.entries[place.position].name, tuple(facts), read)


def _image_set(place: _Place, benchmark: Benchmark, split: str) -> ImageSet:
    if place.group == "id":
        return benchmark.id[split]
    if place.group == "valood":
        return benchmark.val_ood
    sets = {"csid": benchmark.csid, "nearood": benchmark.near, "farood": benchmark.far}
    return sets[place.group][place.name]
