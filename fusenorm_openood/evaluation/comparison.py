"""One table of many methods on one network, each image scored once for all of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from fusenorm_openood.data.benchmarks import Benchmark, image_loader
from fusenorm_openood.detectors import search
from fusenorm_openood.detectors.bank import ScoreBank
from fusenorm_openood.errors import ConfigError, DataError, unknown
from fusenorm_openood.evaluation.evaluation import with_means
from fusenorm_openood.evaluation.runs import Loader
from fusenorm_openood.method.metrics import ood_metrics
from fusenorm_openood.method.scores import LOGIT_SCORES, SCORES, make_score
from fusenorm_openood.method.scores.base import Features, Head, Score
from fusenorm_openood.method.settings import Settings
from fusenorm_openood.network.running import scoring_module
from fusenorm_openood.network.structure import Structure

Values = NDArray[Any]
Confs = Mapping[str, Mapping[str, Mapping[str, Values]]]  # by group, data set and method

GROUPS = ("nearood", "farood")
DEFAULT = "FuseNorm (default)"  # not the published method
# FuseNorm's rows, in order; each search adds one.
FUSENORM = {
    DEFAULT: Settings(),
    "FuseNorm (published)": Settings.published(),
    "FuseNorm (deviation)": Settings.deviation(),
}
STRONG, BLOCKS = "strong experts alone", "block norms alone"
# pytorch-ood's detectors that work on features: their rows, by name.
PEERS = {"dice": "DICE", "vra": "VRA", "nnguide": "NNGuide", "gradnorm": "GradNorm"}
COUNTS = 2**23  # of bootstrap samples, in memory at a time


class Comparison(NamedTuple):
    """Results of a comparison on one network, in percent.

    `summary` has near- and far-OOD AUROC and FPR@95, the mean rank by AUROC over the data sets, and
    for FuseNorm's rows the 95 % bootstrap interval of the difference in AUROC to the best single
    expert.
    """

    auroc: pd.DataFrame  # one row per method, one column per data set and mean
    fpr95: pd.DataFrame
    summary: pd.DataFrame
    found: dict[str, search.Found]  # results of the searches, by row
    conf: Confs
    structure: Structure  # of the network


def compare(
    net: nn.Module,
    benchmark: Benchmark,
    sweep: dict[str, list[Any]] | None = None,
    fsood: bool = False,
    load: Loader = image_loader,
    progress: bool = True,
    gradients: bool = True,
    methods: Sequence[str] | None = None,
) -> Comparison:
    """Compare FuseNorm, its parts and single experts on one network; see `evaluate`.

    Everything is fitted on the ID validation images alone, in the same forward passes; only ODIN
    and the published settings need `gradients`. With pytorch-ood installed, its DICE, VRA, NNGuide
    and GradNorm are compared as well. Two searches try the values of a `sweep`, one on the
    validation pair and one on pseudo-OOD images. `methods` are the single experts, by the names of
    their postprocessors or of `PEERS`; None = all. ConfigError for one that is unknown, or that
    needs pytorch-ood, which is not installed.
    """
    check_methods(methods or ())
    singles = single_scores(net, benchmark, methods)
    fused = {**FUSENORM, STRONG: Settings(cap=0.0)}
    if not gradients:
        singles = {name: score for name, score in singles.items() if not score.needs_gradient}
        fused = {n: s for n, s in fused.items() if not s.score("output").needs_gradient}
    id_val = load(benchmark.id["val"])
    tried = search.swept(Settings(), sweep) if sweep else []
    wanted = [title for name, title in PEERS.items() if methods is None or name in methods]
    with_peers = wanted != [] and find_spec("pytorch_ood") is not None
    if not (singles or with_peers):
        raise ConfigError("there is no single method to compare with: choose other methods")
    bank = ScoreBank(net, [*fused.values(), *tried], singles.values(), with_peers)
    bank.fit(id_val, progress)
    fitted = _fitted_peers(bank.head(), bank.features(id_val)) if with_peers else {}
    peers = {title: score for title, score in fitted.items() if title in wanted}
    found = {}
    if sweep:
        on: dict[str, Sequence[Iterable[Any]]]
        on = {"validation pair": [load(benchmark.val_ood)], "pseudo-OOD": search.pseudo_ood(id_val)}
        for name, loaders in on.items():
            for images in loaders:
                bank.add(images, progress)
            found[f"FuseNorm (searched, {name})"] = search.choose(bank, Settings(), sweep, loaders)
        fused |= {name: result.settings for name, result in found.items()}
        bank = bank.narrowed(fused.values(), singles.values())
    statistics = bank.statistics(fused[DEFAULT])

    def score(images: Iterable[Any]) -> dict[str, Values]:
        bank.add(images, progress)
        conf = {name: bank.single(single, images) for name, single in singles.items()}
        conf |= {name: peer(bank.features(images)) for name, peer in peers.items()}
        scored = {name: bank.scored(settings, images) for name, settings in fused.items()}
        conf[STRONG] = scored.pop(STRONG).conf
        conf[BLOCKS] = -statistics.joint_distance(scored[DEFAULT].experts)
        bank.forget(images)
        return {**conf, **{name: s.conf for name, s in scored.items()}}

    groups = benchmark.groups(fsood)
    loaders = [load(image_set) for sets in groups.values() for image_set in sets.values()]
    tested = iter(bank.prepare(loaders, progress))
    conf = {group: {name: score(next(tested)) for name in sets} for group, sets in groups.items()}
    figures = tables(id_conf_of(conf), {g: conf[g] for g in GROUPS}, [*singles, *peers])
    return Comparison(*figures, found, conf, bank.scoring().structure)


def id_conf_of(conf: Confs) -> dict[str, Values]:
    """The confidences of all ID test images, covariate-shifted ones last, by method."""
    each = [*conf["id"].values(), *conf["csid"].values()]
    return {method: np.concatenate([one[method] for one in each]) for method in each[0]}


def check_methods(methods: Sequence[str]) -> None:
    """Raise ConfigError for a method that cannot be compared; see `compare`."""
    known = [*(name for name, cls in SCORES.items() if not cls.needs_t2fnorm), *PEERS]
    for name in methods:
        if name not in known:
            raise ConfigError(unknown("method", name, known))
        if name in PEERS and find_spec("pytorch_ood") is None:
            raise ConfigError(
                f"{name} needs pytorch-ood: pip install 'fusenorm-openood[peers]', or leave it out"
            )


def single_scores(
    net: nn.Module, benchmark: Benchmark, methods: Sequence[str] | None = None
) -> dict[str, Score]:
    """The single scores to compare with, by title, with OpenOOD's arguments; None = all."""
    singles = {}
    for name, cls in SCORES.items():
        if methods is not None and name not in methods:
            continue
        fixed: dict[str, Any] = {"input_std": benchmark.norm[1]} if name == "odin" else {}
        # MSP as in OpenOOD, with its ties; other scores of logits in float64.
        if name in LOGIT_SCORES:
            fixed["fused"] = name != "msp"
        if not cls.needs_t2fnorm:
            singles[cls.title] = make_score(name, **fixed)
    if scoring_module(net) is not None:  # T2FNorm's postprocessor is MSP of the scoring logits
        singles = {"MSP (T2FNorm)" if n == "MSP" else n: score for n, score in singles.items()}
    # K is OpenOOD's for 50,000 training images; a few ID validation images have fewer neighbours.
    if "KNN" in singles:
        singles["KNN (K = 5)"] = make_score("knn", {"K": Settings().neighbours})
    return singles


