"""`fusenorm score`: confidences, p-values and verdicts of image files; `fusenorm report`."""

import logging
import math
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from fusenorm_openood.cli import inputs, options
from fusenorm_openood.data.paths import each_page, image_paths, manifest_paths
from fusenorm_openood.deployment.files import FileShards, Judged, check_judging, judge_files
from fusenorm_openood.deployment.ray import cluster, score_with_actors
from fusenorm_openood.deployment.rows import RowFile, read_rows
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.errors import ConfigError
from fusenorm_openood.forward.batches import Throughput
from fusenorm_openood.method.conformal import fewest_rejections, rejects, rejects_at_fdr
from fusenorm_openood.report.files import report_of_files
from fusenorm_openood.report.page import check_report, write_report
from fusenorm_openood.storage.files import check_file
from fusenorm_openood.storage.torchrun import among_peers, this_process
from fusenorm_openood.storage.urls import Places, Url, place, split_page

log = logging.getLogger(__name__)

SOME_UNREADABLE = 3  # exit status


def add_score(parser: ArgumentParser) -> None:
    parser.epilog = "Exit status: 0 = all were judged, 1 = error, 3 = some files are unreadable."
    options.add(parser, *options.DETECTOR)
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH", help="folders, patterns, lists, files, URLs, -")
    options.add(parser, "--pages")
    columns = "column path of a Parquet, CSV, TSV or JSON Lines file, or lines of a text file"
    add("--manifest", metavar="FILE", help=f"files to score: {columns}; a path, pattern or URL")
    verdict = parser.add_mutually_exclusive_group()
    options.add(verdict, "--acceptance")
    at_fdr = "share of ID images among the OOD: judges all images together"
    verdict.add_argument("--fdr", type=options.fraction, help=at_fdr)
    reject = "reject images before the network has finished, without a class"
    for option, mode, how in (
        ("--early", "certain", "with the same verdicts"),
        ("--early-spending", "spending", "more of them, at the same acceptance of ID images"),
    ):
        add(option, dest="early", action="store_const", const=mode, help=f"{reject}: {how}")
    add("--csv", metavar="FILE", help="CSV or .parquet file of rows (default: standard output)")
    options.add(parser, "--report", help="also write an HTML page about the rows of --csv")
    add("--resume", action="store_true", help="go on with the rows that --csv already has")
    stored = "store scores of experts here, a folder or a URL"
    options.add(parser, "--store", default=None, help=stored)
    add("--engine", choices=("native", "ray"), default="native", help="ray: actors of a cluster")
    cores = "CPU cores of each of Ray's actors (default: 2)"
    add("--cores-per-actor", type=options.positive, default=2, metavar="N", help=cores)
    options.add(parser, "--batch-size", default=64, help="images per batch (default: 64)")
    options.add(parser, *options.COMPUTING)


@among_peers()
def run_score(args: Namespace) -> int:
    """Judge every file; an unreadable one is a row with the reason.

    0 = all were judged, 3 = some were unreadable; among several processes 0, because `torchrun`
    takes any other status for a failure.
    """
    process, throughput = this_process(), Throughput()
    if args.report:
        check_report(args.report)
    inputs.store_of(args.store)
    _check_options(args, process.world)
    if args.csv and process.leads and Path(args.csv).absolute().parent.is_dir():
        check_file(Path(args.csv), "--csv", ".csv", ".tsv", ".parquet")
    load = partial(inputs.load_detector, *inputs.of_detector(args))
    detector = load()
    known = detector.calibration_
    if known is None and args.fdr is not None:
        raise ConfigError(
            "--fdr judges all images together, for which it needs calibration images: fit with "
            "--calibration-dir"
        )
    if known is None and process.leads:
        log.warning("the detector is not calibrated, so there are no verdicts")
    if known is not None and args.fdr is None:
        known.check_enough(args.acceptance)
    check_judging(detector, args.acceptance, args.early)
    listed = manifest_paths(args.manifest).texts if args.manifest else ()
    given = each_page(Places(chain(image_paths(args.paths).texts, listed)), args.pages)

    def judged(paths: Places) -> Iterator[list[Judged]]:
        how = args.batch_size, args.num_workers, throughput
        if not args.store:
            yield from judge_files(detector, paths, args.acceptance, *how, args.early)
            return
        files = FileShards(detector, paths, place(args.store), *how, not hidden)
        if args.engine == "native":
            yield from files.judged(args.acceptance)
            return
        with cluster() as ray:
            actors = args.cores_per_actor, args.device != "cpu"
            with closing(score_with_actors(ray, files, load, *actors)) as done:
                yield from files.judged(args.acceptance, done)

    table, by_fdr = Path(args.csv) if args.csv else None, args.fdr is not None
    hidden = args.no_progress or table is None
    if not process.leads:
        return sum(map(len, judged(given)))  # it is given no rows: 0
    with RowFile(table, args.resume) as file:
        _check_same(detector, file)
        paths = Places(path for path in given.texts if path not in file.judged)
        counts = Counter[str]()
        # Shards come whole from a store, so scores for it have a bar of their own.
        is_hidden = hidden or (bool(args.store) and args.engine == "native")
        with tqdm(total=len(paths), unit=" images", disable=is_hidden, leave=False) as bar:
            for rows in judged(paths):
                # A verdict at a false discovery rate needs all images.
                file.write([r._replace(ood=None) for r in rows] if by_fdr else rows)
                bar.update(len(rows))
                counts.update(map(_verdict, rows))
        level = args.fdr if by_fdr else args.acceptance
        decide = rejects_at_fdr if by_fdr else rejects
        file.finish(None if args.early else lambda p: decide(p, level))
    if table and table.is_file():  # not /dev/stdout, from which nothing comes back
        counts = Counter(map(_verdict, read_rows(table)))
    summary = f"{counts.total()} images: {counts['OOD']} OOD, {counts['unreadable']} unreadable"
    summary += f", {len(file.judged)} judged before" if file.judged else ""
    summary += f"; {throughput}" if throughput.images else ""
    log.info(summary)
    tested = counts.total() - counts["unreadable"]
    if by_fdr and known is not None and tested and not counts["OOD"]:
        n = max(map(len, known.cells))
        fewest = fewest_rejections(n, tested, args.fdr)
        more = "more than there are" if fewest > tested else "or none is rejected"
        log.warning(
            f"{n} calibration images give no p-value below {1 / (n + 1):.2g}, which "
            f"{fewest} of {tested} images must have at an FDR of {args.fdr:g}, {more}: calibrate "
            "on more, or choose --acceptance"
        )
    if args.report and table:
        _write_page(args.report, detector, args.detector, table, args.acceptance)
    return SOME_UNREADABLE if counts["unreadable"] and process.world == 1 else 0


