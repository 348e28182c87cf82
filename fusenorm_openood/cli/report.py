"""`fusenorm report`: a page about image files that were judged before."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from fusenorm_openood.cli import options
from fusenorm_openood.cli.detector import load_detector
from fusenorm_openood.deployment.rows import read_rows
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.report.files import report_of_files
from fusenorm_openood.report.page import check_report, write_report


def add_arguments(parser: ArgumentParser) -> None:
    options.add(parser, *options.DETECTOR)
    add = parser.add_argument
    add("--csv", required=True, metavar="FILE", help="what `fusenorm score` has written")
    add("--output", required=True, metavar="FILE", help="the HTML page")
    options.add(parser, "--acceptance", "--device")


def run(args: Namespace) -> int:
    """Read the rows, score the images of the gallery again, write the page."""
    check_report(args.output, "--output")
    detector = load_detector(args.detector, args.network, args.weights, args.bits, args.device)
    write_page(args.output, detector, args.detector, Path(args.csv), args.acceptance)
    print(f"saved {args.output}")
    return 0


def write_page(
    path: str, detector: FuseNorm, detector_file: str, table: Path, acceptance: float
) -> None:
    """Write the page about a table that `fusenorm score` has written."""
    facts = (("judged in", str(table)), ("detector file", detector_file))
    write_report(report_of_files(detector, read_rows(table), acceptance, facts), path)
