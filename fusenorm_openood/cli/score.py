"""`fusenorm score`: confidences, p-values and verdicts of image files."""

import csv
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from tqdm import tqdm

from fusenorm_openood.cli import options
from fusenorm_openood.cli.fit import source_network
from fusenorm_openood.data.paths import image_paths
from fusenorm_openood.detectors.folder import Judged, judge_files
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.detectors.storage import read_contents
from fusenorm_openood.devices import find_device
from fusenorm_openood.errors import ConfigError, DataError
from fusenorm_openood.method.conformal import check_enough

SOME_UNREADABLE = 3  # exit status


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--detector", required=True, metavar="FILE", help="what `fusenorm fit` has saved")
    add("paths", nargs="+", metavar="PATH", help="folders, patterns, image lists (.txt), files, -")
    add("--acceptance", type=_share, default=0.95, help="share of ID images to accept (0.95)")
    add("--csv", metavar="FILE", help="write the rows to this file (default: standard output)")
    add("--resume", action="store_true", help="go on with the rows that --csv already has")
    options.add_network(parser)
    add("--weights", metavar="FILE", help="checkpoint (default: where `fit` found it)")
    add("--batch-size", type=options.positive, default=64, help="images per batch (default: 64)")
    options.add_computing(parser)


def run(args: Namespace) -> int:
    """Judge every file; an unreadable one is a row with the reason.

    Returns:
        0 = all were judged, 3 = some were unreadable.
    """
    device = find_device(args.device)
    source = read_contents(Path(args.detector)).record.get("source") or {}
    size = source.get("image_size")
    net = source_network(
        args.network or source.get("network"),
        args.weights or source.get("weights"),
        None if size is None else int(size),
    )
    detector = FuseNorm.load(args.detector, net.to(device))
    if detector.reference_ is None:
        print("fusenorm: the detector is not calibrated, so there are no verdicts", file=sys.stderr)
    else:
        check_enough(len(detector.reference_), args.acceptance)
    done = _judged_before(args)
    paths = [path for path in image_paths(args.paths) if str(path) not in done]
    judged = judge_files(detector, paths, args.acceptance, args.batch_size, args.num_workers)
    unreadable = rejected = 0
    with ExitStack() as stack:
        out: IO[str] = sys.stdout
        if args.csv:
            mode = "a" if done else "w"
            try:
                out = stack.enter_context(Path(args.csv).open(mode, encoding="utf-8", newline=""))
            except OSError as error:
                raise ConfigError(
                    f"{args.csv} cannot be written ({error.strerror}): give another file to --csv"
                ) from None
        writer = csv.writer(out)
        if not done:
            writer.writerow(Judged._fields)
        hidden = args.no_progress or not args.csv
        with tqdm(total=len(paths), unit=" images", disable=hidden, leave=False) as bar:
            for rows in judged:
                try:
                    writer.writerows(map(_row, rows))
                    out.flush()
                except OSError as error:
                    raise DataError(
                        f"{args.csv or 'standard output'} cannot be written ({error.strerror}): "
                        "make room, then go on with --resume"
                    ) from None
                bar.update(len(rows))
                unreadable += sum(row.error is not None for row in rows)
                rejected += sum(bool(row.ood) for row in rows)
    summary = f"{len(paths)} images: {rejected} OOD, {unreadable} unreadable"
    summary += f", {len(done)} judged before" if done else ""
    print(f"fusenorm: {summary}", file=sys.stderr)
    return SOME_UNREADABLE if unreadable else 0


def _row(judged: Judged) -> Iterable[object]:
    return ("" if value is None else value for value in judged)


def _judged_before(args: Namespace) -> set[str]:
    """The paths in the rows of an earlier run; a row that was cut short is removed."""
    if not args.resume:
        return set()
    if not args.csv:
        raise ConfigError("--resume goes on with a file: give --csv FILE")
    path = Path(args.csv)
    if not path.exists():
        return set()
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    rows = list(csv.reader(whole.splitlines()))
    if rows and tuple(rows[0]) != Judged._fields:
        raise ConfigError(
            f"{path} was not written by this version of fusenorm score: give another file to --csv"
        )
    if whole != text:
        path.write_text(whole, encoding="utf-8", newline="")
    return {row[0] for row in rows[1:]}


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise ArgumentTypeError(f"must be a number in (0, 1), got {text!r}")
    return value
