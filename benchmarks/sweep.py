"""Time of a search relative to one plain inference on the two validation loaders.

    python benchmarks/sweep.py [--images 400] [--threads 2]

Prints seconds and their ratio for each output expert, from one run on this machine.
The network is OpenOOD's ResNet-18 for 32x32 images with random weights; the images are noise.
"""

import argparse
import time

import torch
from torch.utils.data import DataLoader, TensorDataset

from fusenorm_openood import FuseNorm
from fusenorm_openood.detectors.search import candidates, search
from fusenorm_openood.method.settings import Settings
from fusenorm_openood.network import ResNet18_32x32

SWEEP = {
    "k_min": [0.05, 0.1],
    "alpha": [0.0, 0.5],
    "weights": [(0.1, 1.0), (0.2, 1.0), (0.3, 1.0), (0.5, 1.0), (1.0, 1.0)],
    "base": [2.0, 3.0, 5.0, 10.0, 20.0],
    "cap": [0.5, 1.0],
}
EXPERTS = {
    "energy": Settings.published(output="energy", react_percentile=None),
    "energy+react": Settings.published(output="energy"),
    "odin+react": Settings.published(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=400, help="images in each of the two loaders")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    net = ResNet18_32x32(10).eval()
    loaders = [
        DataLoader(TensorDataset(torch.randn(args.images, 3, 32, 32)), batch_size=100)
        for _ in range(2)
    ]
    print(f"torch {torch.__version__}, {args.threads} threads, 2 x {args.images} images of 32x32")
    for name, settings in EXPERTS.items():
        detector = FuseNorm(net, settings).fit(loaders[0])
        plain = seconds(lambda d=detector: [d.infer(loader) for loader in loaders])
        searched = seconds(lambda s=settings: search(net, s, SWEEP, *loaders))
        print(
            f"{name:13}{len(candidates(settings, SWEEP))} combinations: inference {plain:.1f} s, "
            f"search {searched:.1f} s, ratio {searched / plain:.2f}",
            flush=True,
        )


def seconds(task) -> float:
    started = time.perf_counter()
    task()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
