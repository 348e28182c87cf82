"""Early exits against the plain classifier: CPU time on streams with more and more OOD images.

    python -m benchmarks.early NAME:ID_DATA:DATA_ROOT:CHECKPOINT[:NORMALIZATION] [--sets svhn noise]

The detector is fitted on 600 validation images and calibrated on the other 400. Each batch is
judged by the classifier alone, by the whole detector, and with exits that are certain and that
spend the error, in turns; the table has median ratios to the classifier.
"""

import argparse
import time
from statistics import median

import torch
from torch import Tensor

from benchmarks.tables import read_network
from fusenorm_openood import FuseNorm
from fusenorm_openood.data.benchmarks import ImageSet, image_loader
from fusenorm_openood.detectors.early import judge_early

SHARES = (0.0, 0.1, 0.5, 0.9)
BATCH, BATCHES = 64, 2


def read(images: ImageSet, count: int) -> Tensor:
    parts, found = [], 0
    for batch in image_loader(images, batch_size=100):
        parts.append(batch["data"])
        found += len(parts[-1])
        if found >= count:
            break
    return torch.cat(parts)[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network")
    parser.add_argument("--sets", nargs="+", help="far-OOD sets, or noise; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    _, net, benchmark = read_network(args.network)
    known = read(benchmark.id["val"], 1000)
    detector = FuseNorm(net).fit([known[:600]]).calibrate([known[600:]])
    of_id, generator = read(benchmark.id["test"], 256), torch.Generator().manual_seed(0)
    noise = torch.randn(of_id.shape, generator=generator)
    streams = {name: read(images, 256) for name, images in benchmark.far.items()}
    streams["noise"] = noise
    ways = {
        "classifier": net.eval(),
        "whole": detector.is_ood,
        "certain": lambda images: judge_early(detector, images),
        "spending": lambda images: judge_early(detector, images, mode="spending"),
    }
    print(
        "| OOD images | share | whole | certain | left | spending | left | verdicts that differ |"
    )
    print("| --- " * 8 + "|")
    for name in args.sets or streams:
        for share in SHARES if name == next(iter(args.sets or streams)) else SHARES[1:]:
            ratios: dict[str, list[float]] = {way: [] for way in ways}
            left: dict[str, list[float]] = {"certain": [], "spending": []}
            differ = 0
            for _ in range(BATCHES):
                size = round(share * BATCH)
                of_ood, rest = (
                    torch.randperm(256, generator=generator)[:n] for n in (size, BATCH - size)
                )
                images = torch.cat([streams[name][of_ood], of_id[rest]])
                images = images[torch.randperm(BATCH, generator=generator)]
                differ += int(
                    (detector.is_ood(images).numpy() != judge_early(detector, images).ood).sum()
                )
                for _ in range(args.rounds):
                    seconds = {}
                    for way, run in ways.items():
                        started = time.process_time()
                        with torch.no_grad():
                            done = run(images)
                        seconds[way] = time.process_time() - started
                        if way in left:
                            left[way].append(1 - len(done.kept) / BATCH)
                    for way in ways:
                        ratios[way].append(seconds[way] / seconds["classifier"])
            whole, certain, spending = (f"{median(ratios[way]):.2f}" for way in list(ways)[1:])
            gone = {way: f"{sum(of) / len(of):.0%}" for way, of in left.items()}
            print(
                f"| {name if share else 'none'} | {share:.0%} | {whole} | {certain} | "
                f"{gone['certain']} | {spending} | {gone['spending']} | {differ} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
