"""`fusenorm report`: a page about image files that were judged before."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from fusenorm_openood.cli import options
from fusenorm_openood.cli.fit import source_network
from fusenorm_openood.cli.score import _share
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.detectors.storage import read_contents
from fusenorm_openood.devices import find_device
from fusenorm_openood.report.files import report_of_files
from fusenorm_openood.report.rows import read_judged
from fusenorm_openood.report.write import check_report, write_report


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--detector", required=True, metavar="FILE", help="what `fusenorm fit` has saved")
    add("--csv", required=True, metavar="FILE", help="what `fusenorm score` has written")
    add("--output", required=True, metavar="FILE", help="the HTML page")
    add("--acceptance", type=_share, default=0.95, help="share of ID images to accept (0.95)")
    options.add_network(parser)
    add("--weights", metavar="FILE", help="checkpoint (default: where `fit` found it)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")


def run(args: Namespace) -> int:
    """Read the rows, score the images of the gallery again, write the page."""
    check_report(args.output, "--output")
    device = find_device(args.device)
    source = read_contents(Path(args.detector)).record.get("source") or {}
    size = source.get("image_size")
    net = source_network(
        args.network or source.get("network"),
        args.weights or source.get("weights"),
        None if size is None else int(size),
    )
    detector = FuseNorm.load(args.detector, net.to(device))
    facts = (("judged in", args.csv), ("detector file", args.detector))
    report = report_of_files(detector, read_judged(args.csv), args.acceptance, facts)
    write_report(report, args.output)
    print(f"saved {args.output}")
    return 0
