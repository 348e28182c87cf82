"""`fusenorm score`: confidences, p-values and verdicts of image files."""

import math
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fusenorm_openood.cli import options
from fusenorm_openood.cli.detector import add_detector, load_detector
from fusenorm_openood.data.paths import image_paths, manifest_paths
from fusenorm_openood.deployment.files import FileShards, Judged, judge_files
from fusenorm_openood.deployment.ray import cluster, score_with_actors
from fusenorm_openood.deployment.rows import RowFile, read_rows
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.errors import ConfigError
from fusenorm_openood.forward.batches import Pace
from fusenorm_openood.method.conformal import check_enough, rejects, rejects_at_fdr
from fusenorm_openood.report.files import report_of_files
from fusenorm_openood.report.page import check_report, write_report
from fusenorm_openood.storage.torchrun import Process, among_peers, this_process
from fusenorm_openood.storage.urls import Places, place

SOME_UNREADABLE = 3  # exit status


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add_detector(parser)
    add("paths", nargs="*", metavar="PATH", help="folders, patterns, lists, files, URLs, -")
    columns = "column path of a Parquet, CSV, TSV or JSON Lines file, or lines of a text file"
    add("--manifest", metavar="FILE", help=f"files to score: {columns}; a path, pattern or URL")
    verdict = parser.add_mutually_exclusive_group()
    of_id, of_rejected = "share of ID images to accept (0.95)", "share of ID images among the OOD"
    verdict.add_argument("--acceptance", type=options.share, default=0.95, help=of_id)
    verdict.add_argument(
        "--fdr", type=options.share, help=f"{of_rejected}: judges all images together"
    )
    add("--csv", metavar="FILE", help="CSV or .parquet file of rows (default: standard output)")
    add("--report", metavar="FILE", help="also write an HTML page about the rows of --csv")
    add("--resume", action="store_true", help="go on with the rows that --csv already has")
    add("--store", metavar="DIR", help="keep scores of experts here, a folder or a URL")
    add("--engine", choices=("native", "ray"), default="native", help="ray: actors of a cluster")
    cores = "CPU cores of each of Ray's actors (default: 2)"
    add("--cores-per-actor", type=options.positive, default=2, metavar="N", help=cores)
    add("--batch-size", type=options.positive, default=64, help="images per batch (default: 64)")
    options.add_computing(parser)


@among_peers()
def run(args: Namespace) -> int:
    """Judge every file; an unreadable one is a row with the reason.

    Returns:
        0 = all were judged, 3 = some were unreadable; among several processes 0, because `torchrun`
        takes any other status for a failure.
    """
    if args.report:
        check_report(args.report)
        if not args.csv:
            raise ConfigError("--report is about the rows of a file: give --csv FILE")
        if args.fdr is not None:
            raise ConfigError("--report shows verdicts at an acceptance: leave out --fdr")
    detector = load_detector(args)
    n = None if detector.reference_ is None else len(detector.reference_)
    if args.fdr is not None and (n is None or not args.csv):
        lacks = "calibration images: fit with --calibration-dir" if n is None else "a file: --csv"
        raise ConfigError(f"--fdr judges all images together, for which it needs {lacks}")
    process = this_process()
    if n is None and process.leads:
        print("fusenorm: the detector is not calibrated, so there are no verdicts", file=sys.stderr)
    if n is not None and args.fdr is None:
        check_enough(n, args.acceptance)
    _check_store(args, process)
    given, pace = _given(args), Pace()
    if not process.leads:
        return sum(map(len, _judged(args, detector, given, pace)))  # it is given none: 0
    with RowFile(Path(args.csv) if args.csv else None, args.resume) as file:
        _check_same(detector, file)
        paths = Places(path for path in given.texts if path not in file.judged)
        hidden = args.no_progress or not args.csv
        counts = Counter[str]()
        with tqdm(total=len(paths), unit=" images", disable=hidden, leave=False) as bar:
            for rows in _judged(args, detector, paths, pace):
                # A verdict at a false discovery rate needs all images.
                file.write(rows if args.fdr is None else [r._replace(ood=None) for r in rows])
                bar.update(len(rows))
                counts.update(map(_verdict, rows))
        file.finish(lambda p: _verdicts(p, args))
    if args.csv and Path(args.csv).is_file():  # not /dev/stdout, from which nothing comes back
        counts = Counter(map(_verdict, read_rows(Path(args.csv))))
    summary = f"{counts.total()} images: {counts['OOD']} OOD, {counts['unreadable']} unreadable"
    summary += f", {len(file.judged)} judged before" if file.judged else ""
    summary += f"; {pace}" if pace.images else ""
    print(f"fusenorm: {summary}", file=sys.stderr)
    if args.fdr is not None and n is not None and not counts["OOD"]:
        print(
            f"fusenorm: {n} calibration images give no p-value below {1 / (n + 1):.2g}, so an FDR "
            f"of {args.fdr:g} takes {math.ceil(counts.total() / (args.fdr * (n + 1)))} images with "
            "it: calibrate on more, or choose --acceptance",
            file=sys.stderr,
        )
    if args.report:
        facts = (("judged in", args.csv), ("detector file", args.detector))
        report = report_of_files(detector, read_rows(Path(args.csv)), args.acceptance, facts)
        write_report(report, args.report)
    return SOME_UNREADABLE if counts["unreadable"] and process.world == 1 else 0


