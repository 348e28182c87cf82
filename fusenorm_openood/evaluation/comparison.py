"""One table of many methods on one network, each image scored once for all of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fusenorm_openood.data.benchmarks import Benchmark
from fusenorm_openood.detectors.bank import ScoreBank
from fusenorm_openood.detectors.pseudo import pseudo_ood
from fusenorm_openood.detectors.search import Found, choose, swept
from fusenorm_openood.evaluation.bootstrap import Confidences, difference_interval
from fusenorm_openood.evaluation.evaluation import with_means
from fusenorm_openood.evaluation.records import Loader, plain_loader
from fusenorm_openood.method.metrics import ood_metrics
from fusenorm_openood.method.scores import LOGIT_SCORES, SCORES, make_score
from fusenorm_openood.method.scores.base import Features, Head, Score
from fusenorm_openood.method.settings import Settings
from fusenorm_openood.network.running import scoring_module
from fusenorm_openood.network.structure import Structure

GROUPS = ("nearood", "farood")
DEFAULT = "FuseNorm (default)"  # not the published method
# FuseNorm's rows, in order; each search adds one.
FUSENORM = {
    DEFAULT: Settings(),
    "FuseNorm (published)": Settings.published(),
    "FuseNorm (deviation)": Settings.deviation(),
}
STRONG, BLOCKS = "strong experts alone", "block norms alone"


class Comparison(NamedTuple):
    """Results of a comparison on one network, in percent.

    Attributes:
        auroc, fpr95: one row per method, one column per data set and mean.
        summary: near- and far-OOD AUROC and FPR@95, mean rank by AUROC over the data sets, and for
            FuseNorm's rows the 95 % bootstrap interval of the difference in AUROC to the best
            single expert.
        found: results of the searches, by row.
        known: confidences of the ID test images, by method.
        unknown: confidences of the OOD images, by group, data set and method.
        structure: how the network is built.
    """

    auroc: pd.DataFrame
    fpr95: pd.DataFrame
    summary: pd.DataFrame
    found: dict[str, Found]
    known: dict[str, NDArray[Any]]
    unknown: dict[str, dict[str, dict[str, NDArray[Any]]]]
    structure: Structure


def compare(
    net: nn.Module,
    benchmark: Benchmark,
    sweep: dict[str, list[Any]] | None = None,
    fsood: bool = False,
    batch_size: int = 200,
    num_workers: int = 0,
    progress: bool = True,
    loader: Loader | None = None,
    gradients: bool = True,
) -> Comparison:
    """Compare FuseNorm, its parts and single experts on one network.

    Everything is fitted on the ID validation images alone, in the same forward passes; only ODIN
    and the published settings need gradients. With pytorch-ood installed, its DICE, VRA, NNGuide
    and GradNorm are compared as well.

    Args:
        net: the network, plain or trained with T2FNorm.
        benchmark: a benchmark whose images all exist.
        sweep: values that two searches try, one on the validation pair and one on pseudo-OOD
            images; None = no search.
        fsood: whether covariate-shifted ID images count as ID.
        batch_size, num_workers: settings of the data loaders.
        progress: whether to show progress bars.
        loader: see `evaluate`.
        gradients: whether ODIN and the published settings, which need gradients, are compared.
    """
    load = loader or plain_loader(batch_size, num_workers)
    singles = single_scores(net, benchmark)
    fused = {**FUSENORM, STRONG: Settings(cap=0.0)}
    if not gradients:
        singles = {name: score for name, score in singles.items() if not score.needs_gradient}
        fused = {n: s for n, s in fused.items() if not s.score("output").needs_gradient}
    id_val = load(benchmark.id["val"])
    tried = swept(Settings(), sweep) if sweep else []
    with_peers = find_spec("pytorch_ood") is not None
    bank = ScoreBank(net, [*fused.values(), *tried], singles.values(), with_peers)
    bank.fit(id_val, progress)
    peers = _fitted_peers(bank.head(), bank.features(id_val)) if with_peers else {}
    found = {}
    if sweep:
        on: dict[str, Sequence[Iterable[Any]]]
        on = {"validation pair": [load(benchmark.val_ood)], "pseudo-OOD": pseudo_ood(id_val)}
        for name, loaders in on.items():
            for images in loaders:
                bank.add(images, progress)
            found[f"FuseNorm (searched, {name})"] = choose(bank, Settings(), sweep, loaders)
        fused |= {name: result.settings for name, result in found.items()}
        bank = bank.narrowed(fused.values(), singles.values())
    statistics = bank.statistics(fused[DEFAULT])

    def score(images: Iterable[Any]) -> dict[str, NDArray[Any]]:
        bank.add(images, progress)
        conf = {name: bank.single(single, images) for name, single in singles.items()}
        conf |= {name: peer(bank.features(images)) for name, peer in peers.items()}
        scored = {name: bank.scored(settings, images) for name, settings in fused.items()}
        conf[STRONG] = scored.pop(STRONG).conf
        conf[BLOCKS] = -statistics.joint_distance(scored[DEFAULT].experts)
        bank.forget(images)
        return {**conf, **{name: s.conf for name, s in scored.items()}}

    groups = dict(zip(GROUPS, (benchmark.near, benchmark.far), strict=True))
    id_sets = [benchmark.id["test"], *(benchmark.csid.values() if fsood else ())]
    every = [*id_sets, *benchmark.near.values(), *benchmark.far.values()]
    tested = iter(bank.prepare([load(image_set) for image_set in every], progress))
    each = [score(next(tested)) for _ in id_sets]
    known = {method: np.concatenate([conf[method] for conf in each]) for method in each[0]}
    unknown = {
        group: {name: score(next(tested)) for name in image_sets}
        for group, image_sets in groups.items()
    }
    figures = tables(known, unknown, [*singles, *peers])
    return Comparison(*figures, found, known, unknown, bank.scoring().structure)


def single_scores(net: nn.Module, benchmark: Benchmark) -> dict[str, Score]:
    """The single scores to compare with, by title, with OpenOOD's arguments."""
    singles = {}
    for name, cls in SCORES.items():
        fixed: dict[str, Any] = {"input_std": benchmark.norm[1]} if name == "odin" else {}
        # MSP as in OpenOOD, with its ties; other scores of logits in float64.
        if name in LOGIT_SCORES:
            fixed["fused"] = name != "msp"
        if not cls.needs_t2fnorm:
            singles[cls.title] = make_score(name, **fixed)
    if scoring_module(net) is not None:  # T2FNorm's postprocessor is MSP of the scoring logits
        singles = {"MSP (T2FNorm)" if n == "MSP" else n: score for n, score in singles.items()}
    # K is OpenOOD's for 50,000 training images; a few ID validation images have fewer neighbours.
    return {**singles, "KNN (K = 5)": make_score("knn", {"K": Settings().neighbours})}


