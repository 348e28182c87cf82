"""Measure what large runs are made of: loading, scoring, several processes, shards, memory.

    python benchmarks/scale.py [--images 4000] [--rounds 3] [--only loading processes table memory]

Images are crops of scikit-learn's two photographs, made or written on the fly; networks have random
weights. Leave the machine otherwise idle. One thread per process, as `torchrun` sets it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader, Dataset

from fusenorm_openood import FuseNorm
from fusenorm_openood.cli.main import main as cli
from fusenorm_openood.data.images import read_image
from fusenorm_openood.data.preprocessing import NORMALIZATIONS, Preprocessing
from fusenorm_openood.deployment.files import ReadableFiles
from fusenorm_openood.forward.recorded import RecordedLoader
from fusenorm_openood.network import ResNet18_32x32, ResNet18_224x224
from fusenorm_openood.storage.shards import Key, ShardSet
from fusenorm_openood.storage.torchrun import this_process, wait_until

PARTS = ("loading", "processes", "table", "memory")


class Crops(Dataset[dict[str, Any]]):
    """Crops `[3, size, size]` of photographs, the same for the same number."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self.photographs = [torch.from_numpy(p.copy()) for p in load_sample_images().images]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Any]:
        photograph = self.photographs[number % 2]
        top, left = (number * step % (side - self.size) for step, side in ((7, 427), (13, 640)))
        crop = photograph[top : top + self.size, left : left + self.size]
        return {"data": crop.permute(2, 0, 1).float() / 127.5 - 1, "label": number % 10}


def detector(width: int = 64) -> FuseNorm:
    torch.manual_seed(0)
    return FuseNorm(ResNet18_32x32(num_classes=10, width=width).eval())


def loading(images: int, rounds: int) -> None:
    """JPEG files of 500 x 375 pixels, ImageNet's mean size, decoded and resized to 224."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{number}.jpg") for number in range(200)]
        photographs = load_sample_images().images
        for number, path in enumerate(paths):
            crop = photographs[number % 2][number % 50 : number % 50 + 375, number : number + 500]
            Image.fromarray(crop).save(path, quality=90)
        how = (224, 224), "bilinear", *NORMALIZATIONS["imagenet"]
        files, without_resizing = (
            ReadableFiles(paths, Preprocessing(256, *how)),
            Preprocessing(224, *how),
        )
        cropped = [read_image(path).resize((224, 224)) for path in paths]
        loader = DataLoader(files, 50)
        found = FuseNorm(ResNet18_224x224().eval()).fit(loader)
        whole, decode, rest, scored = (
            per_image(work, rounds)
            for work in (
                lambda: [files[number] for number in range(200)],
                lambda: [read_image(path) for path in paths],
                lambda: [without_resizing(image) for image in cropped],
                lambda: found.score_loader(loader),
            )
        )
    resize = whole - decode - rest
    print(
        f"loading: {1 / whole:.0f} JPEG files per second and core, of whose time decoding takes "
        f"{decode / whole:.0%}, resizing and cropping {resize / whole:.0%} and the rest "
        f"{rest / whole:.0%}; {1 / scored:.0f} with a ResNet-18"
    )


def per_image(work: Callable[[], object], rounds: int, images: int = 200) -> float:
    """Processor seconds per image, the median over the rounds."""
    seconds = []
    for _ in range(rounds):
        started = time.process_time()
        work()
        seconds.append((time.process_time() - started) / images)
    return float(np.median(seconds))


def processes(images: int, rounds: int) -> None:
    """The same set of images, recorded by one process and by two."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for count in seconds:
            seconds[count].append(float(in_processes(count, "worker", images)["seconds"]))
    one, two = (float(np.median(times)) for times in seconds.values())
    print(
        f"processes: {images / one:.0f} images per second with one process, {images / two:.0f} "
        f"with two: {one / two:.2f} times as fast"
    )


