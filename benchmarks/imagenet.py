"""OpenOOD's ImageNet benchmarks end to end, on simulated images at a share of their counts.

    python benchmarks/imagenet.py [--benchmarks imagenet200 imagenet] [--kinds base t2fnorm]
        [--share 0.01] [--fitted imagenet200] [--skip-ray] [--root DIR] [--json DIR]

Lists have OpenOOD's names and a share of their counts, images the usual sizes: see simulated.py.
Shards are smaller by the same share, so that a run deals out as many as a full one does. Each job
runs as one process, as two under torchrun or on Ray's actors, with one thread per process and an
empty store for each. Tables, rows and shards must be equal in every digit and byte, and no image
may be scored twice; else the exit status is 1. Times are only meaningful on an idle machine.
With --root, images, networks and stores are kept, of which another run only takes the images. What
--json has of kinds of network that are not run is kept.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import parts
import torch
from simulated import write_images, write_network

from fusenorm_openood.cli.main import main as fusenorm
from fusenorm_openood.data.benchmarks import Benchmark, ImageSet, load_benchmark
from fusenorm_openood.deployment import files as sharded
from fusenorm_openood.forward import recorded
from fusenorm_openood.storage.shards import decode


class Case(NamedTuple):
    """A benchmark with a network, and where their files are."""

    benchmark: Benchmark
    kind: str
    checkpoint: Path
    folder: Path
    shard: int  # images


class Job(NamedTuple):
    """A command of `fusenorm`, and how many images it has to score."""

    name: str
    command: list[str]
    images: int


class Done(NamedTuple):
    """A job that was run, and all that must not depend on how."""

    row: dict[str, Any]
    results: dict[str, bytes | str]


def run_job(case: Case, job: Job, engine: str, home: Path) -> Done:
    """Run a job on an engine, `one`, `two` or `ray`, with its store and its files in a folder."""
    store, printed = home / "store", home / job.name
    printed.mkdir(parents=True)
    command = [*job.command, "--store", str(store), "--device", "cpu", "--num-workers", "0"]
    command += ["--no-progress"]
    command += ["--output-dir" if job.command[0] == "eval" else "--csv", str(printed / "result")]
    command += ["--engine", "ray", "--cores-per-actor", "1"] * (engine == "ray")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    start = [sys.executable, *torchrun * (engine == "two"), __file__]
    before, begun = shard_files(store), time.perf_counter()
    with (printed / "out").open("w") as out, (printed / "err").open("w") as err:
        process = subprocess.Popen(
            [*start, "--fusenorm", str(case.shard), *command],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=out,
            stderr=err,
        )
        _, status, usage = os.wait4(process.pid, 0)  # of this process and those that it started
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds, said = time.perf_counter() - begun, (printed / "err").read_text()
    if process.returncode:
        raise SystemExit(f"{job.name}, {engine}: status {process.returncode}\n{said}")
    after = shard_files(store)
    new = [store / name for name in after.keys() - before.keys()]
    images = sum(len(decode(file.read_bytes())[1]["pred"]) for file in new)
    waited = re.search(r"(\d+)% of the time was spent waiting", said)
    row = {
        "benchmark": case.benchmark.name,
        "network": case.kind,
        "job": job.name,
        "processes": engine,
        "images": images,
        "seconds": seconds,
        "images/s": images / seconds,
        "waiting": int(waited[1]) / 100 if waited else None,
        "peak MiB": usage.ru_maxrss / 1024,
        "bytes/image": sum(file.stat().st_size for file in new) / max(images, 1),
        "as planned": images == job.images and before.items() <= after.items(),
    }
    text = (printed / "out").read_text().replace(str(home), "")
    written = {str(f.relative_to(home)): f.read_bytes() for f in printed.rglob("result*/**/*.csv")}
    rows = printed / "result"
    written |= {"rows": rows.read_bytes()} if rows.is_file() else {}
    print(f"{row['benchmark']} {row['network']} {job.name} {engine}: {seconds:.0f} s", flush=True)
    return Done(row, {"text": text, **written, **after})


def shard_files(store: Path) -> dict[str, bytes]:
    """The bytes of all shards of images in a store."""
    return {str(file.relative_to(store)): file.read_bytes() for file in parts.shards_in(store)}


def compared(case: Case, jobs: Sequence[Job], engines: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Run jobs one after another in one store per engine; the rows say whether all is equal."""
    first: list[Done] = []
    for engine in engines:
        home = case.folder / jobs[0].name / engine
        done = [run_job(case, job, engine, home) for job in jobs]
        first = first or done
        for mine, one in zip(done, first, strict=True):
            yield {**mine.row, "equal": "" if mine is one else mine.results == one.results}


