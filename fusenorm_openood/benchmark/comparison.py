"""One table of several methods on one network, each image scored once for all of them."""

from typing import Any, NamedTuple

import pandas as pd
from numpy.typing import NDArray
from torch import nn

from fusenorm_openood.benchmark.tables import with_means
from fusenorm_openood.data.benchmarks import Benchmark, ImageSet, image_loader
from fusenorm_openood.detectors.bank import ScoreBank
from fusenorm_openood.detectors.baselines import BASELINES, default_args, output_of
from fusenorm_openood.detectors.search import Found, choose
from fusenorm_openood.detectors.sweep import swept
from fusenorm_openood.method.metrics import ood_metrics
from fusenorm_openood.method.settings import Settings
from fusenorm_openood.networks.t2fnorm import has_scoring_logits

SINGLE = ("msp", "ebo", "odin", "react")  # single experts to compare with FuseNorm
GRADIENT_FREE: dict[str, list[Any]] = {
    "output": ["msp", "mls", "energy"],
    "react_percentile": [None, 85.0, 90.0, 95.0],
}


class Comparison(NamedTuple):
    """AUROC in percent `[methods, data sets]`, and the results of the two searches."""

    table: pd.DataFrame
    found: dict[str, Found]


def compare(
    net: nn.Module,
    benchmark: Benchmark,
    sweep: dict[str, list[Any]],
    batch_size: int = 200,
    num_workers: int = 0,
    progress: bool = True,
) -> Comparison:
    """Compare single experts on one network with FuseNorm, as published and as searched.

    Args:
        net: the network, plain or trained with T2FNorm.
        benchmark: a benchmark whose images all exist.
        sweep: values that both searches try on the validation pair; the search without gradients
            also varies the output expert and ReAct.
        batch_size, num_workers: settings of the data loaders.
        progress: whether to show progress bars.
    """

    def loader(image_set: ImageSet) -> Any:
        return image_loader(image_set, batch_size, num_workers)

    pair = loader(benchmark.id["val"]), loader(benchmark.val_ood)
    published = Settings()
    baselines = {
        BASELINES[name].title: output_of(name, default_args(name), benchmark.norm[1])
        for name in SINGLE
    }
    searches = {
        "FuseNorm, searched": (published, sweep),
        "FuseNorm, searched, no gradient": (Settings(output="energy"), {**sweep, **GRADIENT_FREE}),
    }
    tried = [settings for search in searches.values() for settings in swept(*search)]
    wide = ScoreBank(net, [published, *tried], baselines.values())
    wide.fit(pair[0], progress).add(pair[1], progress)
    found = {name: choose(wide, *search, pair[1]) for name, search in searches.items()}
    fused = {"FuseNorm, published": published, **{n: f.settings for n, f in found.items()}}
    bank = wide.narrowed(fused.values(), baselines.values())

    def score(image_set: ImageSet) -> dict[str, NDArray[Any]]:
        images = loader(image_set)
        bank.add(images, progress)
        conf = {name: bank.output(output, images) for name, output in baselines.items()}
        if has_scoring_logits(net):  # T2FNorm's postprocessor is MSP of the scoring logits
            conf = {"MSP (T2FNorm)" if name == "MSP" else name: c for name, c in conf.items()}
        conf |= {name: bank.scored(settings, images).conf for name, settings in fused.items()}
        bank.forget(images)
        return conf

    known = score(benchmark.id["test"])

    def aurocs(image_set: ImageSet) -> list[float]:
        unknown = score(image_set)
        return [100 * ood_metrics(known[m], unknown[m]).auroc for m in known]

    groups = {"nearood": benchmark.near, "farood": benchmark.far}
    rows = with_means(
        {group: {name: aurocs(s) for name, s in sets.items()} for group, sets in groups.items()}
    )
    return Comparison(pd.DataFrame(rows, list(known)), found)