def _fitted_peers(head: Head, ids: Features) -> dict[str, Callable[[Features], Values]]:
    """pytorch-ood's detectors that work on features, fitted on ID images: their scores by title.

    Its default arguments, but DICE keeps the tenth of the weights that contributes most.
    """
    from pytorch_ood import detector  # heavy, and optional

    weight, bias = (t.cpu().float() for t in head)
    linear = nn.Linear(weight.shape[1], len(weight))
    linear.load_state_dict({"weight": weight, "bias": bias})
    labels = ids.logits.argmax(dim=1)
    dice = detector.DICE(None, w=weight, b=bias, p=0.9)
    vra = detector.VRA(None, linear)
    guide = detector.NNGuide(None, linear, k=min(10, len(labels)))
    dice.fit_features(ids.feature, labels)
    vra.fit_feature_maps(ids.feature, labels)
    guide.fit_features(ids.feature, labels)

    def score(predict: Callable[[Tensor], Tensor], batch: Features) -> Values:
        scores = [-predict(part).detach() for part in torch.split(batch.feature, 200)]
        return torch.cat(scores).double().numpy()

    return {
        "DICE": partial(score, dice.predict_features),
        "VRA": partial(score, vra.predict_feature_maps),
        "NNGuide": partial(score, guide.predict_features),
        "GradNorm": partial(score, detector.GradNorm(linear).predict),
    }


