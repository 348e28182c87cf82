"""Early exits against the plain classifier: CPU time on streams with more and more OOD images.

    python benchmarks/early.py NAME:ID_DATA:DATA_ROOT:CHECKPOINT[:NORMALIZATION] [--sets svhn noise]
    python benchmarks/early.py --resnet50 DATA_ROOT [--sets texture noise]

The detector is fitted on 6 of 10 validation images and calibrated on the others. Each batch is
judged by the classifier alone, by the whole detector, and with exits that are certain and that
spend the error, in turns; the table has median ratios to the classifier. No more OOD images can
leave than the whole detector rejects. --resnet50 takes torchvision's, untrained, with BatchNorm
statistics of ID images, on the image lists of lite0.py: of it, only the times mean something.
With --memory, in place of times: what the tensors of a batch take at most, in MiB, each way in a
process of its own.
"""

import argparse
import pickle
import time
from functools import partial
from pathlib import Path
from statistics import fmean, median

import torch
import torchvision
from lite0 import benchmark as imagenet
from measure import Isolated, Prepared, Task
from tables import Network, read_network
from torch import Tensor, nn

from fusenorm_openood import FuseNorm
from fusenorm_openood.data.benchmarks import ImageSet, image_loader
from fusenorm_openood.detectors.early import judge_early

SHARES = (0.0, 0.1, 0.5, 0.9)
BATCHES = 2


def read(images: ImageSet, count: int) -> Tensor:
    parts, found = [], 0
    for batch in image_loader(images, batch_size=100):
        parts.append(batch["data"])
        found += len(parts[-1])
        if found >= count:
            break
    return torch.cat(parts)[:count]


def resnet50(data_root: Path) -> Network:
    images = imagenet(data_root, ["caltech", "food"], ["texture", "sketch"])
    torch.manual_seed(0)
    net = torchvision.models.resnet50()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
    with torch.no_grad():
        for batch in read(images.id["val"], 128).split(32):
            net(batch)
    return Network("ResNet-50", net.eval(), images)


def classify(net: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = net(images)
    return logits


def prepared(pickled: bytes) -> Prepared:
    task: Task = pickle.loads(pickled)
    task()
    return Prepared(task)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("network", nargs="?")
    parser.add_argument("--resnet50", type=Path, metavar="DATA_ROOT")
    parser.add_argument("--sets", nargs="+", help="far-OOD sets, or noise; default: all")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    _, net, benchmark = resnet50(args.resnet50) if args.resnet50 else read_network(args.network)
    known = read(benchmark.id["val"], 1000)
    size, used = args.batch, 6 * len(known) // 10
    detector = FuseNorm(net).fit(known[:used].split(size)).calibrate(known[used:].split(size))
    of_id, generator = read(benchmark.id["test"], 256), torch.Generator().manual_seed(0)
    streams = {name: read(images, 256) for name, images in benchmark.far.items()}
    streams["noise"] = torch.randn(of_id.shape, generator=generator)
    ways = {
        "classifier": partial(classify, net.eval()),
        "whole": detector.is_ood,
        "certain": partial(judge_early, detector),
        "spending": partial(judge_early, detector, mode="spending"),
    }
    columns = ["whole", "rejects", "certain", "left", "spending", "left", "verdicts that differ"]
    columns = [*ways] if args.memory else columns
    print(f"| OOD images | share | {' | '.join(columns)} |")
    print("| --- " * (2 + len(columns)) + "|")
    names = args.sets or streams
    for name in names:
        for share in SHARES if name == next(iter(names)) else SHARES[1:]:
            ratios: dict[str, list[float]] = {way: [] for way in ways}
            left: dict[str, list[float]] = {"whole": [], "certain": [], "spending": []}
            differ, ood = 0, round(share * size)
            for _ in range(BATCHES):
                images = torch.cat(
                    [
                        of[torch.randperm(len(of), generator=generator)[:count]]
                        for of, count in ((streams[name], ood), (of_id, size - ood))
                    ]
                )[torch.randperm(size, generator=generator)]
                if args.memory:
                    break
                verdicts = detector.is_ood(images).numpy()
                left["whole"].append(verdicts.mean())
                differ += int((verdicts != judge_early(detector, images).ood).sum())
                for _ in range(args.rounds):
                    seconds = {}
                    for way, run in ways.items():
                        started = time.process_time()
                        done = run(images)
                        seconds[way] = time.process_time() - started
                        if way in ("certain", "spending"):
                            left[way].append(1 - len(done.kept) / size)
                    for way in ways:
                        ratios[way].append(seconds[way] / seconds["classifier"])
            if args.memory:
                tasks = {
                    way: partial(prepared, pickle.dumps(partial(run, images)))
                    for way, run in ways.items()
                }
                with Isolated(tasks, torch.device("cpu")) as isolated:
                    cells = [f"{isolated.peak_mebibytes(way):.0f}" for way in ways]
            else:
                shares = ((median(ratios[way]), fmean(left[way])) for way in list(ways)[1:])
                cells = [*(f"{r:.2f} | {of:.0%}" for r, of in shares), f"{differ}"]
            which = f"| {name if share else 'none'} | {share:.0%} | "
            print(f"{which}{' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
