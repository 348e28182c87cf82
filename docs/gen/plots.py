"""Draw `docs/figures/plots.svg`, every function of `report.plots`, after `fusenorm digits`."""

from pathlib import Path

import numpy as np
import torch
from matplotlib import style
from matplotlib.figure import Figure

from docs.gen.generate import DOCS
from fusenorm_openood import FuseNorm, load_network
from fusenorm_openood.data.benchmarks import load_benchmark
from fusenorm_openood.evaluation.evaluation import evaluate
from fusenorm_openood.method.conformal import conformal_p_values
from fusenorm_openood.report import page, plots
from fusenorm_openood.report.gallery import thumbnail


def main() -> None:
    checkpoint = next(Path("results").glob("digits_*/s0/best.ckpt"))
    benchmark = load_benchmark("digits", Path("data"))
    result = evaluate(FuseNorm(load_network(checkpoint)), benchmark)
    ids = result.sets["id"]["digits"]
    near, far = (list(result.sets[group].values()) for group in ("nearood", "farood"))
    conf = {"near-OOD": np.concatenate([s.conf for s in near])}
    conf["far-OOD"] = np.concatenate([s.conf for s in far])
    calibration, tested = np.sort(ids.conf[::2]), ids.conf[1::2]
    p = {label: conformal_p_values(values, calibration) for label, values in conf.items()}
    images = torch.stack([benchmark.far["china"].images()[n]["data"] for n in range(40)])
    why = result.detector.explain(images)

    with style.context(["default", page.FOLDER / "page.mplstyle", {"svg.hashsalt": "plots"}]):
        canvas = Figure(figsize=(10.5, 6.4), layout="constrained")
        axes = canvas.subplots(2, 3).flatten()
        cut = np.sort(calibration)[int(0.05 * (len(calibration) + 1)) - 1]
        plots.histograms({"ID": ids.conf, **conf}, axes[0], threshold=cut)
        methods = {"FuseNorm": (ids.conf, [s.conf for s in near])}
        for row, name in enumerate(why.experts):
            methods[name] = (ids.experts[row], [s.experts[row] for s in near])
        plots.roc(methods, axes[1])
        own = {"ID, tested": conformal_p_values(tested, calibration)}
        plots.acceptance(own, len(calibration), axes[2])
        plots.rejection(p, len(calibration), axes[3])
        plots.contributions({"china": why.objected}, axes[4])
        plots.heat_map(why, axes[5], picture=thumbnail(images[0], benchmark.norm))
        names = ("histograms", "roc", "acceptance", "rejection", "contributions", "heat_map")
        for ax, name in zip(axes, names, strict=True):
            ax.set_title(f"plots.{name}", family="monospace")
            if len(ax.get_legend_handles_labels()[1]) > 1:
                ax.legend()
        canvas.savefig(DOCS / "figures" / "plots.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
