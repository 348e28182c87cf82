"""What the subcommands of ``fusenorm`` do."""

import pickle
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from fusenorm_openood import comparison, training
from fusenorm_openood.config import config_root, lookup, read_config
from fusenorm_openood.data.benchmarks import (
    Benchmark,
    how_to_get,
    image_loader,
    load_benchmark,
)
from fusenorm_openood.data.digits import write_digits
from fusenorm_openood.detector import FuseNorm
from fusenorm_openood.devices import find_device
from fusenorm_openood.engines import (
    NATIVE,
    check_postprocessor,
    detector_for,
    find_engine,
    read_postprocessor,
)
from fusenorm_openood.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    TapError,
)
from fusenorm_openood.evaluation import (
    Evaluation,
    check_fsood,
    evaluate,
    load_runs,
    summarise,
)
from fusenorm_openood.files import check_writable, write_whole
from fusenorm_openood.leaderboard import leaderboard_entry
from fusenorm_openood.networks import load_network
from fusenorm_openood.openood_bridge import evaluate_with_openood
from fusenorm_openood.recipes import METHODS, find_recipe
from fusenorm_openood.runs import find_checkpoints, parse_root_name, unfinished
from fusenorm_openood.scoring import Detector
from fusenorm_openood.search import search
from fusenorm_openood.settings import read_fusenorm
from fusenorm_openood.taps import resolve_taps, tap_candidates
from fusenorm_openood.training import train_digits


def eval(args: Namespace) -> None:
    """Evaluate a postprocessor on all training runs under a root, and print the table."""
    device = find_device(args.device)
    benchmark = load_benchmark(args.id_data, args.data_root)
    if args.validation and args.fsood:
        raise ConfigError("--validation and --fsood exclude each other: leave out one")
    check_fsood(benchmark, args.fsood)
    config = read_postprocessor(args.postprocessor, args.config, args.set, args.sweep, args.aps)
    check_postprocessor(args.postprocessor, config, benchmark)  # before any work: is it usable?
    output = Path(args.output_dir or args.root)
    if args.save_csv or args.save_score:
        check_writable(output, "--output-dir")
    if benchmark.name == "digits":
        ensure_digits(args)
    checkpoints = check_files(benchmark, args, lookup(config, "postprocessor").get("APS_mode"))
    networks = load_runs(checkpoints, benchmark.num_classes)
    if args.postprocessor in NATIVE:
        check_networks(networks, checkpoints, detector_for(args.postprocessor, config, benchmark))
    engine = find_engine(args, config, benchmark)

    print(f"{args.postprocessor} on {args.id_data}: engine {engine}, device {device}", flush=True)
    for checkpoint in filter(unfinished, checkpoints.values()):
        print(f"fusenorm: training {checkpoint.parent} is not finished", file=sys.stderr)
    folder = "val" if args.validation else "fsood" if args.fsood else "ood"
    tables = []
    for run, net in networks.items():
        net.to(device)
        if args.channels_last:
            net.to(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16) if args.amp else nullcontext():
            result = evaluate_run(net, benchmark, config, engine, run, args)
        tables.append(result.table)
        if args.save_score and not args.validation:
            scores = pickle.dumps(result.scores, pickle.HIGHEST_PROTOCOL)
            path = output / run / "scores" / f"{args.postprocessor}.pkl"
            write_whole(path, lambda file, scores=scores: file.write_bytes(scores))  # type: ignore[misc]
        if args.compare:
            print(f"\nAUROC / FPR@95, run {run or args.root}:\n{_text(result.compare)}")
        net.cpu()
    table = summarise(tables)
    print(f"\n{args.postprocessor}, {args.id_data}, {len(tables)} run(s), mean ± std in percent:")
    print(_text(table))
    if args.save_csv:
        path = output / folder / f"{args.postprocessor}.csv"
        write_whole(path, table.to_csv)
        print(f"saved {path}")


