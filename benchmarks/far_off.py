"""How much of what is far off each digits network accepts.

    python benchmarks/far_off.py [--csv FILE] NAME:DATA_ROOT:CHECKPOINT ...

Accepted is what is as confident as 95 % of the ID test images. The images have no content: noise,
one colour, saturated pixels, and patterns of more than the contrast of ID images; see `far_off`.
"""

import argparse
import math
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import torch
from torch import Generator, Tensor

from fusenorm_openood import FuseNorm, Settings, load_network
from fusenorm_openood.data.benchmarks import image_loader, load_benchmark
from fusenorm_openood.method.metrics import ood_metrics

METHODS = {"fusenorm": Settings(), "fusenorm_deviation": Settings.deviation()}
COUNT, SIZE = 100, 24


def drawn(*shape: int) -> Callable[[Generator], Tensor]:
    return lambda g: torch.rand(COUNT, *shape, generator=g)


def stripes(g: Generator) -> Tensor:
    period = torch.randint(1, 9, (COUNT, 1, 1, 1), generator=g)
    return (torch.arange(SIZE).expand(COUNT, 1, SIZE, SIZE) // period % 2).float()


def checkerboards(g: Generator) -> Tensor:
    lines = stripes(g)
    return (lines - lines.transpose(2, 3)).abs()


def gradients(g: Generator) -> Tensor:
    angle = 2 * math.pi * torch.rand(COUNT, 1, 1, 1, generator=g)
    x = torch.linspace(-0.5, 0.5, SIZE)
    return 0.5 + (x * angle.cos() + x.unsqueeze(1) * angle.sin()) / math.sqrt(2)


# Pixels from 0 to 1 of each kind, and the contrasts at which it is far off.
KINDS: dict[str, tuple[Callable[[Generator], Tensor], tuple[int, ...]]] = {
    "uniform noise": (drawn(3, SIZE, SIZE), (1, 3, 10, 100)),
    "Gaussian noise": (
        lambda g: 0.5 + 0.25 * torch.randn(COUNT, 3, SIZE, SIZE, generator=g),
        (1, 3, 10, 100),
    ),
    "one colour": (drawn(3, 1, 1), (1, 3, 10, 100)),
    "one grey": (drawn(1, 1, 1), (1, 3, 10, 100)),
    "saturated": (lambda g: drawn(3, SIZE, SIZE)(g).round(), (1, 3, 10, 100)),
    "saturated colour": (lambda g: drawn(3, 1, 1)(g).round(), (1, 3, 10, 100)),
    "grey noise": (drawn(1, SIZE, SIZE), (1, 3, 10, 100)),
    "salt and pepper": (lambda g: drawn(1, SIZE, SIZE)(g).round(), (1, 3, 10, 100)),
    "stripes": (stripes, (3, 10, 100)),
    "checkerboards": (checkerboards, (3, 10, 100)),
    "gradients": (gradients, (3, 10, 100)),
}


def far_off() -> Iterator[tuple[str, Tensor]]:
    """Normalised images `[100, 3, 24, 24]` by kind and contrast, about mid-grey and from black."""
    for kind, (draw, contrasts) in KINDS.items():
        x = draw(Generator().manual_seed(0)).expand(COUNT, 3, SIZE, SIZE)
        for contrast in contrasts:
            yield f"{kind} x {contrast}", contrast * (x - 0.5) / 0.5
            yield f"{kind} x {contrast}, from black", contrast * x


def measured(data_root: str, checkpoint: str) -> dict[str, dict[str, object]]:
    """Figures of one network, by method."""
    benchmark, net = load_benchmark("digits", data_root), load_network(checkpoint)
    sets = {"ID": benchmark.id["test"], **benchmark.near, **benchmark.far}
    found = {}
    for method, settings in METHODS.items():
        detector = FuseNorm(net, settings).fit(image_loader(benchmark.id["val"]))
        conf = {name: detector.infer(image_loader(s)).conf for name, s in sets.items()}
        threshold = np.percentile(conf["ID"], 5)
        accepted = {
            name: 100 * float((detector.score(images) >= threshold).double().mean())
            for name, images in far_off()
        }
        worst = max(accepted, key=lambda name: accepted[name])
        auroc = {n: 100 * ood_metrics(conf["ID"], c).auroc for n, c in conf.items() if n != "ID"}
        found[method] = {
            "accepted": accepted[worst],
            "most": worst if accepted[worst] else "",
            "above 1 %": sum(share > 1 for share in accepted.values()),
            "near": np.mean([auroc[name] for name in benchmark.near]),
            "far": np.mean([auroc[name] for name in benchmark.far]),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--csv", help="also write the table to this file")
    args = parser.parse_args()
    rows = {}
    for text in args.networks:
        name, data_root, checkpoint = text.split(":")
        for method, figures in measured(data_root, checkpoint).items():
            rows[name, method] = figures
    table = pd.DataFrame(rows).T
    table.index.names = ["network", "method"]
    print(table.to_string(float_format="{:.2f}".format))
    if args.csv:
        table.map(lambda v: v if isinstance(v, str) else round(v, 2)).to_csv(args.csv)


if __name__ == "__main__":
    main()
