"""What the full ImageNet benchmarks and an archive of images cost: measured parts, assumed GPUs.

    python benchmarks/extrapolate.py [--resnet18 4500] [--resnet50 1500] [--slowdown 1.2]
        [--cores 12] [--price 2.5] [--startup 30] [--archive 1e9] [--manifest 1e7] [--measured DIR]

Prints the Markdown tables of docs/measured/large.md. What was measured is read from the files
that `imagenet.py --json DIR` writes; every option but --measured is an assumption.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from costs import Assumed, evaluation, scoring, sets_of

MEASURED = Path(__file__).parent / "results" / "large"
GPUS = (1, 8, 64)
TITLES = {"imagenet200": "ImageNet-200, ResNet-18", "imagenet": "ImageNet-1k, ResNet-50"}


def duration(seconds: float) -> str:
    """A duration with the unit in which it is easy to read."""
    for unit, length, most in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 72)):
        if seconds / length < most:
            return f"{seconds / length:.{1 if unit == 'h' else 0}f} {unit}"
    return f"{seconds / 86400:.0f} days"


def bytes_of(count: float) -> str:
    gib = count / 2**30
    return f"{gib:.1f} GiB" if gib < 1024 else f"{gib / 1024:.1f} TiB"


def cost(seconds: float, gpus: int, a: Assumed) -> tuple[str, str]:
    """GPU-hours, and what they cost."""
    hours = gpus * seconds / 3600
    return f"{hours:,.2f}" if hours < 10 else f"{hours:,.0f}", f"{hours * a.price:,.2f}"


def run_table(measured: Mapping[str, Any], a: Assumed) -> Iterator[Sequence[object]]:
    """The runs at a share of the images, as they were measured."""
    yield "run", "processes", "images", "seconds", "waiting", "peak MiB", "as one process"
    for name in filter(measured.get, TITLES):
        for row in measured[name]["rows"]:
            run = f"{TITLES[name]} ({row['network']}), {row['job']}", row["processes"]
            formats = {"images": ",d", "seconds": ".0f", "waiting": ".0%", "peak MiB": ",.0f"}
            values = ("" if row[key] is None else format(row[key], f) for key, f in formats.items())
            yield *run, *values, {True: "equal", False: "different"}.get(row["equal"], "")


def part_table(measured: Mapping[str, Any], a: Assumed) -> Iterator[Sequence[object]]:
    """What the estimates are made of, as it was measured."""
    shown = (
        ("images decoded and resized per second and core", 1, ".0f", "loaded_per_second"),
        ("bytes of an image file, mean", 1, ",.0f", "bytes_per_jpeg"),
        ("bytes per image in the store, `eval`", 1, ",.0f", "eval", "bytes_per_image"),
        ("bytes per image in the store, `score`", 1, ",.0f", "score", "bytes_per_image"),
        ("ms to write a shard of `eval`", 1e6, ".1f", "eval", "write_seconds_per_image"),
        ("ms to read it", 1e6, ".1f", "eval", "read_seconds_per_image"),
        ("µs to list and hash a file, each process", 1e6, ".0f", "list_seconds_per_image"),
        ("µs to open a file, first process", 1e6, ".0f", "open_seconds_per_image"),
        ("µs to sum up an image for `mds`, each process", 1e6, ".0f", "fit_seconds_per_image"),
        ("µs to judge an image, driver of `score`", 1e6, ".0f", "driver_seconds_per_image"),
        ("bytes in memory per listed file, driver", 1, ".0f", "driver_bytes_per_image"),
    )
    names = [*filter(measured.get, TITLES)]
    yield "measured", *(TITLES[name] for name in names)
    for title, scale, form, *keys in shown:
        values = []
        for name in names:
            value = measured[name]["parts"]["base"]
            for key in keys:
                value = value[key]
            values.append(format(scale * value, form))
        yield title, *values
    cores = (f"{on_one_core(measured[name]['rows']):.1f}" for name in names)
    yield "images loaded and scored per second on one core", *cores


def cases(measured: Mapping[str, Any]) -> Iterator[tuple[str, str, list[int], int, Any]]:
    """Benchmark, what is run, numbers of images in its lists, those of the fit, measured parts."""
    for name in filter(measured.get, TITLES):
        parts = measured[name]["parts"]["base"]
        for job, fsood, train in (("OOD", 0, 0), ("FS-OOD", 1, 0), ("OOD, `mds`", 0, 1)):
            counts = sets_of(name, bool(fsood), bool(train))
            yield name, job, counts, counts[0] * train, parts


def time_table(measured: Mapping[str, Any], a: Assumed) -> Iterator[Sequence[object]]:
    yield "run", "images", "GPUs", "scoring", "start and end", "GPU-hours", "cost", "limit"
    for name, job, counts, fitted, parts in cases(measured):
        for gpus in GPUS:
            found = evaluation(name, counts, gpus, fitted, parts, a)
            times = duration(found.scoring), duration(found.rest)
            run = f"{TITLES[name]}, {job}", f"{sum(counts):,}"
            yield *run, gpus, *times, *cost(found.seconds, gpus, a), found.limit


def disk_table(measured: Mapping[str, Any], a: Assumed) -> Iterator[Sequence[object]]:
    yield "run", "images", "image files", "store", "one core, no GPU"
    for name, job, counts, _, parts in cases(measured):
        images = sum(counts)
        files = bytes_of(images * parts["bytes_per_jpeg"])
        store = bytes_of(images * parts["eval"]["bytes_per_image"])
        alone = duration(images / on_one_core(measured[name]["rows"]))
        yield f"{TITLES[name]}, {job}", f"{images:,}", files, store, alone


def on_one_core(rows: Iterable[Mapping[str, Any]]) -> float:
    """Images per second that one process with one thread and no GPU loads and scores."""
    seconds = {
        row["job"]: (row["images"], row["seconds"])
        for row in rows
        if row["processes"] == "one" and row["network"] == "base"
    }
    images, scored = seconds["OOD"]
    return float(images / (scored - seconds["FS-OOD again"][1]))


def archive_table(measured: Mapping[str, Any], a: Assumed) -> Iterator[Sequence[object]]:
    yield "GPUs", "time", "of which before scoring", "GPU-hours", "cost", "files read", "limit"
    parts = measured["imagenet"]["parts"]["base"]
    for gpus in GPUS:
        found = scoring(gpus, parts, a)
        rate = parts["bytes_per_jpeg"] * a.archive / found.scoring / 1e9
        times = duration(found.seconds), duration(found.rest)
        yield gpus, *times, *cost(found.seconds, gpus, a), f"{rate:.2f} GB/s", found.limit


def archive_disk_table(measured: Mapping[str, Any], a: Assumed) -> Iterator[Sequence[object]]:
    yield "image files", "store", "CSV rows", "runs", "memory of the driver for a list"
    parts, n = measured["imagenet"]["parts"]["base"], a.archive
    files = [parts["bytes_per_jpeg"], parts["score"]["bytes_per_image"], parts["row_bytes"]]
    memory = bytes_of(a.manifest * parts["driver_bytes_per_image"])
    yield *(bytes_of(n * each) for each in files), f"{n / a.manifest:,.0f}", memory


def tables(measured: Mapping[str, Any], a: Assumed) -> dict[str, str]:
    """All tables by name, in Markdown: what was measured, then what follows from it."""
    made = {
        "runs": run_table(measured, a),
        "parts": part_table(measured, a),
        "time": time_table(measured, a),
        "disk": disk_table(measured, a),
    }
    if "imagenet" in measured:
        made["archive"] = archive_table(measured, a)
        made["archive-disk"] = archive_disk_table(measured, a)
    return {name: markdown(rows) for name, rows in made.items()}


def markdown(rows: Iterable[Sequence[object]]) -> str:
    head, *body = ([str(cell) for cell in row] for row in rows)
    return "\n".join("| " + " | ".join(r) + " |" for r in (head, ["---"] * len(head), *body))


def read_measured(folder: Path = MEASURED) -> dict[str, Any]:
    """What was measured, by benchmark."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for field in fields(Assumed):
        parser.add_argument(f"--{field.name}", type=float, default=field.default)
    parser.add_argument("--measured", type=Path, default=MEASURED)
    given = vars(parser.parse_args())
    measured = read_measured(given.pop("measured"))
    print("\n\n".join(tables(measured, Assumed(**given)).values()))


if __name__ == "__main__":
    main()