def tables(
    id_conf: Mapping[str, Values], ood_conf: Confs, single: Sequence[str]
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """`auroc`, `fpr95` and `summary` of a `Comparison`; `single`: the rows of single experts."""
    metrics = {
        method: with_means(
            {
                group: {n: ood_metrics(conf, scored[method])[:2] for n, scored in sets.items()}
                for group, sets in ood_conf.items()
            }
        )
        for method, conf in id_conf.items()
    }
    fpr95, auroc = (
        pd.DataFrame({m: {n: 100 * v[i] for n, v in row.items()} for m, row in metrics.items()}).T
        for i in (0, 1)
    )
    groups = [group for group in ood_conf if ood_conf[group]]
    summary = pd.DataFrame(index=auroc.index)
    for group in groups:
        summary[f"{group} AUROC"], summary[f"{group} FPR@95"] = auroc[group], fpr95[group]
    summary["rank"] = auroc.drop(columns=groups).rank(ascending=False).mean(axis=1)
    for group in groups:
        confidences = {
            method: Confidences(conf, [scored[method] for scored in ood_conf[group].values()])
            for method, conf in id_conf.items()
        }
        best = str(auroc.loc[list(single), group].idxmax())
        gains = dict.fromkeys(auroc.index, "")
        for method in (m for m in auroc.index if m.startswith("FuseNorm")):
            low, high = difference_interval(confidences[method], confidences[best])
            gains[method] = f"{100 * low:+.2f} to {100 * high:+.2f}"
        summary[f"{group} over {best}"] = pd.Series(gains)
    return auroc, fpr95, summary


class Confidences(NamedTuple):
    """Confidences of one method: of ID images `[N]`, and of each OOD data set `[M]`."""

    id: ArrayLike
    ood: Sequence[ArrayLike]


def difference_interval(
    ours: Confidences, other: Confidences, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap percentile interval of the difference of two methods' mean AUROC over data sets.

    ID images and the images of each OOD data set are drawn with replacement, the same for both
    methods, whose confidences are of the same images in the same order; else DataError. Lower and
    upper end of the interval with this probability, as a difference of AUROCs in [0, 1].
    """
    sizes, others = ([len(np.asarray(c)) for c in (m.id, *m.ood)] for m in (ours, other))
    if sizes != others or len(sizes) < 2 or min(sizes) == 0:
        raise DataError(
            "both methods need confidences of the same ID and OOD images, at least one of each, "
            f"got {sizes} and {others} images"
        )
    generator, gains = np.random.default_rng(seed), []
    step = max(COUNTS // (sizes[0] + max(sizes[1:])), 1)
    for start in range(0, draws, step):
        count = min(step, draws - start)
        drawn_id, gain = _counts(generator, count, sizes[0]), np.zeros(count)
        for a, b, size in zip(ours.ood, other.ood, sizes[1:], strict=True):
            drawn_ood = _counts(generator, count, size)
            gain += _aurocs(ours.id, a, drawn_id, drawn_ood)
            gain -= _aurocs(other.id, b, drawn_id, drawn_ood)
        gains.append(gain / len(ours.ood))
    tail = 50 * (1 - level)
    low, high = np.percentile(np.concatenate(gains), [tail, 100 - tail])
    return float(low), float(high)


def _counts(generator: np.random.Generator, draws: int, images: int) -> Values:
    """How often each of `N` images is in each sample of `N` with replacement: `[draws, N]`."""
    drawn = generator.integers(images, size=(draws, images)) + images * np.arange(draws)[:, None]
    return np.bincount(drawn.ravel(), minlength=draws * images).reshape(draws, images)


def _aurocs(id_conf: ArrayLike, ood_conf: ArrayLike, n: Values, m: Values) -> Values:
    """AUROC of every sample `[draws]`, given how often each image is in it; ties count one half."""
    conf = np.concatenate([np.asarray(id_conf), np.asarray(ood_conf)])
    order = np.argsort(conf)
    _, first = np.unique(conf[order], return_index=True)

    def per_level(counts: Values, before: int) -> Values:
        """How many images of each sample have each value `[draws, V]`."""
        padded = np.pad(counts, ((0, 0), (before, len(conf) - before - counts.shape[1])))
        return np.add.reduceat(padded[:, order], first, axis=1)

    ours, others = per_level(n, 0), per_level(m, n.shape[1])
    below = np.cumsum(others, axis=1) - others / 2
    found: Values = (below * ours).sum(axis=1) / (n.sum(axis=1) * m.sum(axis=1))
    return found
