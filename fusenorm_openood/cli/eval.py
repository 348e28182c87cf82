"""`fusenorm eval`: evaluate a postprocessor on training runs; `fusenorm leaderboard`."""

import logging
import pickle
import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from fusenorm_openood.cli import inputs, options
from fusenorm_openood.cli.engines import Job, evaluate_run, find_engine, read_postprocessor
from fusenorm_openood.cli.train import ensure_digits
from fusenorm_openood.data.benchmarks import load_benchmark
from fusenorm_openood.errors import CheckpointError, ConfigError, DataError, TapError
from fusenorm_openood.evaluation import evaluation, leaderboard
from fusenorm_openood.evaluation.runs import Run, find_checkpoints, load_runs, results_folder
from fusenorm_openood.kernels.devices import own_device
from fusenorm_openood.report.evaluation import report_of_evaluation
from fusenorm_openood.report.page import check_report, write_report
from fusenorm_openood.storage import files, torchrun

log = logging.getLogger(__name__)


def add_eval(parser: ArgumentParser) -> None:
    options.add(parser, "--root", "--postprocessor", "--fsood", "--output-dir", "--network")
    options.add(
        parser, "--weights-by-order", "--id-data", "--data-root", "--normalization", "--batch-size"
    )
    add = parser.add_argument
    add("--save-csv", action="store_true", help="write OUTPUT/ood/NAME.csv (or fsood/, val/)")
    add("--save-score", action="store_true", help="write scores to OUTPUT/s0/scores/NAME.pkl")
    add("--validation", action="store_true", help="test on the validation pair, to choose settings")
    add("--compare", action="store_true", help="also print AUROC / FPR@95 of every expert")
    options.add(parser, "--report", "--config", "--set")
    aps = "search settings on the validation pair (default), or on pseudo-OOD images (APS_mode)"
    add("--aps", nargs="?", const="pair", choices=["pair", "pseudo"], help=aps)
    add("--sweep", action="append", default=[], metavar="KEY=LIST", help="add values to the sweep")
    options.add(parser, "--amp", "--channels-last")
    add("--engine", default="auto", choices=["auto", "native", "openood"], help="what evaluates")
    options.add(parser, "--store", *options.COMPUTING)


