"""`fusenorm eval`: evaluate a postprocessor on all training runs under a root."""

import pickle
import sys
from argparse import ArgumentParser, Namespace
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from fusenorm_openood.cli import options
from fusenorm_openood.cli.engines import Job, evaluate_run, find_engine, read_postprocessor
from fusenorm_openood.cli.inputs import (
    check_files,
    check_networks,
    check_readable,
    ensure_digits,
    records_of,
    say_pace,
    store_of,
)
from fusenorm_openood.data.benchmarks import Benchmark, load_benchmark
from fusenorm_openood.data.digits import write_digits
from fusenorm_openood.errors import ConfigError
from fusenorm_openood.evaluation.evaluation import Evaluation, check_fsood, summarise
from fusenorm_openood.evaluation.runs import load_runs, results_folder, unfinished
from fusenorm_openood.kernels.devices import own_device
from fusenorm_openood.report.page import check_report, write_report
from fusenorm_openood.storage.files import alone_in, check_writable, write_whole
from fusenorm_openood.storage.torchrun import among_peers, this_process


def add_arguments(parser: ArgumentParser) -> None:
    options.add_results(parser)
    options.add_network(parser)
    options.add_data(parser)
    options.add_normalization(parser)
    add = parser.add_argument
    add("--batch-size", type=options.positive, default=200, help="images per batch (default: 200)")
    add("--save-csv", action="store_true", help="write OUTPUT/ood/NAME.csv (or fsood/, val/)")
    add("--save-score", action="store_true", help="write scores to OUTPUT/s0/scores/NAME.pkl")
    add("--validation", action="store_true", help="test on the validation pair, to choose settings")
    add("--compare", action="store_true", help="also print AUROC / FPR@95 of every expert")
    add("--report", metavar="FILE", help="also write an HTML page with figures and images")
    add("--config", metavar="NAME", help="YAML file of the postprocessor, or this package's name")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="set one of its arguments")
    add(
        "--aps",
        nargs="?",
        const="pair",
        choices=["pair", "pseudo"],
        help="search settings on the validation pair (default), or on pseudo-OOD images (APS_mode)",
    )
    add("--sweep", action="append", default=[], metavar="KEY=LIST", help="add values to the sweep")
    add("--amp", choices=["bf16"], help="run the network in bfloat16 where that is safe")
    add("--channels-last", action="store_true", help="use the channels-last memory format")
    add("--engine", default="auto", choices=["auto", "native", "openood"], help="what evaluates")
    options.add_store(parser)
    options.add_computing(parser)


@among_peers()
def run(args: Namespace) -> int:
    """Check all inputs, then evaluate one run after another and print the table."""
    process = this_process()
    device = own_device(args.device)
    benchmark = load_benchmark(args.id_data, args.data_root, args.normalization)
    if args.validation and args.fsood:
        raise ConfigError("--validation and --fsood cannot be combined: leave one out")
    check_fsood(benchmark, args.fsood)
    progress = not args.no_progress
    aps_mode: bool | str = args.aps if args.aps == "pseudo" else args.aps == "pair"
    config = read_postprocessor(args.postprocessor, args.config, args.set, args.sweep, aps_mode)
    name = config["postprocessor"]["name"]
    output = results_folder(args.root, args.output_dir)
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
        trials=output if args.save_csv and process.leads else None,
    )
    job.check()
    if process.leads and (args.save_csv or args.save_score):
        check_writable(output, "--output-dir")
    if args.report:
        check_report(args.report)
    if benchmark.name == "digits":
        with alone_in(Path(args.data_root)):
            if args.network:
                write_digits(args.data_root)
            else:
                ensure_digits(args.data_root, args.root, progress)
    checkpoints = check_files(benchmark, args.root, job.image_sets())
    engine = find_engine(job, args.engine)
    if process.leads:
        check_readable(job.image_sets(), store_of(args) if engine == "native" else None)
    if engine == "native":
        how = {"amp": job.amp, "channels_last": args.channels_last}
        job = replace(job, records=records_of(args, benchmark, checkpoints, **how))
    networks = load_runs(
        checkpoints, benchmark.num_classes, args.network, benchmark.image_size, job.records
    )
    check_networks(job, networks, checkpoints)

    print(f"{name} on {args.id_data}: engine {engine}, device {device}", flush=True)
    for checkpoint in filter(unfinished, checkpoints.values() if process.leads else ()):
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
        first = first or (run_name, result)
        structure = None if result.detector is None else result.detector.known_structure
        if process.leads and run_name in job.records and structure is not None:
            job.records[run_name].keep(net, structure)
        if process.leads and args.save_score and not args.validation:
            scores = pickle.dumps(result.scores, pickle.HIGHEST_PROTOCOL)
            path = output / run_name / "scores" / f"{name}.pkl"
            write_whole(path, lambda file, scores=scores: file.write_bytes(scores))  # type: ignore[misc]
        if args.compare:
            print(f"\nAUROC / FPR@95, run {run_name or args.root}:\n{_text(result.compare)}")
    table = summarise(tables)
    folder = "val" if args.validation else "fsood" if args.fsood else "ood"
    path = output / folder / f"{name}.csv"
    if process.leads and args.save_csv:
        write_whole(path, table.to_csv)
    print(f"\n{name}, {args.id_data}, {len(tables)} run(s), mean ± std in percent:")
    print(_text(table))
    if args.save_csv:
        print(f"saved {path}")
    say_pace(job.records)
    if args.report and first and process.leads:
        print(f"saved {_report(args, benchmark, table, list(networks), first[1], engine)}")
    return 0


def _report(
    args: Namespace,
    benchmark: Benchmark,
    table: pd.DataFrame,
    runs: list[str],
    first: Evaluation,
    engine: str,
) -> str:
    """Write the page about all runs, with pictures of the first one."""
    from fusenorm_openood.report.evaluation import report_of_evaluation

    note = ""
    if len(runs) > 1:
        note = (
            f"The first table has the mean and the standard deviation over {len(runs)} training "
            f"runs; everything else is from the first one, {runs[0]}."
        )
    else:
        table = first.table
    facts = (("training runs", args.root), ("evaluated by", f"{engine} engine"))
    kind = "validation pair of " * args.validation + args.id_data + " (full-spectrum)" * args.fsood
    report = report_of_evaluation(
        first,
        benchmark,
        f"{args.postprocessor or 'fusenorm'} on {kind}",
        facts,
        table,
        args.validation,
        note,
    )
    write_report(report, args.report)
    return str(args.report)


def _text(table: pd.DataFrame) -> str:
    return table.to_string(justify="right")