def _check_options(args: Namespace, world: int) -> None:
    """Raise ConfigError for options that do not go together, or go with others that are missing."""
    csv, store, several = args.csv, args.store, world > 1
    rest = bool(args.fdr or args.store or args.report or args.resume)
    rules = {
        "--early gives verdicts at an acceptance, and no class and no exact confidence: leave out "
        "--fdr, --store, --report and --resume": args.early and rest,
        "--report is about the rows of a file: give --csv FILE": args.report and not csv,
        "--report shows verdicts at an acceptance: leave out --fdr": args.report and args.fdr,
        "--fdr judges all images together, for which it needs a file: --csv": args.fdr and not csv,
        "--store goes on with what it has: leave out --resume": store and args.resume,
        "engine ray deals the shards of a store to actors: give --store, and no torchrun": (
            args.engine == "ray" and (several or not store)
        ),
        f"{world} processes cannot read the same standard input: give a list in a file": (
            several and "-" in args.paths
        ),
        "there is nothing to score: give PATH or --manifest FILE": (
            not (args.paths or args.manifest)
        ),
    }
    for sentence, is_broken in rules.items():
        if is_broken:
            raise ConfigError(sentence)


def _check_same(detector: FuseNorm, file: RowFile) -> None:
    """Raise ConfigError if another detector judged the images of an earlier run."""
    row = file.readable
    path = None if row is None else place(row.path)
    if row is None or path is None or row.confidence is None or isinstance(path, Url):
        return
    if not split_page(path)[0].exists():
        return
    ((again,),) = judge_files(detector, [path])
    now, then = again.confidence, row.confidence
    if now is None or not math.isclose(now, then, rel_tol=1e-3, abs_tol=1e-3):
        raise ConfigError(
            f"{file.path} has {then:.6g} as the confidence of {row.path}, which is now "
            f"{'unreadable' if now is None else f'{now:.6g}'}: give another file to --csv, or the "
            "detector and the images of its rows"
        )


def _verdict(row: Judged) -> str:
    return "unreadable" if row.error is not None else "OOD" if row.ood else "accepted"


def add_report(parser: ArgumentParser) -> None:
    options.add(parser, *options.DETECTOR)
    add = parser.add_argument
    add("--csv", required=True, metavar="FILE", help="what `fusenorm score` has written")
    add("--output", required=True, metavar="FILE", help="the HTML page")
    options.add(parser, "--acceptance", "--device")


def run_report(args: Namespace) -> int:
    """Read the rows, score the images of the gallery again, write the page."""
    check_report(args.output, "--output")
    detector = inputs.load_detector(*inputs.of_detector(args))
    _write_page(args.output, detector, args.detector, Path(args.csv), args.acceptance)
    print(f"saved {args.output}")
    return 0


def _write_page(
    path: str, detector: FuseNorm, detector_file: str, table: Path, acceptance: float
) -> None:
    facts = (("judged in", str(table)), ("detector file", detector_file))
    write_report(report_of_files(detector, read_rows(table), acceptance, facts), path)
