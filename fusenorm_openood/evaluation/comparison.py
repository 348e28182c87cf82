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
from fusenorm_openood.detectors.baselines import BASELINES, default_args, output_of
from fusenorm_openood.detectors.pseudo import pseudo_ood
from fusenorm_openood.detectors.search import Found, choose
from fusenorm_openood.detectors.sweep import swept
from fusenorm_openood.evaluation.bootstrap import Confidences, difference_interval
from fusenorm_openood.evaluation.evaluation import with_means
from fusenorm_openood.evaluation.records import Loader, plain_loader
from fusenorm_openood.method.experts import Output
from fusenorm_openood.method.joint import joint_penalty
from fusenorm_openood.method.metrics import ood_metrics
from fusenorm_openood.method.posthoc import POSTHOC, Head, Posthoc, Seen
from fusenorm_openood.method.settings import Settings
from fusenorm_openood.network.running import scoring_module
from fusenorm_openood.network.structure import Structure

GROUPS = ("nearood", "farood")
# FuseNorm's rows, in order; each search adds one.
FUSENORM = {
    "FuseNorm": Settings(),
    "FuseNorm (published)": Settings.published(),
    "FuseNorm (joint)": Settings.joint(),
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
    """
    load = loader or plain_loader(batch_size, num_workers)
    outputs, experts = _single_experts(net, benchmark)
    fused = {**FUSENORM, STRONG: Settings(cap=0.0)}
    id_val = load(benchmark.id["val"])
    tried = swept(Settings(), sweep) if sweep else []
    with_peers = find_spec("pytorch_ood") is not None
    bank = ScoreBank(net, [*fused.values(), *tried], outputs.values(), experts.values(), with_peers)
    bank.fit(id_val, progress)
    peers = _fitted_peers(bank.head(), bank.seen(id_val)) if with_peers else {}
    found = {}
    if sweep:
        on: dict[str, Sequence[Iterable[Any]]]
        on = {"validation pair": [load(benchmark.val_ood)], "pseudo-OOD": pseudo_ood(id_val)}
        for name, loaders in on.items():
            for images in loaders:
                bank.add(images, progress)
            found[f"FuseNorm (searched, {name})"] = choose(bank, Settings(), sweep, loaders)
        fused |= {name: result.settings for name, result in found.items()}
        bank = bank.narrowed(fused.values(), outputs.values(), experts.values())
    joint, structure = bank.calibration(fused["FuseNorm (joint)"]).joint, bank.known_structure
    assert joint is not None  # its settings have the joint penalty
    assert structure is not None  # the bank is fitted

    def score(images: Iterable[Any]) -> dict[str, NDArray[Any]]:
        bank.add(images, progress)
        conf = {name: bank.output(output, images) for name, output in outputs.items()}
        conf |= {name: bank.posthoc(expert, images) for name, expert in experts.items()}
        conf |= {name: peer(bank.seen(images)) for name, peer in peers.items()}
        scored = {name: bank.scored(settings, images) for name, settings in fused.items()}
        conf[STRONG] = scored.pop(STRONG).conf
        norms = scored["FuseNorm (joint)"].experts[: len(joint.mean)]
        conf[BLOCKS] = -joint_penalty(norms, joint)
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
    figures = tables(known, unknown, [*outputs, *experts, *peers])
    return Comparison(*figures, found, known, unknown, structure)


def _single_experts(
    net: nn.Module, benchmark: Benchmark
) -> tuple[dict[str, Output], dict[str, Posthoc]]:
    """The single experts to compare with, by title, with OpenOOD's arguments."""
    outputs = {
        kind.title: output_of(name, default_args(name), benchmark.norm[1])
        for name, kind in BASELINES.items()
        if name != "t2fnorm"
    }
    if scoring_module(net) is not None:  # T2FNorm's postprocessor is MSP of the scoring logits
        outputs = {"MSP (T2FNorm)" if n == "MSP" else n: output for n, output in outputs.items()}
    posthoc = {kind.title: Posthoc.of(name) for name, kind in POSTHOC.items()}
    # K is OpenOOD's for 50,000 training images; a few ID validation images have fewer neighbours.
    return outputs, {**posthoc, "KNN (K = 5)": Posthoc.of("knn", {"K": Settings().neighbours})}


def _fitted_peers(head: Head, seen: Seen) -> dict[str, Callable[[Seen], NDArray[Any]]]:
    """pytorch-ood's detectors that work on features, fitted on ID images: their scores by title.

    Its default arguments, but DICE keeps the tenth of the weights that contributes most.
    """
    from pytorch_ood import detector  # heavy, and optional

    weight, bias = (t.cpu().float() for t in head)
    linear = nn.Linear(weight.shape[1], len(weight))
    linear.load_state_dict({"weight": weight, "bias": bias})
    labels = seen.logits.argmax(dim=1)
    dice = detector.DICE(None, w=weight, b=bias, p=0.9)
    vra = detector.VRA(None, linear)
    guide = detector.NNGuide(None, linear, k=min(10, len(labels)))
    dice.fit_features(seen.feature, labels)
    vra.fit_feature_maps(seen.feature, labels)
    guide.fit_features(seen.feature, labels)

    def score(predict: Callable[[Tensor], Tensor], seen: Seen) -> NDArray[Any]:
        scores = [-predict(part).detach() for part in torch.split(seen.feature, 200)]
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