def in_processes(count: int, job: str, images: int) -> dict[str, float]:
    """What the leading one of several processes of this script measures."""
    with tempfile.TemporaryDirectory() as store:
        command = ["torchrun", "--standalone", "--nproc-per-node", str(count)]
        command += [__file__, "--job", job, "--images", str(images), "--store", store]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def worker(images: int, store: Path) -> None:
    """Record the scores of a set of images, from the moment at which all processes are ready."""
    process, found = this_process(), detector()
    few = RecordedLoader(Crops(4, 32), store / "few", {}, "few")
    found.fit(few)  # understands the network, compiles the kernel
    ready = store / f"ready-{process.rank}"
    ready.touch()
    wait_until(lambda: len(list(store.glob("ready-*"))) == process.world)
    started = time.perf_counter()
    found.infer(RecordedLoader(Crops(images, 32), store / "scores", {}, "crops"))
    if process.leads:
        print(json.dumps({"seconds": time.perf_counter() - started}))


def table(images: int, rounds: int) -> None:
    """A million rows of 12 scores, written and read back."""
    rows, shard = 10**6, 1000
    with tempfile.TemporaryDirectory() as store:
        shards = ShardSet(Path(store), Key({}, "table", rows, shard))
        scores = np.random.default_rng(0).normal(size=(shard, 12))
        started = time.perf_counter()
        for number in range(shards.key.shard_count):
            shards.write(number, {"scores": scores + number})
        written = time.perf_counter()
        shards.load()
        read = time.perf_counter() - written
    print(f"table: a million rows written in {written - started:.1f} s, read in {read:.1f} s")


def memory(images: int, rounds: int) -> None:
    """Peak memory of one process with few images and with a hundred times as many."""
    for job, title in (("recorded", "recorded pass"), ("files", "fusenorm score --manifest")):
        few, many = (in_processes(1, job, n)["mebibytes"] for n in (images, 100 * images))
        each = (many - few) * 2**20 / (99 * images)
        print(
            f"memory, {title}: {few:.0f} MiB at the peak with {images:,} images, {many:.0f} with "
            f"{100 * images:,}: {many / few:.3f} times, {each:.0f} bytes per image"
        )
        sys.stdout.flush()


def recorded(images: int, store: Path) -> None:
    """What is heard of images of 8 x 8 pixels, shard by shard."""
    found = detector(width=4)
    found.fit(RecordedLoader(Crops(200, 8), store, {}, "few"))
    loader = RecordedLoader(Crops(images, 8), store, {}, "tiny")
    for scored in loader.observed(found.net, found._listener(recorded=True), False, ""):
        del scored
    say_peak()


def files(images: int, store: Path) -> None:
    """`fusenorm score` of one file of 8 x 8 pixels, under as many names as there are images."""
    from PIL import Image

    crops = (store / "crops").absolute()
    for number in range(1000):
        (crops / str(number)).mkdir(parents=True)
    for number in range(20):
        crop = ((Crops(20, 8)[number]["data"] + 1) * 127.5).byte().permute(1, 2, 0).numpy()
        Image.fromarray(crop).save(crops / f"{number}.png")
    with (store / "manifest.txt").open("w") as file:
        for number in range(images):
            file.write(f"crops/{number // 1000}/../{number % 1000}/../{number % 20}.png\n")
    torch.save(detector(width=4).net.state_dict(), store / "net.ckpt")
    quick = ["--num-workers", "0", "--no-progress", "--device", "cpu", "--batch-size", "200"]
    fit = ["fit", "--weights", store / "net.ckpt", "--id-dir", crops, "--image-size", 8]
    fit += ["--resize", 8, "--normalization", "digits", "--output", store / "detector.st"]
    score = ["score", "--detector", store / "detector.st", "--manifest", store / "manifest.txt"]
    score += ["--store", store / "scores", "--csv", store / "rows.csv"]
    for argv in (fit, score):
        if cli([*map(str, argv), *quick]):
            sys.exit("a command failed")
    say_peak()


def say_peak() -> None:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"mebibytes": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--job", choices=("worker", "recorded", "files"), help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        globals()[args.job](args.images, args.store)
        return
    torch.set_num_threads(1)
    for part in args.only:
        globals()[part](args.images, args.rounds)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
