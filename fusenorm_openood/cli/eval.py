"""`fusenorm eval`: evaluate a postprocessor on all training runs under a root."""

import pickle
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from fusenorm_openood.cli import options
from fusenorm_openood.cli.digits import ensure_digits
from fusenorm_openood.cli.engines import Job, evaluate_run, find_engine, read_postprocessor
from fusenorm_openood.cli.inputs import (
    check_files,
    check_readable,
    print_throughput,
    records_of,
    store_of,
)
from fusenorm_openood.data.benchmarks import load_benchmark
from fusenorm_openood.errors import CheckpointError, ConfigError, TapError
from fusenorm_openood.evaluation.evaluation import Evaluation, check_fsood, summarise
from fusenorm_openood.evaluation.runs import load_runs, results_folder, unfinished
from fusenorm_openood.kernels.devices import own_device
from fusenorm_openood.report.page import Facts, check_report, write_report
from fusenorm_openood.storage.files import check_writable, write_whole
from fusenorm_openood.storage.torchrun import among_peers, this_process


def add_arguments(parser: ArgumentParser) -> None:
    options.add(parser, "--root", "--postprocessor", "--fsood", "--output-dir", "--network")
    options.add(parser, "--id-data", "--data-root", "--normalization", "--batch-size")
    add = parser.add_argument
    add("--save-csv", action="store_true", help="write OUTPUT/ood/NAME.csv (or fsood/, val/)")
    add("--save-score", action="store_true", help="write scores to OUTPUT/s0/scores/NAME.pkl")
    add("--validation", action="store_true", help="test on the validation pair, to choose settings")
    add("--compare", action="store_true", help="also print AUROC / FPR@95 of every expert")
    options.add(parser, "--report", "--config", "--set")
    add(
        "--aps",
        nargs="?",
        const="pair",
        choices=["pair", "pseudo"],
        help="search settings on the validation pair (default), or on pseudo-OOD images (APS_mode)",
    )
    add("--sweep", action="append", default=[], metavar="KEY=LIST", help="add values to the sweep")
    options.add(parser, "--amp", "--channels-last")
    add("--engine", default="auto", choices=["auto", "native", "openood"], help="what evaluates")
    options.add(parser, "--store", *options.COMPUTING)


@among_peers()
def run(args: Namespace) -> int:
    """Check all inputs, then evaluate one run after another and print the table."""
    leads, device, progress = this_process().leads, own_device(args.device), not args.no_progress
    benchmark = load_benchmark(args.id_data, args.data_root, args.normalization)
    if args.validation and args.fsood:
        raise ConfigError("--validation and --fsood cannot be combined: leave one out")
    check_fsood(benchmark, args.fsood)
    aps_mode = {None: False, "pair": True}.get(args.aps, args.aps)
    config = read_postprocessor(args.postprocessor, args.config, args.set, args.sweep, aps_mode)
    name, output = config["postprocessor"]["name"], results_folder(args.root, args.output_dir)
    job = Job(
        postprocessor=name,
        config=config,
        benchmark=benchmark,
        fsood=args.fsood,
        validation=args.validation,
        compare=args.compare,
        amp=bool(args.amp),
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        progress=progress,
        trials=output if args.save_csv and leads else None,
    )
    job.check()
    if leads and (args.save_csv or args.save_score):
        check_writable(output, "--output-dir")
    if args.report:
        check_report(args.report)
    if args.id_data == "digits":
        ensure_digits(args.data_root, None if args.network else args.root, progress)
    checkpoints = check_files(benchmark, job.image_sets(), [args.root])[args.root]
    engine, store, size = find_engine(job, args.engine), store_of(args.store), benchmark.image_size
    if leads:
        check_readable(job.image_sets(), store if engine == "native" else None)
    if engine == "native":
        how = args.network, size, args.batch_size, args.num_workers
        run_as = {"amp": job.amp, "channels_last": args.channels_last}
        job = replace(job, records=records_of(store, checkpoints, *how, **run_as))
    networks = load_runs(checkpoints, benchmark.num_classes, args.network, size, job.records)
    if job.is_native:
        _check_networks(job, networks, checkpoints)

    print(f"{name} on {args.id_data}: engine {engine}, device {device}", flush=True)
    for checkpoint in filter(unfinished, checkpoints.values() if leads else ()):
        print(f"fusenorm: training run {checkpoint.parent} is not finished", file=sys.stderr)
    tables, first = [], None
    for run_name, net in networks.items():
        net.to(device)
        if args.channels_last:
            net.to(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16) if job.amp else nullcontext():
            result = evaluate_run(job, engine, net, run_name)
        net.cpu()
        tables.append(result.table)
        first = first or result
        structure = None if result.detector is None else result.detector.known_structure
        if leads and run_name in job.records and structure is not None:
            job.records[run_name].keep(net, structure)
        if leads and args.save_score and not args.validation:
            scores = pickle.dumps(result.scores, pickle.HIGHEST_PROTOCOL)
            path = output / run_name / "scores" / f"{name}.pkl"
            write_whole(path, lambda file, scores=scores: file.write_bytes(scores))  # type: ignore[misc]
        if args.compare:
            print(f"\nAUROC / FPR@95, run {run_name or args.root}:\n{_text(result.compare)}")
    table = summarise(tables)
    print(f"\n{name}, {args.id_data}, {len(tables)} run(s), mean ± std in percent:")
    print(_text(table))
    if args.save_csv:
        folder = "val" if args.validation else "fsood" if args.fsood else "ood"
        path = output / folder / f"{name}.csv"
        if leads:
            write_whole(path, table.to_csv)
        print(f"saved {path}")
    print_throughput(job.records)
    if args.report and first and leads:
        facts = (("training runs", args.root), ("evaluated by", f"{engine} engine"))
        method = args.postprocessor or "fusenorm"
        _write_report(args.report, job, method, facts, list(networks), first, table)
        print(f"saved {args.report}")
    return 0


def _check_networks(
    job: Job, networks: Mapping[str, nn.Module], checkpoints: Mapping[str, Path]
) -> None:
    """Raise, naming the run, if a network is unsuitable for the detector, before any is scored."""
    for run_name, net in networks.items():
        try:
            job.detector(net)
        except (CheckpointError, ConfigError, TapError) as error:
            raise type(error)(f"{checkpoints[run_name]}: {error}") from None


def _write_report(
    path: str,
    job: Job,
    method: str,
    facts: Facts,
    runs: Sequence[str],
    first: Evaluation,
    table: pd.DataFrame,
) -> None:
    """Write the page about all runs, with pictures of the first one."""
    from fusenorm_openood.report.evaluation import report_of_evaluation

    note = ""
    if len(runs) > 1:
        note = (
            f"The first table has the mean and the standard deviation over {len(runs)} training "
            f"runs; everything else is from the first one, {runs[0]}."
        )
    on = "validation pair of " * job.validation + job.benchmark.name
    title = f"{method} on {on}{' (full-spectrum)' * job.fsood}"
    shown = table if note else first.table
    report = report_of_evaluation(first, job.benchmark, title, facts, shown, job.validation, note)
    write_report(report, path)


def _text(table: pd.DataFrame) -> str:
    return table.to_string(justify="right")
