"""Who evaluates a postprocessor, and under which configuration: this package, or OpenOOD."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fusenorm_openood.baselines import BASELINES, Baseline, check_baseline
from fusenorm_openood.config import config_root, lookup, parse_yaml, read_config
from fusenorm_openood.data.benchmarks import Benchmark
from fusenorm_openood.detector import FuseNorm
from fusenorm_openood.errors import ConfigError, OpenOODError
from fusenorm_openood.openood_bridge import (
    INSTALL,
    csid_of_evaluator,
    openood_config_root,
    openood_installed,
)
from fusenorm_openood.scoring import Detector
from fusenorm_openood.settings import read_fusenorm

NATIVE = ("fusenorm", *BASELINES)  # postprocessors that need no OpenOOD


def read_postprocessor(
    name: str,
    path: str | Path | None = None,
    changes: Sequence[str] = (),
    sweep: Sequence[str] = (),
    aps_mode: bool = False,
) -> dict[str, Any]:
    """The configuration of a postprocessor, with ``KEY=VALUE`` changes to arguments and sweep.

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
        path = ours if ours.is_file() else openood_config_root() / "postprocessors" / ours.name
    config = read_config(path)
    section = lookup(config, "postprocessor")
    for option, given, part in (
        ("--set", changes, "postprocessor_args"),
        ("--sweep", sweep, "postprocessor_sweep"),
    ):
        for change in given:
            key, equals, value = change.partition("=")
            if not equals:
                raise ConfigError(f"{option} {change} found: give KEY=VALUE, alpha=0.5 say")
            section[part] = {**(section.get(part) or {}), key: parse_yaml(value)}
    if aps_mode:
        section["APS_mode"] = True
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
    searching = lookup(config, "postprocessor", "APS_mode")
    if engine == "native" and searching and args.postprocessor != "fusenorm":
        raise ConfigError(
            f"APS_mode: True found, and the native engine searches no {args.postprocessor}: "
            "install OpenOOD and choose --engine openood, or set APS_mode to False"
        )
    return engine


def _beyond_openood(args: Namespace, benchmark: Benchmark) -> list[str]:
    """What OpenOOD's evaluator cannot do of what is asked for."""
    beyond = {
        "--id-data digits": benchmark.name == "digits",
        "--amp": args.amp,
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
