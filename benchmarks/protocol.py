"""How the default settings were chosen: candidates on validation images alone; see docs/results.md.

    python benchmarks/protocol.py NAME:ID_DATA:DATA_ROOT:CHECKPOINT[:NORMALIZATION] ...

Every candidate is fitted on four fifths of the ID validation images and tested on the last fifth,
five times over, against the OOD validation images, pseudo-OOD images made from that fifth, and
images that are far off: noise, constant and saturated images at four contrasts.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fusenorm_openood import FuseNorm, Settings, load_network
from fusenorm_openood.data.benchmarks import image_loader, load_benchmark
from fusenorm_openood.data.preprocessing import NORMALIZATIONS
from fusenorm_openood.data.pseudo import KINDS
from fusenorm_openood.forward.batches import batches
from fusenorm_openood.forward.experts import Experts, Fitted, Scoring
from fusenorm_openood.forward.passes import head_of
from fusenorm_openood.forward.samples import BlockSums, Sample
from fusenorm_openood.method.metrics import ood_metrics
from fusenorm_openood.method.scores.base import Features, Head, LogitScore
from fusenorm_openood.network.understanding import understand

FOLDS = 5
CONTRASTS = (1, 3, 10, 100)
STRONG = (
    ("output",),
    ("output", "knn"),
    ("output", "fdbd"),
    ("output", "knn", "fdbd"),
    ("output", "knn", "nci"),
    ("output", "mds"),
    ("output", "fdbd", "mds"),
    ("output", "knn", "fdbd", "mds"),
)


class Recorded(NamedTuple):
    """What one pass gives of `N` images: norms and output scores `[R, N]`, features, logits."""

    rows: np.ndarray
    features: Features

    def part(self, index: np.ndarray) -> "Recorded":
        i = torch.from_numpy(index)
        return Recorded(self.rows[:, index], Features(*(t[i] for t in self.features)))


def candidates() -> dict[str, Settings]:
    """The settings that were compared, by name."""
    found = {}
    for strong, (low, high), base in itertools.product(
        STRONG, ((1, 99.9), (2, 98), (5, 95)), (1.5, 2, 3)
    ):
        settings = Settings(strong=strong, percentile_low=low, percentile_high=high, base=base)
        found[f"{'+'.join(strong)}, {low}/{high}, base {base}"] = settings
    for strong, weight, high in itertools.product(STRONG, (0.15, 0.25, 0.35, 0.5), (95, 99.9)):
        settings = Settings.joint(strong=strong, joint_weight=weight, percentile_high=high)
        found[f"{'+'.join(strong)}, joint {weight}, clip {high}"] = settings
    for neighbours in (1, 3, 10, 20, 50):
        changes = {"strong": ("output", "knn", "fdbd"), "neighbours": neighbours}
        found[f"output+knn+fdbd, K {neighbours}"] = Settings(**changes)
        found[f"output+knn+fdbd, joint, K {neighbours}"] = Settings.joint(**changes)
    found["no clip"] = Settings(clip=False)
    found["msp+fdbd+mds"] = Settings(output="msp")
    found["gen+fdbd+mds"] = Settings(strong=("gen", "fdbd", "mds"))
    found["published, energy"] = Settings.published(output="energy", react_percentile=None)
    return found


def far_off(
    count: int, size: int, mean: Sequence[float], std: Sequence[float], seed: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Images without content, by kind and contrast: about mid-grey, and in normalised units."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, normal: bool = False) -> Tensor:
        kind: Callable[..., Tensor] = torch.randn if normal else torch.rand
        return kind(count, *shape, generator=generator).expand(count, 3, size, size)

    pixels = {
        "uniform noise": draw(3, size, size),
        "Gaussian noise": 0.5 + 0.25 * draw(3, size, size, normal=True),
        "one colour": draw(3, 1, 1),
        "one grey": draw(1, 1, 1),
        "saturated pixels": draw(3, size, size).round(),
        "saturated colour": draw(3, 1, 1).round(),
    }
    m, s = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    for (name, x), contrast in itertools.product(pixels.items(), CONTRASTS):
        yield f"{name} x {contrast}", (0.5 + contrast * (x - 0.5) - m) / s
        yield f"{name} x {contrast}, normalised", contrast * (x - m) / s


def recorded(scoring: Scoring, loader: Any) -> Recorded:
    """Features of a loader's images, and the scores that need no fit."""
    done = [scoring(images) for images, _ in batches(loader)]
    rows = [batch.matrix(list(scoring.experts)).numpy() for batch in done]
    feature, logits = (torch.cat(parts) for parts in zip(*(b.features for b in done), strict=True))
    return Recorded(np.concatenate(rows, axis=1), Features(feature, logits))


