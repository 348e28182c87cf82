"""`fusenorm compare`: FuseNorm, its parts and single experts on training runs."""

import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from fusenorm_openood.cli import inputs, options
from fusenorm_openood.data.benchmarks import Benchmark, load_benchmark
from fusenorm_openood.detectors.configuration import read_fusenorm
from fusenorm_openood.evaluation import comparison, evaluation
from fusenorm_openood.evaluation.leaderboard import markdown
from fusenorm_openood.evaluation.runs import Run, load_runs
from fusenorm_openood.kernels.devices import own_device
from fusenorm_openood.method.scores.knn import KNN
from fusenorm_openood.report.comparison import report_of_comparison
from fusenorm_openood.report.page import check_report, write_report
from fusenorm_openood.storage import files, torchrun
from fusenorm_openood.storage.configs import config_root, read_config


def add_compare(parser: ArgumentParser) -> None:
    add = parser.add_argument
    options.add(parser, "--root", nargs="+", help="folders of training runs, or checkpoint files")
    options.add(parser, "--network", "--weights-by-order", "--id-data", "--data-root")
    options.add(parser, "--normalization", "--fsood")
    singles = (
        "single methods to compare with: names of postprocessors, dice, vra, nnguide, gradnorm"
    )
    add("--methods", nargs="+", metavar="NAME", help=f"{singles} (default: all)")
    add("--search", action="store_true", help="also search settings, with and without OOD images")
    add("--config", help="YAML file with the sweep to search (default: this package's)")
    options.add(parser, "--batch-size")
    add("--format", default="text", choices=["text", "markdown", "latex"], help="of the tables")
    add("--csv", metavar="FILE", help="also write all figures to this file")
    options.add(parser, "--report", help="also write an HTML page with figures")
    options.add(parser, "--store", *options.COMPUTING)


@torchrun.among_peers()
def run_compare(args: Namespace) -> int:
    """Print, for each root, AUROC and FPR@95 of every method, the mean over the root's runs."""
    leads, device = torchrun.this_process().leads, own_device(args.device)
    benchmark = load_benchmark(args.id_data, args.data_root, args.normalization, args.fsood)
    config = read_config(args.config or config_root() / "postprocessors" / "fusenorm.yml")
    sweep = read_fusenorm(config).sweep if args.search or args.config else None
    comparison.check_methods(args.methods or ())
    if args.csv and leads:
        files.check_file(Path(args.csv), "--csv", ".csv")
    if args.report:
        check_report(args.report)
    image_sets = [*benchmark.tested(args.fsood), *([benchmark.val_ood] if sweep else [])]
    checkpoints = inputs.check_files(benchmark, image_sets, args.root)
    store = inputs.store_of(args.store)
    if leads:
        inputs.check_readable(image_sets, store)
    loading = benchmark.image_size, args.batch_size, args.num_workers, store, args.weights_by_order
    how: dict[str, Any] = {"amp": False, "channels_last": False}
    roots: dict[str, dict[str, Run]] = {}
    for label, found in zip(labels(list(checkpoints)), checkpoints.values(), strict=True):
        roots[label] = load_runs(found, benchmark.num_classes, args.network, *loading, **how)
    figures: dict[str, pd.DataFrame] = {}
    compared: dict[str, list[comparison.Comparison]] = {}
    for label, runs in roots.items():
        results = compared[label] = []
        for run in runs.values():
            run.net.to(device)
            rest = sweep, args.fsood, run.load, not args.no_progress
            result = comparison.compare(run.net, benchmark, *rest, methods=args.methods)
            results.append(result if args.report else result._replace(conf={}))
            run.net.cpu()
            if leads:
                run.save(result.structure)
        inputs.log_throughput(runs)
        fpr95 = evaluation.mean([result.fpr95 for result in results]).add_suffix(" FPR@95")
        figures[label] = evaluation.mean([result.auroc for result in results]).join(fpr95)
        if args.csv and leads:
            text = pd.concat(figures, names=["root", "method"]).to_csv(
                float_format="%.4f", lineterminator="\n"
            )
            files.write_whole(Path(args.csv), partial(Path.write_text, data=text, newline="\n"))
        _print_root(label, benchmark, results, args.format)
    if len(figures) > 1:
        print(f"\nmean ± std over {len(figures)} roots, AUROC in percent:")
        tables = [table[["nearood", "farood"]] for table in figures.values()]
        # T2FNorm's networks have another MSP.
        common = [row for row in tables[0].index if all(row in table.index for table in tables)]
        means = evaluation.summarise([table.loc[common] for table in tables])
        print(formatted(means, args.format))
    if args.report and leads:
        count = sum(map(len, compared.values()))
        facts = (("roots", ", ".join(args.root)), ("training runs", str(count)))
        title = f"Methods on {args.id_data}{', full-spectrum' * args.fsood}"
        write_report(report_of_comparison(compared, benchmark, title, facts), args.report)
        print(f"saved {args.report}")
    return 0