def count(image_sets: Sequence[ImageSet]) -> int:
    return sum(len(image_set.images()) for image_set in image_sets)


def evaluations(case: Case) -> list[Job]:
    """OOD, then FS-OOD, which adds the covariate-shifted images."""
    b = case.benchmark
    command = ["eval", "--engine", "native", "--id-data", b.name, "--data-root", str(b.data_root)]
    command += ["--root", str(case.checkpoint.parent.parent), "--save-csv"]
    tested, shifted = count([*b.tested()]), count([*b.csid.values()])
    return [
        Job("OOD", command, tested),
        Job("FS-OOD", [*command, "--fsood"], shifted),
    ]


def fitted_evaluation(case: Case) -> Job:
    """OOD with a detector that is fitted on all training images."""
    ood, b = evaluations(case)[0], case.benchmark
    images = ood.images + count([b.id["train"]]) - count([b.id["val"]])
    return Job("mds++", [*ood.command, "--postprocessor", "mds++"], images)


def scoring(case: Case) -> Job:
    """All files that the benchmark tests, with a detector fitted on its ID validation images."""
    b, detector = case.benchmark, case.folder / "detector.safetensors"
    lists = {"id.txt": [b.id["val"]], "files.txt": [*b.tested(fsood=True)]}
    for name, image_sets in lists.items():
        files = [s.data_dir / entry.name for s in image_sets for entry in s.images().entries]
        (case.folder / name).write_text("".join(f"{file}\n" for file in files))
    fit = ["fit", "--weights", str(case.checkpoint), "--id-dir", str(case.folder / "id.txt")]
    fit += ["--resize", str(b.pre_size), "--image-size", str(b.image_size), "--normalization"]
    fit += ["imagenet", "--output", str(detector), "--device", "cpu", "--no-progress"]
    subprocess.run(
        [sys.executable, __file__, "--fusenorm", str(case.shard), *fit],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    command = ["score", "--detector", str(detector), "--manifest", str(case.folder / "files.txt")]
    return Job("score", command, count(lists["files.txt"]))


def parts_of(case: Case) -> dict[str, Any]:
    """What is measured of the parts of these jobs."""
    image_sets = [*case.benchmark.tested(fsood=True)]
    heard, scores = (
        parts.shard_of(case.folder / job / "one" / "store") for job in ("OOD", "score")
    )
    files, detector = case.folder / "files.txt", case.folder / "detector.safetensors"
    return {
        **parts.loading(image_sets),
        **parts.checking(image_sets),
        **parts.fitting(heard),
        **parts.driving(files, detector, scores),
        "eval": parts.storing(heard),
        "score": parts.storing(scores),
    }


def cases(args: argparse.Namespace, root: Path) -> Iterator[Case]:
    """Write the images and the networks of each benchmark, and say how many."""
    shard = max(1, round(recorded.SHARD * args.share))
    for name in args.benchmarks:
        benchmark = load_benchmark(name, root / "data")
        image_sets = [s for s in benchmark.every() if s != benchmark.id["train"]]
        image_sets += [benchmark.id["train"]] * (name in args.fitted)
        begun = time.perf_counter()
        images = sum(write_images(benchmark, s, args.share) for s in dict.fromkeys(image_sets))
        print(f"{name}: {images:,} images written in {time.perf_counter() - begun:.0f} s")
        for kind in args.kinds:
            runs = root / "runs" / f"{name}_{kind}"
            checkpoint = write_network(benchmark, kind, runs)
            yield Case(benchmark, kind, checkpoint, root / "jobs" / f"{name}_{kind}", shard)


def measured_before(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """What an earlier run has measured of other kinds of network at the same share."""
    found: dict[str, Any] = {"share": args.share, "rows": [], "parts": {}}
    path = args.json / f"{name}.json" if args.json else None
    if path and path.exists() and (before := json.loads(path.read_text()))["share"] == args.share:
        found["rows"] = [row for row in before["rows"] if row["network"] not in args.kinds]
        found["parts"] = {k: of for k, of in before["parts"].items() if k not in args.kinds}
    return found


def measured(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Run all jobs of all cases; returns what was measured, by benchmark."""
    found = {name: measured_before(args, name) for name in args.benchmarks}
    shutil.rmtree(root / "jobs", ignore_errors=True)
    for case in cases(args, root):
        name, two = case.benchmark.name, ("one", "two")
        rows: list[dict[str, Any]] = found[name]["rows"]
        rows += compared(case, evaluations(case), two)
        again = Job("FS-OOD again", evaluations(case)[1].command, 0)  # runs no network
        rows.append({**run_job(case, again, "one", case.folder / "OOD" / "one").row, "equal": ""})
        if name in args.fitted and case.kind == args.kinds[0]:
            rows += compared(case, [fitted_evaluation(case)], two)
        rows += compared(case, [scoring(case)], ("one",) if args.skip_ray else ("one", "ray"))
        found[name]["parts"][case.kind] = parts_of(case)
        if args.json:
            args.json.mkdir(parents=True, exist_ok=True)
            (args.json / f"{name}.json").write_text(json.dumps(found[name], indent=1) + "\n")
    return found


def main() -> int:
    if sys.argv[1:2] == ["--fusenorm"]:  # a process that was started by `run_job`
        recorded.SHARD = sharded.SHARD = int(sys.argv[2])
        return fusenorm(sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__)
    names, kinds = ("imagenet200", "imagenet"), ("base", "t2fnorm")
    parser.add_argument("--benchmarks", nargs="+", choices=names, default=names)
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--share", type=float, default=0.01, help="of the benchmarks' counts")
    help = "benchmarks in which mds is also evaluated, fitted on the training images"
    parser.add_argument("--fitted", nargs="*", choices=names, default=names[:1], help=help)
    parser.add_argument("--skip-ray", action="store_true")
    parser.add_argument("--root", type=Path, help="keep images, networks, stores in this folder")
    parser.add_argument("--json", type=Path, metavar="DIR", help="write DIR/BENCHMARK.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.skip_ray and find_spec("ray") is None:
        print("RAY IS NOT INSTALLED, SO ITS RUNS ARE SKIPPED: pip install ray", file=sys.stderr)
        args.skip_ray = True
    with tempfile.TemporaryDirectory() as folder:
        found = measured(args, (args.root or Path(folder)).resolve())
    table = pd.DataFrame([row for one in found.values() for row in one["rows"]])
    formats = {"seconds": "{:.1f}", "images/s": "{:.1f}", "waiting": "{:.0%}"}
    formats |= {"peak MiB": "{:.0f}", "bytes/image": "{:,.0f}"}
    print(table.to_string(index=False, formatters={k: v.format for k, v in formats.items()}))
    good = all(row["as planned"] and row["equal"] in ("", True) for row in table.to_dict("records"))
    print(
        "All tables, rows and shards are equal, and no image was scored twice."
        if good
        else "NOT ALL IS EQUAL OR AS PLANNED: see the last two columns."
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