@torchrun.among_peers()
def run_eval(args: Namespace) -> int:
    """Check all inputs, then evaluate one run after another and print the table."""
    leads, device = torchrun.this_process().leads, own_device(args.device)
    if args.validation and args.fsood:
        raise ConfigError("--validation and --fsood cannot be combined: leave one out")
    benchmark = load_benchmark(args.id_data, args.data_root, args.normalization, args.fsood)
    aps_mode = {None: False, "pair": True}.get(args.aps, args.aps)
    output = results_folder(args.root, args.output_dir)
    job = Job(
        config=read_postprocessor(args.postprocessor, args.config, args.set, args.sweep, aps_mode),
        benchmark=benchmark,
        fsood=args.fsood,
        validation=args.validation,
        compare=args.compare,
        amp=bool(args.amp),
        progress=not args.no_progress,
        trials=output if args.save_csv and leads else None,
    )
    job.check()
    if leads and (args.save_csv or args.save_score):
        files.check_writable(output, "--output-dir")
    if args.report:
        check_report(args.report)
    if args.id_data == "digits":
        ensure_digits(args.data_root, None if args.network else args.root, job.progress)
    checkpoints = inputs.check_files(benchmark, job.image_sets(), [args.root])[args.root]
    (engine, why), name = find_engine(job, args.engine), job.postprocessor
    store = inputs.store_of(args.store) if engine == "native" else None
    if leads:
        inputs.check_readable(job.image_sets(), store)
    loading = benchmark.image_size, args.batch_size, args.num_workers, store, args.weights_by_order
    how = {"amp": job.amp, "channels_last": args.channels_last}
    runs = load_runs(checkpoints, benchmark.num_classes, args.network, *loading, **how)
    if job.is_native:
        _check_networks(job, runs)

    reason = f" ({why})" if why else ""
    print(f"{name} on {args.id_data}: engine {engine}{reason}, device {device}", flush=True)
    for run in runs.values():
        if leads and run.is_unfinished:
            log.warning(f"training run {run.checkpoint.parent} is not finished")
    tables, first = [], None
    for run_name, run in runs.items():
        run.net.to(device)
        if args.channels_last:
            run.net.to(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16) if job.amp else nullcontext():
            result = evaluate_run(job, engine, run, run_name)
        run.net.cpu()
        tables.append(result.table)
        first = first or result
        if leads and result.detector and result.detector.known_structure:
            run.save(result.detector.known_structure)
        if leads and args.save_score and not args.validation:
            scores = pickle.dumps(result.scores, pickle.HIGHEST_PROTOCOL)
            path = output / run_name / "scores" / f"{name}.pkl"
            files.write_whole(path, partial(Path.write_bytes, data=scores))
        if args.compare:
            print(f"\nAUROC / FPR@95, run {run_name or args.root}:")
            print(result.compare.to_string(justify="right"))
    table = evaluation.summarise(tables)
    print(f"\n{name}, {args.id_data}, {len(runs)} run(s), mean ± std in percent:")
    print(table.to_string(justify="right"))
    if args.save_csv:
        folder = "val" if args.validation else "fsood" if args.fsood else "ood"
        path = output / folder / f"{name}.csv"
        if leads:
            files.write_whole(path, partial(table.to_csv, lineterminator="\n"))
        print(f"saved {path}")
    inputs.log_throughput(runs)
    if args.report and leads and first:
        facts = (("training runs", args.root), ("evaluated by", f"{engine} engine"))
        on = "validation pair of " * job.validation + benchmark.name
        title = f"{args.postprocessor or 'fusenorm'} on {on}{' (full-spectrum)' * job.fsood}"
        shown, note = first.table, ""
        if len(runs) > 1:
            shown = table
            note = (
                f"The first table has the mean and the standard deviation over {len(runs)} "
                f"training runs; everything else is from the first one, {next(iter(runs))}."
            )
        about = facts, shown, note
        write_report(report_of_evaluation(first, benchmark, title, *about), args.report)
        print(f"saved {args.report}")
    return 0


def _check_networks(job: Job, runs: Mapping[str, Run]) -> None:
    """Raise, naming the run, if a network is unsuitable for the detector, before any is scored."""
    for run in runs.values():
        try:
            job.detector(run.net)
        except (CheckpointError, ConfigError, TapError) as error:
            raise type(error)(f"{run.checkpoint}: {error}") from None


def add_leaderboard(parser: ArgumentParser) -> None:
    results = ("--root", "--postprocessor", "--fsood", "--output-dir")
    options.add(parser, *results, "--id-data", "--data-root", "--normalization")


def run_leaderboard(args: Namespace) -> int:
    """Print the entry in Markdown, from the CSV and the checkpoints of a root."""
    name = args.postprocessor or "fusenorm"
    benchmark = load_benchmark(args.id_data, args.data_root, args.normalization, args.fsood)
    checkpoints = find_checkpoints(args.root)
    folder = results_folder(args.root, args.output_dir) / ("fsood" if args.fsood else "ood")
    results = folder / f"{name}.csv"
    if not results.is_file():
        numbers = (str(n) for part in args.normalization or () for n in part)
        normalised = ["--normalization", ",".join(numbers)] if args.normalization else []
        command = ["fusenorm", "eval", "--id-data", args.id_data, "--root", args.root,
                   "--data-root", args.data_root, "--postprocessor", name,
                   *(["--output-dir", args.output_dir] if args.output_dir else []),
                   *(["--fsood"] if args.fsood else []), *normalised, "--save-csv"]  # fmt: skip
        others = ", ".join(sorted(file.name for file in folder.glob("*.csv")))
        contents = f" (the folder contains {others})" if others else ""
        raise DataError(
            f"{results} does not exist{contents}: create it with '{shlex.join(command)}'"
        )
    runs = load_runs(checkpoints, benchmark.num_classes)
    print(leaderboard.leaderboard_entry(name, benchmark, args.fsood, runs, results))
    return 0
