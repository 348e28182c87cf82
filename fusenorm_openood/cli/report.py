"""`fusenorm report`: a page about image files that were judged before."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from fusenorm_openood.cli import options
from fusenorm_openood.cli.detector import add_detector, load_detector
from fusenorm_openood.deployment.rows import read_rows
from fusenorm_openood.report.files import report_of_files
from fusenorm_openood.report.page import check_report, write_report


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add_detector(parser)
    add("--csv", required=True, metavar="FILE", help="what `fusenorm score` has written")
    add("--output", required=True, metavar="FILE", help="the HTML page")
    add(
        "--acceptance", type=options.share, default=0.95, help="share of ID images to accept (0.95)"
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")


def run(args: Namespace) -> int:
    """Read the rows, score the images of the gallery again, write the page."""
    check_report(args.output, "--output")
    detector = load_detector(args)
    facts = (("judged in", args.csv), ("detector file", args.detector))
    report = report_of_files(detector, read_rows(Path(args.csv)), args.acceptance, facts)
    write_report(report, args.output)
    print(f"saved {args.output}")
    return 0
