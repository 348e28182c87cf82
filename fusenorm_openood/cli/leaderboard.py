"""`fusenorm leaderboard`: rows for OpenOOD's leaderboard, from saved results."""

import shlex
from argparse import ArgumentParser, Namespace

from fusenorm_openood.cli import options
from fusenorm_openood.data.benchmarks import load_benchmark
from fusenorm_openood.errors import DataError
from fusenorm_openood.evaluation.evaluation import check_fsood
from fusenorm_openood.evaluation.leaderboard import leaderboard_entry
from fusenorm_openood.evaluation.runs import find_checkpoints, load_runs, results_folder


def add_arguments(parser: ArgumentParser) -> None:
    results = ("--root", "--postprocessor", "--fsood", "--output-dir")
    options.add(parser, *results, "--id-data", "--data-root")


def run(args: Namespace) -> int:
    """Print the entry in Markdown, from the CSV and the checkpoints of a root."""
    name = args.postprocessor or "fusenorm"
    benchmark = load_benchmark(args.id_data, args.data_root)
    check_fsood(benchmark, args.fsood)
    checkpoints = find_checkpoints(args.root)
    folder = results_folder(args.root, args.output_dir) / ("fsood" if args.fsood else "ood")
    results = folder / f"{name}.csv"
    if not results.is_file():
        command = ["fusenorm", "eval", "--id-data", args.id_data, "--root", args.root,
                   "--data-root", args.data_root, "--postprocessor", name,
                   *(["--output-dir", args.output_dir] if args.output_dir else []),
                   *(["--fsood"] if args.fsood else []), "--save-csv"]  # fmt: skip
        others = ", ".join(sorted(file.name for file in folder.glob("*.csv")))
        contents = f" (the folder contains {others})" if others else ""
        raise DataError(
            f"{results} does not exist{contents}: create it with '{shlex.join(command)}'"
        )
    networks = load_runs(checkpoints, benchmark.num_classes)
    print(leaderboard_entry(name, benchmark, args.fsood, checkpoints, networks, results))
    return 0