def _print_root(
    label: str, benchmark: Benchmark, results: Sequence[comparison.Comparison], style: str
) -> None:
    images = f"{len(benchmark.id['val'].images())} ID validation images"
    neighbours = f", KNN with K = {KNN().K} unless it says otherwise"
    for number, result in enumerate(results):
        for name, found in result.found.items():
            varied = found.trials.columns.drop(["AUROC", "unusable"])
            chosen = ", ".join(f"{key} = {getattr(found.settings, key)}" for key in varied)
            print(
                f"{label}: {name}, {len(found.trials)} combinations, "
                f"AUROC {100 * found.auroc:.2f} with {chosen}",
                flush=True,
            )
        which = f", run {number}" * (len(results) > 1)
        summary = formatted(result.summary, style)
        print(f"\n{label}, {benchmark.name}{which}: AUROC and FPR@95 in percent,")
        print(f"all fitted on {images}{neighbours * ('KNN' in result.summary.index)}")
        if " over " in summary:
            print("(over: 95 % bootstrap interval of the gain over the best single expert)")
        print(summary, flush=True)
    over = f", mean ± std over {len(results)} runs" * (len(results) > 1)
    table = evaluation.summarise([r.auroc for r in results]) if over else results[0].auroc
    print(f"\n{label}, {benchmark.name}{over}, AUROC in percent:")
    print(formatted(table, style), flush=True)


def formatted(table: pd.DataFrame, style: str) -> str:
    """A table as `text` that fits the terminal, or whole in `markdown` or `latex`."""
    if style == "text":
        return fitting(table)
    cells = table.map(lambda cell: cell if isinstance(cell, str) else f"{cell:.2f}")
    header, rows = ["method", *map(str, table.columns)], cells.itertuples(name=None)
    if style == "markdown":
        return markdown(header, rows)
    lines = [" & ".join(line).replace("_", r"\_") + r" \\" for line in (header, *rows)]
    start = rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}"
    return "\n".join([start, *lines, r"\end{tabular}"])


def fitting(table: pd.DataFrame) -> str:
    """A table, without single data sets and intervals if it is wider than the terminal.

    Where there is no terminal, that is 80 columns, or the environment variable COLUMNS.
    """
    text: str = table.to_string(float_format="{:.2f}".format, justify="right")
    if max(map(len, text.splitlines())) <= shutil.get_terminal_size().columns:
        return text
    names = map(str, table.columns)
    groups = [n for n in names if n.startswith(("near", "far")) and " over " not in n]
    text = table[groups].to_string(float_format="{:.2f}".format, justify="right")
    return f"{text}\n(all columns: COLUMNS=200 or --format markdown; all figures: --csv FILE)"


def labels(roots: Sequence[str]) -> list[str]:
    """A short name for each root: its last part, or the whole path where that is not unique."""
    paths = [Path(root).resolve() for root in roots]
    names = [path.stem if path.is_file() else path.name for path in paths]
    return [n if names.count(n) == 1 else r for r, n in zip(roots, names, strict=True)]
