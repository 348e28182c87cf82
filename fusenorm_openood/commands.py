"""What the subcommands of ``fusenorm`` do."""

import pickle
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from fusenorm_openood.baselines import BASELINES, Baseline, check_baseline
from fusenorm_openood.config import config_root, lookup, parse_yaml, read_config
from fusenorm_openood.data.benchmarks import Benchmark, how_to_get, load_benchmark
from fusenorm_openood.data.digits import write_digits
from fusenorm_openood.detector import FuseNorm
from fusenorm_openood.errors import CheckpointError, ConfigError, DataError, OpenOODError
from fusenorm_openood.evaluation import Evaluation, evaluate, find_checkpoints, summarise
from fusenorm_openood.files import check_writable, write_whole
from fusenorm_openood.networks import load_network
from fusenorm_openood.openood_bridge import (
    INSTALL,
    csid_of_evaluator,
    evaluate_with_openood,
    openood_config_root,
    openood_installed,
)
from fusenorm_openood.scoring import Detector
from fusenorm_openood.settings import read_fusenorm
from fusenorm_openood.taps import resolve_taps, tap_candidates
from fusenorm_openood.training import DIGITS_RUN, train_digits

NATIVE = ("fusenorm", *BASELINES)  # postprocessors that need no OpenOOD


def eval(args: Namespace) -> None:
    """Evaluate a postprocessor on all training runs under a root, and print the table."""
    device = find_device(args.device)
    benchmark = load_benchmark(args.id_data, args.data_root)
    if args.validation and args.fsood:
        raise ConfigError("--validation and --fsood exclude each other: leave out one")
    config = read_postprocessor(args.postprocessor, args.config, args.set)
    check_postprocessor(args.postprocessor, config, benchmark)  # before any work: is it usable?
    output = Path(args.output_dir or args.root)
    if args.save_csv or args.save_score:
        check_writable(output, "--output-dir")
    if benchmark.name == "digits":
        ensure_digits(args)
    checkpoints = check_files(benchmark, args)
    networks = {run: load_network(c, benchmark.num_classes) for run, c in checkpoints.items()}
    engine = find_engine(args, config, benchmark)

    print(f"{args.postprocessor} on {args.id_data}: engine {engine}, device {device}", flush=True)
    folder = "val" if args.validation else "fsood" if args.fsood else "ood"
    tables = []
    for run, net in networks.items():
        net.to(device)
        result = evaluate_run(net, benchmark, config, engine, args)
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


def digits(args: Namespace) -> None:
    """Write the digits benchmark and train its network, each unless it is there already."""
    root = Path(args.root or Path("results") / DIGITS_RUN)
    check_writable(root, "--root")
    print(f"network: {train_digits(args.data_root, root, args.seed, not args.no_progress)}")


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
    net: nn.Module, benchmark: Benchmark, config: dict[str, Any], engine: str, args: Namespace
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


def read_postprocessor(name: str, path: str | None, changes: list[str]) -> dict[str, Any]:
    """The configuration of a postprocessor, with ``KEY=VALUE`` changes to its arguments.

    It is this package's, or else OpenOOD's of that name.

    Raises:
        ConfigError: a postprocessor that is not known here, or a change of another form.
    """
    if name not in NATIVE and not openood_installed():
        raise ConfigError(
            f"postprocessor {name!r} unknown: choose among {', '.join(NATIVE)}, or install "
            f"OpenOOD, which has more: {INSTALL}"
        )
    if path is None:
        ours = config_root() / "postprocessors" / f"{name}.yml"
        theirs = ours if ours.is_file() else openood_config_root() / "postprocessors" / ours.name
        path = str(theirs)
    config = read_config(path)
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise ConfigError(f"--set {change} found: give KEY=VALUE, alpha=0.5 say")
        lookup(config, "postprocessor").setdefault("postprocessor_args", {})[key] = parse_yaml(
            value
        )
    return config