def _check_store(args: Namespace, process: Process) -> None:
    """Raise ConfigError where a store is missing, or what does not go with it is given."""
    if process.world > 1 and not args.store:
        raise ConfigError(
            f"{process.world} processes meet in a store: give --store DIR, which all can write to"
        )
    if process.world > 1 and "-" in args.paths:
        raise ConfigError(
            f"{process.world} processes cannot read the same standard input: give a list in a file"
        )
    if args.engine == "ray" and (process.world > 1 or not args.store):
        raise ConfigError(
            "engine ray deals the shards of a store to actors: give --store, and no torchrun"
        )
    if args.store and args.resume:
        raise ConfigError("--store goes on with what it has: leave out --resume")


def _given(args: Namespace) -> Places:
    """The files to score, each once."""
    if not (args.paths or args.manifest):
        raise ConfigError("there is nothing to score: give PATH or --manifest FILE")
    listed = manifest_paths(args.manifest) if args.manifest else Places(())
    return Places(chain(image_paths(args.paths).texts, listed.texts))


def _judged(
    args: Namespace, detector: FuseNorm, paths: Places, pace: Pace
) -> Iterator[list[Judged]]:
    how = args.batch_size, args.num_workers, pace
    if not args.store:
        yield from judge_files(detector, paths, args.acceptance, *how)
        return
    files = FileShards(detector, paths, place(args.store), *how)
    if args.engine == "native":
        yield from files.judged(args.acceptance)
        return
    load = partial(load_detector, args)
    with (
        cluster() as ray,
        closing(
            score_with_actors(ray, files, load, args.cores_per_actor, args.device != "cpu")
        ) as done,
    ):
        yield from files.judged(args.acceptance, done)


def _check_same(detector: FuseNorm, file: RowFile) -> None:
    """Raise ConfigError if another detector judged the images of an earlier run."""
    known = file.readable
    if known is None or known.confidence is None or not Path(known.path).is_file():
        return
    ((again,),) = judge_files(detector, [Path(known.path)])
    now, then = again.confidence, known.confidence
    if now is None or not math.isclose(now, then, rel_tol=1e-3, abs_tol=1e-3):
        raise ConfigError(
            f"{file.path} has {then:.6g} as the confidence of {known.path}, which is now "
            f"{'unreadable' if now is None else f'{now:.6g}'}: give another file to --csv, or the "
            "detector and the images of its rows"
        )


def _verdicts(p: NDArray[np.float64], args: Namespace) -> NDArray[np.bool_]:
    return rejects(p, args.acceptance) if args.fdr is None else rejects_at_fdr(p, args.fdr)


def _verdict(row: Judged) -> str:
    return "unreadable" if row.error is not None else "OOD" if row.ood else "accepted"
