"""`fusenorm compare`: FuseNorm and single experts on the training runs under several roots."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

import pandas as pd

from fusenorm_openood.benchmark.comparison import compare
from fusenorm_openood.benchmark.networks import load_runs
from fusenorm_openood.benchmark.runs import find_checkpoints
from fusenorm_openood.cli import options
from fusenorm_openood.cli.inputs import check_images, check_readable
from fusenorm_openood.configs import config_root, read_config
from fusenorm_openood.data.benchmarks import load_benchmark
from fusenorm_openood.detectors.configuration import read_fusenorm
from fusenorm_openood.devices import find_device
from fusenorm_openood.files import check_writable, write_whole


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--root", required=True, nargs="+", help="folders of training runs, or of one checkpoint")
    options.add_data(parser)
    add("--config", help="YAML file with the sweep to search (default: this package's)")
    add("--batch-size", type=options.positive, default=200, help="images per batch (default: 200)")
    add("--csv", metavar="FILE", help="also write the table to this file")
    options.add_computing(parser)


def run(args: Namespace) -> int:
    """Print one table with a row per root and method; AUROC is the mean over a root's runs."""
    device = find_device(args.device)
    benchmark = load_benchmark(args.id_data, args.data_root)
    config = read_config(args.config or config_root() / "postprocessors" / "fusenorm.yml")
    sweep = read_fusenorm(config).sweep
    if args.csv:
        check_writable(Path(args.csv).parent, "--csv")
    image_sets = [*benchmark.tested(), benchmark.val_ood]
    check_images(benchmark, image_sets)
    check_readable(image_sets)
    networks = {
        root: load_runs(find_checkpoints(root), benchmark.num_classes) for root in args.root
    }
    names = [Path(root).resolve().name for root in networks]
    labels = {r: n if names.count(n) == 1 else r for r, n in zip(networks, names, strict=True)}
    tables = {}
    for root, runs in networks.items():
        by_run = []
        for net in runs.values():
            result = compare(
                net.to(device),
                benchmark,
                sweep,
                args.batch_size,
                args.num_workers,
                not args.no_progress,
            )
            net.cpu()
            by_run.append(result.table)
            for name, found in result.found.items():
                varied = found.trials.columns.drop(["AUROC", "unusable"])
                chosen = ", ".join(f"{key} = {getattr(found.settings, key)}" for key in varied)
                print(
                    f"{labels[root]}: {name}, {len(found.trials)} combinations, "
                    f"validation AUROC {100 * found.auroc:.2f} with {chosen}",
                    flush=True,
                )
        tables[labels[root]] = sum(by_run[1:], start=by_run[0]) / len(by_run)
    table = pd.concat(tables, names=["root", "method"]).round(2)
    print(f"\nAUROC in percent, {args.id_data}, mean over the runs of each root:")
    print(table.to_string(float_format="{:.2f}".format))
    if args.csv:
        write_whole(Path(args.csv), lambda file: table.to_csv(file, float_format="%.2f"))
    return 0