def compare(args: Namespace) -> None:
    """Compare FuseNorm and single experts on the training runs under several roots."""
    device = find_device(args.device)
    benchmark = load_benchmark(args.id_data, args.data_root)
    config = read_config(args.config or config_root() / "postprocessors" / "fusenorm.yml")
    sweep = read_fusenorm(config).sweep
    if args.csv:
        check_writable(Path(args.csv).parent, "--csv")
    missing = benchmark.missing([*benchmark.tested(), benchmark.val_ood])
    if missing:
        raise DataError(f"{missing[0]}: {how_to_get(args.id_data)}. Or give --data-root.")
    networks = {
        root: load_runs(find_checkpoints(root), benchmark.num_classes) for root in args.root
    }
    names = [Path(root).resolve().name for root in networks]
    labels = {r: n if names.count(n) == 1 else r for r, n in zip(networks, names, strict=True)}
    tables = {}
    for root, runs in networks.items():
        by_run = []
        for net in runs.values():
            result = comparison.compare(
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


def leaderboard(args: Namespace) -> None:
    """Print an entry of OpenOOD's leaderboard, from the CSV and the checkpoints of a root."""
    benchmark = load_benchmark(args.id_data, args.data_root)
    check_fsood(benchmark, args.fsood)
    checkpoints = find_checkpoints(args.root)
    csv = results_csv(args)
    networks = load_runs(checkpoints, benchmark.num_classes)
    print(leaderboard_entry(args.postprocessor, benchmark, args.fsood, checkpoints, networks, csv))


def digits(args: Namespace) -> None:
    """Write the digits benchmark and train its network, each unless it is there already."""
    root = Path(args.root or Path("results") / Path(find_recipe("digits").run_name).parent)
    check_writable(root, "--root")
    progress = not args.no_progress
    print(f"network: {train_digits(args.data_root, root, args.seed, progress=progress)}")


def train(args: Namespace) -> None:
    """Train a network, or go on with a run that was interrupted."""
    options = {name: getattr(args, name) for name in ("epochs", "lr", "tau", "batch_size")}
    changes = {name: value for name, value in options.items() if value is not None}
    recipe = find_recipe(
        args.id_data,
        method=args.method,
        seed=args.seed,
        amp=bool(args.amp),
        init=args.init,
        **changes,
    )
    benchmark = load_benchmark(args.id_data, args.data_root)
    folder = Path(args.results_dir) / recipe.run_name
    check_writable(folder, "--results-dir")
    device = find_device(args.device)
    with training.processes(device) as process:
        if args.id_data == "digits":
            if process.leads:
                write_digits(args.data_root)
            process.wait()
        missing = benchmark.missing([benchmark.id["train"], benchmark.id["val"]])
        if missing:
            raise DataError(f"{missing[0]}: {how_to_get(args.id_data)}. Or give --data-root.")
        if process.leads:
            print(f"training {folder} on {device}", flush=True)
        best = training.train(
            recipe,
            benchmark,
            folder,
            device,
            args.num_workers,
            args.channels_last,
            not args.no_progress,
            process,
        )
        if process.leads:
            print(f"network: {best}")


def taps(args: Namespace) -> None:
    """Print the modules of a checkpoint's network that can be tapped, and the default choice."""
    net = load_network(args.checkpoint)
    default = resolve_taps(net, "blocks")
    print("    module, class, shape of its output for one image; * = tapped by default")
    for name, kind, shape in tap_candidates(
        net, torch.zeros(1, 3, args.image_size, args.image_size)
    ):
        print(f"  {'*' if name in default else ' '} {name}, {kind}, {list(shape[1:])}")


def evaluate_run(
    net: nn.Module,
    benchmark: Benchmark,
    config: dict[str, Any],
    engine: str,
    run: str,
    args: Namespace,
) -> Evaluation:
    """Evaluate one training run by the engine that was chosen."""
    progress = not args.no_progress
    if engine == "openood":
        from fusenorm_openood.openood_adapter import make_postprocessor  # imports OpenOOD

        postprocessor = make_postprocessor(args.postprocessor, config, benchmark.name)
        table, scores = evaluate_with_openood(
            net,
            postprocessor,
            benchmark.name,
            args.data_root,
            args.batch_size,
            args.num_workers,
            args.fsood,
            progress,
        )
        return Evaluation(table, pd.DataFrame(), scores)
    if lookup(config, "postprocessor", "APS_mode"):
        detector: Detector = search_settings(net, benchmark, config, run, args)
    else:
        detector = detector_for(args.postprocessor, config, benchmark)(net)
    if args.compare and isinstance(detector, FuseNorm):
        detector.with_companions()
    return evaluate(
        detector,
        benchmark,
        args.fsood,
        args.validation,
        args.batch_size,
        args.num_workers,
        progress,
    )


def search_settings(
    net: nn.Module, benchmark: Benchmark, config: dict[str, Any], run: str, args: Namespace
) -> FuseNorm:
    """The detector with the settings that the validation pair prefers; prints which."""
    settings, sweep, _ = read_fusenorm(config)
    id_loader, ood_loader = (
        image_loader(image_set, args.batch_size, args.num_workers)
        for image_set in (benchmark.id["val"], benchmark.val_ood)
    )
    found = search(net, settings, sweep, id_loader, ood_loader, not args.no_progress)
    chosen = ", ".join(f"{name} = {getattr(found.settings, name)}" for name in sweep)
    print(
        f"search over {len(found.trials)} combinations, run {run or args.root}: "
        f"validation AUROC {100 * found.auroc:.2f} with {chosen}",
        flush=True,
    )
    if args.save_csv:
        path = Path(args.output_dir or args.root) / run / "aps" / f"{args.postprocessor}.csv"
        write_whole(path, lambda file: found.trials.to_csv(file, index=False))
    return FuseNorm(net, found.settings).with_calibration(found.calibration)


def check_networks(
    networks: dict[str, nn.Module],
    checkpoints: dict[str, Path],
    detector: Callable[[nn.Module], Detector],
) -> None:
    """Refuse a network that the detector cannot work on, before any is scored; name its run."""
    for run, net in networks.items():
        try:
            detector(net)
        except (CheckpointError, ConfigError, TapError) as error:
            raise type(error)(f"{checkpoints[run]}: {error}") from None


def results_csv(args: Namespace) -> Path:
    """The CSV that an evaluation saved; DataError that names the command for it where it is not."""
    folder = Path(args.output_dir or args.root) / ("fsood" if args.fsood else "ood")
    path = folder / f"{args.postprocessor}.csv"
    if path.is_file():
        return path
    command = ["fusenorm", "eval", "--id-data", args.id_data, "--root", args.root,
               "--data-root", args.data_root, "--postprocessor", args.postprocessor,
               *(["--output-dir", args.output_dir] if args.output_dir else []),
               *(["--fsood"] if args.fsood else []), "--save-csv"]  # fmt: skip
    others = ", ".join(sorted(file.name for file in folder.glob("*.csv")))
    beside = f" (beside it there are: {others})" if others else ""
    raise DataError(f"results {path} are missing{beside}: '{shlex.join(command)}' makes them")


def ensure_digits(args: Namespace) -> None:
    """Make what the digits benchmark needs and is not there: images and a trained network."""
    try:
        find_checkpoints(args.root)
        write_digits(args.data_root)
    except CheckpointError:
        check_writable(Path(args.root), "--root")
        # The folder's name says what is to be in it.
        name = parse_root_name(args.root)
        method = name.trainer if name and name.trainer in METHODS else "base"
        train_digits(args.data_root, args.root, method=method, progress=not args.no_progress)


def check_files(
    benchmark: Benchmark, args: Namespace, searching: bool | None = False
) -> dict[str, Path]:
    """The checkpoints of all training runs, once all images that will be read are known to exist.

    Raises:
        DataError, CheckpointError: something is missing; one message says all of it.
    """
    problems: list[str] = []
    read = list(benchmark.tested(args.fsood, args.validation))
    if searching and not args.validation:  # which reads it anyway
        read.append(benchmark.val_ood)
    missing = benchmark.missing(read)
    if missing:
        problems += [*missing[:3], *([f"and {len(missing) - 3} more"] if len(missing) > 3 else [])]
    checkpoints = {}
    try:
        checkpoints = find_checkpoints(args.root)
    except CheckpointError as error:
        problems.append(str(error))
    if problems:
        kind = DataError if missing else CheckpointError
        listed = "\n  - ".join(problems)
        raise kind(
            f"{benchmark.name} needs files that are missing:\n  - {listed}\n"
            f"{how_to_get(benchmark.name)}. Or say where they are: --data-root, --root."
        )
    return checkpoints


def _text(table: pd.DataFrame) -> str:
    return table.to_string(justify="right")