def check_postprocessor(name: str, config: dict[str, Any], benchmark: Benchmark) -> None:
    """Raise ConfigError unless a postprocessor of that name and configuration can be made."""
    if name in NATIVE:
        detector_for(name, config, benchmark)
    else:
        from fusenorm_openood.openood_adapter import make_postprocessor  # imports OpenOOD

        make_postprocessor(name, config, benchmark.name)


def detector_for(
    name: str, config: dict[str, Any], benchmark: Benchmark
) -> Callable[[nn.Module], Detector]:
    """A function from a network to the detector that a configuration describes."""
    if name == "fusenorm":
        settings = read_fusenorm(config).settings
        return lambda net: FuseNorm(net, settings)
    args = lookup(config, "postprocessor").get("postprocessor_args") or {}
    input_std = benchmark.norm[1] if name == "odin" else None
    check_baseline(name, args)
    return lambda net: Baseline(net, name, input_std, **args)


def ensure_digits(args: Namespace) -> None:
    """Make what the digits benchmark needs and is not there: images and a trained network."""
    try:
        find_checkpoints(args.root)
        write_digits(args.data_root)
    except CheckpointError:
        check_writable(Path(args.root), "--root")
        train_digits(args.data_root, args.root, progress=not args.no_progress)


def check_files(benchmark: Benchmark, args: Namespace) -> dict[str, Path]:
    """The checkpoints of all training runs, once all images that will be read are known to exist.

    Raises:
        DataError, CheckpointError: something is missing; one message says all of it.
    """
    problems: list[str] = []
    missing = benchmark.missing(benchmark.tested(args.fsood, args.validation))
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


def find_device(name: str) -> torch.device:
    """The device of that name, ``auto`` being the best one there is."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device {name!r} cannot be used ({reason}): choose auto or cpu"
        ) from None
    return device


def find_engine(args: Namespace, config: dict[str, Any], benchmark: Benchmark) -> str:
    """The engine that was chosen, or the one to choose, if it can do the work.

    Left to choose, that is OpenOOD's evaluator for FuseNorm, where it can do the work, and for
    what the native engine does not have.
    """
    reasons = []
    if args.engine != "native":
        reasons = _beyond_openood(args, benchmark)
    native = args.postprocessor in NATIVE
    engine = str(args.engine)
    if engine == "auto":
        able = openood_installed() and not reasons
        first = args.postprocessor == "fusenorm" or not native
        engine = "openood" if able and first else "native"
    elif engine == "openood" and reasons:
        way_out = "choose --engine native" if native else "leave it out"
        raise ConfigError(f"--engine openood cannot do {reasons[0]}: {way_out}")
    if engine == "native" and not native:
        why = f", and --engine openood cannot do {reasons[0]}" if reasons else ""
        raise ConfigError(
            f"--engine native has no postprocessor {args.postprocessor!r}{why}: "
            f"choose among {', '.join(NATIVE)}"
        )
    if engine == "native" and lookup(config, "postprocessor", "APS_mode"):
        raise ConfigError(
            "APS_mode: True found, and the native engine searches no parameters: "
            "install OpenOOD and choose --engine openood, or set APS_mode to False"
        )
    return engine


def _beyond_openood(args: Namespace, benchmark: Benchmark) -> list[str]:
    """What OpenOOD's evaluator cannot do of what is asked for."""
    beyond = {
        "--id-data digits": benchmark.name == "digits",
        "--compare": args.compare,
        "--validation": args.validation,
    }
    reasons = [reason for reason, asked in beyond.items() if asked]
    if reasons or not openood_installed():
        return reasons
    try:
        shifted = bool(csid_of_evaluator(benchmark.name))
    except OpenOODError:
        if args.engine == "openood":
            raise
        return ["without an OpenOOD that can be imported"]
    if args.fsood and not shifted:
        return [f"--fsood with --id-data {benchmark.name}"]
    # OpenOOD's evaluator opens every list of its own, and downloads what it misses.
    return [f"without all its files ({m})" for m in benchmark.missing(benchmark.every(shifted))]


def _text(table: pd.DataFrame) -> str:
    return table.to_string(justify="right")