def _fitted_peers(head: Head, ids: Features) -> dict[str, Callable[[Features], NDArray[Any]]]:
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

    def score(predict: Callable[[Tensor], Tensor], batch: Features) -> NDArray[Any]:
        scores = [-predict(part).detach() for part in torch.split(batch.feature, 200)]
        joined: NDArray[Any] = torch.cat(scores).double().numpy()
        return joined

    return {
        "DICE": partial(score, dice.predict_features),
        "VRA": partial(score, vra.predict_feature_maps),
        "NNGuide": partial(score, guide.predict_features),
        "GradNorm": partial(score, detector.GradNorm(linear).predict),
    }


def tables(
    known: Mapping[str, NDArray[Any]],
    unknown: Mapping[str, Mapping[str, Mapping[str, NDArray[Any]]]],
    single: Sequence[str],
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """`auroc`, `fpr95` and `summary` of a `Comparison`; `single`: the rows of single experts."""
    metrics = {
        method: with_means(
            {
                group: {n: ood_metrics(conf, scored[method])[:2] for n, scored in sets.items()}
                for group, sets in unknown.items()
            }
        )
        for method, conf in known.items()
    }
    fpr95, auroc = (
        pd.DataFrame({m: {n: 100 * v[i] for n, v in row.items()} for m, row in metrics.items()}).T
        for i in (0, 1)
    )
    groups = [group for group in unknown if unknown[group]]
    summary = pd.DataFrame(index=auroc.index)
    for group in groups:
        summary[f"{group} AUROC"], summary[f"{group} FPR@95"] = auroc[group], fpr95[group]
    summary["rank"] = auroc.drop(columns=groups).rank(ascending=False).mean(axis=1)
    for group in groups:
        confidences = {
            method: Confidences(conf, [scored[method] for scored in unknown[group].values()])
            for method, conf in known.items()
        }
        best = str(auroc.loc[list(single), group].idxmax())
        gains = dict.fromkeys(auroc.index, "")
        for method in (m for m in auroc.index if m.startswith("FuseNorm")):
            low, high = difference_interval(confidences[method], confidences[best])
            gains[method] = f"{100 * low:+.2f} to {100 * high:+.2f}"
        summary[f"{group} over {best}"] = pd.Series(gains)
    return auroc, fpr95, summary
