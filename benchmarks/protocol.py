"""How the default settings were chosen: candidates on validation images alone; see docs/results.md.

    python benchmarks/protocol.py [--csv FILE] NAME:ID_DATA:DATA_ROOT:CHECKPOINT[:NORMALIZATION] ...

Every candidate is fitted on random draws of 100, 200, 400 and 800 ID validation images and tested
on the other ones, against the OOD validation images, folders of others (--near, --far),
and images that are far off: noise, constant and saturated images at four contrasts.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fusenorm_openood import FuseNorm, Settings, load_network
from fusenorm_openood.data.benchmarks import image_loader, load_benchmark
from fusenorm_openood.data.images import read_image
from fusenorm_openood.data.preprocessing import NORMALIZATIONS
from fusenorm_openood.detectors.fitting import BlockSums, Sample, leave_one_out
from fusenorm_openood.forward.batches import batches
from fusenorm_openood.forward.experts import BatchScores, Experts, Fitted, Scoring
from fusenorm_openood.forward.passes import head_of
from fusenorm_openood.method.metrics import ood_metrics
from fusenorm_openood.method.scores import make_score
from fusenorm_openood.method.scores.base import Features, Head, LogitScore, Score
from fusenorm_openood.network.understanding import understand

SIZES, DRAWS = (100, 200, 400, 800), 3
SUFFIXES = (".png", ".jpg", ".jpeg")
CONTRASTS = (1, 3, 10, 100)
PEERS = ("msp", "mls", "ebo", "gen", "nci", "fdbd", "knn", "mds++", "vim", "logitgap")
STRONG = (
    ("output", "gen", "fdbd", "head_mds"),
    ("output", "logitgap", "fdbd", "head_mds"),
    ("output", "fdbd", "head_mds"),
    ("gen", "fdbd", "head_mds"),
    ("logitgap", "gen", "fdbd", "head_mds"),
    ("output", "gen", "nci", "head_mds"),
    ("output", "gen", "fdbd", "nci", "head_mds"),
    ("output", "logitgap", "gen", "fdbd", "head_mds"),
    ("output", "gen", "fdbd", "head_mds", "mds++"),
    ("output", "gen", "fdbd", "mds++"),
    ("output", "gen", "fdbd", "rmds++"),
    ("output", "fdbd", "mds++"),
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
    found = {"default before 0.3.0": Settings.deviation()}
    for strong, trust in itertools.product(STRONG, (True, False)):
        name = f"{'+'.join(strong)}{'' if trust else ', no trust'}"
        for margin in (2, 2.5, 3, 3.5):
            settings = Settings(strong=strong, trust=trust, joint_margin=margin)
            found[f"{name}, joint {margin:g}"] = settings
        for base, cap in itertools.product((2, 3, 5), (3.3,)):
            changes = {"penalty": "deviation", "base": base, "cap": cap}
            settings = Settings(strong=strong, trust=trust, **changes)
            found[f"{name}, deviation {base}"] = settings
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


def others(folders: Sequence[str], transform: Any) -> dict[str, list[Tensor]]:
    """Batches of the images of folders, by folder."""
    found = {}
    for folder in folders:
        files = sorted(f for f in Path(folder).rglob("*") if f.suffix.lower() in SUFFIXES)
        images = torch.stack([transform(read_image(file)) for file in files])
        found[folder] = list(images.split(200))
    return found


def tables(specification: str, near: Sequence[str], far: Sequence[str]) -> pd.DataFrame:
    """Near-, far- and far-off figures of every candidate on one network, by images of the fit."""
    _, id_data, data_root, checkpoint, *normalization = specification.split(":")
    norm = NORMALIZATIONS[normalization[0]] if normalization else None
    net, benchmark = load_network(checkpoint), load_benchmark(id_data, data_root, norm)
    loader = image_loader(benchmark.id["val"])
    structure = understand(net, next(batches(loader))[0][:2])
    detectors = {name: FuseNorm(net, s, structure) for name, s in candidates().items()}
    peers = {name: _peer(name) for name in PEERS}
    every = Experts(scores=tuple(peers.values()))
    for detector in detectors.values():
        every |= detector.all_experts
    posthoc = [score for score in every.scores if not isinstance(score, LogitScore)]
    first = replace(every, scores=tuple(s for s in every.scores if s not in posthoc))
    scoring = Scoring(net, structure, first, features="all")
    numbers = {expert: row for row, expert in enumerate((*first, *posthoc))}
    head = Head(*(t.float() for t in head_of(net, structure)))
    transform = benchmark.id["val"].transform
    known = recorded(scoring, loader)
    size = next(batches(loader))[0].shape[-1]
    sets = {
        "near": [image_loader(benchmark.val_ood), *others(near, transform).values()],
        "far": list(others(far, transform).values()),
        "off": [images.split(200) for _, images in far_off(250, size, *benchmark.norm)],
    }
    unknown = {kind: [recorded(scoring, x) for x in each] for kind, each in sets.items()}
    rows = {}
    images = known.rows.shape[1]
    for count, draw in itertools.product((n for n in SIZES if n < images), range(DRAWS)):
        order = np.random.default_rng(1000 * count + draw).permutation(images)
        fit, test = known.part(order[:count]), known.part(order[count:])
        sums, sample = BlockSums(posthoc), Sample()
        sums.add(fit.features, fit.features.logits.argmax(1))
        sample.add(fit.features)
        fitted = Fitted(states={score: sums.fit(score, sample, head) for score in posthoc})
        complete = replace(scoring, experts=every, fitted=fitted)

        def scored(given: Recorded, of_fit: bool = False, by: Any = complete) -> np.ndarray:
            of_rows = dict(zip(first, torch.from_numpy(given.rows), strict=True))
            batch = BatchScores(of_rows, given.features.logits.argmax(1), given.features)
            batch = leave_one_out(by, batch) if of_fit else by.complete(batch)
            return batch.matrix(list(numbers)).numpy()

        id_fit, id_test = scored(fit, True), scored(test)
        ood = {kind: [scored(x) for x in each] for kind, each in unknown.items()}

        def figures(conf: Callable[[np.ndarray], np.ndarray], ood: Any, id_test: Any) -> Any:
            of_id = conf(id_test)
            threshold = np.percentile(of_id, 5)
            auroc = {
                kind: np.mean([ood_metrics(of_id, conf(x)).auroc for x in ood[kind]])
                for kind in ("near", "far")
                if ood[kind]
            }
            off = max(np.mean(conf(x) >= threshold) for x in ood["off"])
            return {**auroc, "far-off": off}

        for name, score in peers.items():
            row = numbers[score]
            rows[name, count, draw] = figures(lambda x, r=row: x[r], ood, id_test)
        for name, detector in detectors.items():
            of = [numbers[expert] for expert in detector.rows]
            detector.with_statistics(detector.learn(id_fit[of], fitted))
            conf: Any = lambda x, d=detector, of=of: d.confidence(x[of])  # noqa: E731
            rows[name, count, draw] = figures(conf, ood, id_test)
    table = 100 * pd.DataFrame(rows).T
    table.index.names = ["candidate", "images", "draw"]
    return table.groupby(level=[0, 1], sort=False).mean()


def _peer(name: str) -> Score:
    return make_score(name, {"K": 5} if name == "knn" else None)


def margins(table: pd.DataFrame) -> pd.Series:
    """The worst margin of each candidate over the numbers of images, on one network."""
    worst = {}
    for count, part in table.groupby(level="images"):
        part = part.droplevel("images")
        energy, best = part.loc["ebo"], part.loc[list(PEERS), "near"].max()
        before = part.loc["default before 0.3.0"]
        enough = count > 200
        of = [part["near"] - energy["near"] - 0.3 * enough]
        if enough:
            of.append(part["near"] - best + 0.5)
        if "far" in part:
            of.append(part["far"] - np.minimum(before["far"] - 0.3, energy["far"] + 3))
        worst[count] = pd.concat(of, axis=1).min(axis=1)
    return pd.DataFrame(worst).min(axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--near", nargs="*", default=[], help="folders of further near-OOD images")
    parser.add_argument("--far", nargs="*", default=[], help="folders of far-OOD images")
    parser.add_argument("--csv", help="also write the table to this file")
    args = parser.parse_args()
    found = {text.split(":")[0]: tables(text, args.near, args.far) for text in args.networks}
    by_network = {name: table.groupby(level=0, sort=False).mean() for name, table in found.items()}
    result = pd.concat(by_network, axis=1)
    result["worst", "margin"] = pd.DataFrame({n: margins(t) for n, t in found.items()}).min(axis=1)
    off = result.xs("far-off", axis=1, level=1)
    result["worst", "far-off"] = off.max(axis=1)
    print(result.round(2).to_string())
    if args.csv:
        result.round(2).to_csv(args.csv)


if __name__ == "__main__":
    main()