def tables(specification: str) -> pd.DataFrame:
    """Near (OOD validation), pseudo-OOD and far-off figures of every candidate on one network."""
    _, id_data, data_root, checkpoint, *normalization = specification.split(":")
    norm = NORMALIZATIONS[normalization[0]] if normalization else None
    net, benchmark = load_network(checkpoint), load_benchmark(id_data, data_root, norm)
    val = torch.cat([images for images, _ in batches(image_loader(benchmark.id["val"]))])
    structure = understand(net, val[:2])
    detectors = {name: FuseNorm(net, s, structure) for name, s in candidates().items()}
    every = Experts()
    for detector in detectors.values():
        every |= detector.scoring().experts
    posthoc = [score for score in every.scores if not isinstance(score, LogitScore)]
    others = tuple(score for score in every.scores if score not in posthoc)
    first = replace(every, scores=others)
    scoring, numbers = Scoring(net, structure, first, features="all"), {}
    for expert in (*first, *posthoc):
        numbers[expert] = len(numbers)
    head = Head(*(t.float() for t in head_of(net, structure)))
    known = recorded(scoring, image_loader(benchmark.id["val"]))
    unknown = recorded(scoring, image_loader(benchmark.val_ood))
    pseudo = {
        kind: recorded(scoring, make(val, torch.Generator().manual_seed(0)).split(200))
        for kind, make in KINDS.items()
    }
    far = {
        name: recorded(scoring, images.split(200))
        for name, images in far_off(250, val.shape[-1], *benchmark.norm)
    }
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in detectors}
    order = np.random.default_rng(0).permutation(len(val))
    for test in np.array_split(order, FOLDS):
        fit = known.part(np.setdiff1d(order, test))
        sums, sample = BlockSums(posthoc), Sample()
        sums.add(fit.features, fit.features.logits.argmax(1))
        sample.add(fit.features)
        states = {score: sums.fit(score, sample, head) for score in posthoc}

        def scored(given: Recorded, of_fit: bool = False, states: Any = states) -> np.ndarray:
            labels = given.features.logits.argmax(1) if of_fit else None
            rows = [score(given.features, head, states[score], labels)[None] for score in posthoc]
            return np.concatenate([given.rows, *(row.numpy() for row in rows)])

        id_fit, id_test, ood = scored(fit, True), scored(known.part(test)), scored(unknown)
        made = [scored(images.part(test)) for images in pseudo.values()]
        probes = [scored(images) for images in far.values()]
        for name, detector in detectors.items():
            rows = [numbers[expert] for expert in detector.rows()]
            detector.with_statistics(detector.learn(id_fit[rows], Fitted()))
            conf = detector.confidence(id_test[rows])
            threshold = np.percentile(conf, 5)
            accepted = [np.mean(detector.confidence(p[rows]) >= threshold) for p in probes]
            aurocs = [ood_metrics(conf, detector.confidence(x[rows])).auroc for x in (ood, *made)]
            found[name].append((aurocs[0], float(np.mean(aurocs[1:])), *accepted))
    figures = {name: 100 * np.mean(values, axis=0) for name, values in found.items()}
    columns = ["near", "pseudo", "far-off"]
    return pd.DataFrame({n: [*v[:2], v[2:].max()] for n, v in figures.items()}, columns).T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--csv", help="also write the table to this file")
    args = parser.parse_args()
    by_network = {text.split(":")[0]: tables(text) for text in args.networks}
    table = pd.concat(by_network, axis=1)
    swapped = table.swaplevel(axis=1)
    table["mean", "near"], table["mean", "pseudo"] = (
        swapped[figure].mean(axis=1) for figure in ("near", "pseudo")
    )
    table["worst", "far-off"] = swapped["far-off"].max(axis=1)
    print(table.round(2).to_string())
    if args.csv:
        table.round(2).to_csv(args.csv)


if __name__ == "__main__":
    main()
