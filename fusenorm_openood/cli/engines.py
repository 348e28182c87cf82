"""The engines of `eval`: native, and the real OpenOOD."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from fusenorm_openood.data.benchmarks import Benchmark, ImageSet, load_benchmark
from fusenorm_openood.detectors.base import Detector
from fusenorm_openood.detectors.configuration import NATIVE, detector_for, read_fusenorm
from fusenorm_openood.detectors.fusenorm import FuseNorm
from fusenorm_openood.detectors.search import search
from fusenorm_openood.errors import ConfigError, OpenOODError, unknown
from fusenorm_openood.evaluation.evaluation import Evaluation, evaluate, sets_of
from fusenorm_openood.evaluation.runs import Run
from fusenorm_openood.method.scores import POSTHOC
from fusenorm_openood.method.settings import METHODS
from fusenorm_openood.openood import INSTALL, bridge
from fusenorm_openood.storage import configs, torchrun
from fusenorm_openood.storage.files import write_whole


def read_postprocessor(
    name: str | None = None,
    config: str | Path | None = None,
    changes: Sequence[str] = (),
    sweep: Sequence[str] = (),
    aps_mode: bool | str = False,
) -> dict[str, Any]:
    """The configuration of a postprocessor; results are reported under its `postprocessor.name`.

    The `config` is a file or one of this package's by name; None = this package's or else OpenOOD's
    of the postprocessor's `name`, by default `fusenorm`. ConfigError for an unknown postprocessor,
    or `changes` to its arguments or its `sweep` that are not `KEY=VALUE`.
    """
    ours = {path.stem: path for path in (configs.config_root() / "postprocessors").glob("*.yml")}
    name = name or ("fusenorm" if config is None else None)
    if name is not None and name not in NATIVE and not bridge.openood_installed():
        more = f", or install OpenOOD, which has more, with '{INSTALL}'"
        raise ConfigError(unknown("postprocessor", name, NATIVE, more=more))
    if config is not None:
        path = ours.get(str(config), Path(config))
    elif name in ours:
        path = ours[str(name)]
    else:
        path = bridge.openood_config_root() / "postprocessors" / f"{name}.yml"
    read = configs.read_config(path)
    section = configs.lookup(read, "postprocessor")
    # One of FuseNorm's methods is never reported under the name of another.
    if name is not None and not (name in METHODS and section.get("name") in METHODS):
        section["name"] = name
    configs.lookup(read, "postprocessor", "name")
    for option, part, given in (
        ("--set", "postprocessor_args", changes),
        ("--sweep", "postprocessor_sweep", sweep),
    ):
        for change in given:
            key, equals, value = change.partition("=")
            if not equals:
                raise ConfigError(
                    f"{option} must be KEY=VALUE, for example alpha=0.5, got {change!r}"
                )
            section[part] = {**(section.get(part) or {}), key: configs.parse_yaml(value)}
    if aps_mode:
        section["APS_mode"] = aps_mode
    return read


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to evaluate, and how; see `evaluate` for `benchmark`, `fsood` and `validation`."""

    config: dict[str, Any]  # of the postprocessor
    benchmark: Benchmark
    fsood: bool = False
    validation: bool = False
    compare: bool = False  # whether every expert is scored as well
    amp: bool = False  # whether the network runs in bfloat16 where that is safe
    progress: bool = False
    trials: Path | None = None  # folder under which a search saves its trials

    @property
    def postprocessor(self) -> str:
        """The postprocessor's name."""
        return str(self.config["postprocessor"]["name"])

    @property
    def aps_mode(self) -> Any:
        """Whether the settings are searched first, and on what; see `FuseNormConfig`."""
        return self.config["postprocessor"].get("APS_mode") or False

    @property
    def is_native(self) -> bool:
        """Whether the postprocessor works without OpenOOD."""
        return self.postprocessor in NATIVE

    def image_sets(self) -> Iterator[ImageSet]:
        """All image sets that will be read."""
        yield from self.benchmark.tested(self.fsood, self.validation)
        if self.aps_mode is True and not self.validation:  # validation reads it anyway
            yield self.benchmark.val_ood
        if self.postprocessor in POSTHOC and POSTHOC[self.postprocessor].needs_fit:
            yield self.benchmark.id["train"]

    @cached_property
    def detector(self) -> Callable[[nn.Module], Detector]:
        """The native engine's detector, as a function of the network."""
        return detector_for(self.postprocessor, self.config, self.benchmark.norm[1])

    def openood_postprocessor(self) -> Any:
        """OpenOOD's postprocessor, or this package's, for OpenOOD's evaluator."""
        from fusenorm_openood.openood.adapter import make_postprocessor  # imports OpenOOD

        return make_postprocessor(self.postprocessor, self.config, self.benchmark.name)

    def check(self) -> None:
        """Raise ConfigError unless the postprocessor can be built from its configuration."""
        _ = self.detector if self.is_native else self.openood_postprocessor()


def find_engine(job: Job, requested: str = "auto") -> tuple[str, str]:
    """The engine for a job, `native` or `openood`, and why it is not the preferred one, or "".

    `auto` selects OpenOOD's evaluator for FuseNorm, if it supports the job, and for postprocessors
    that the native engine does not have. ConfigError if the requested engine does not support the
    job, OpenOODError if OpenOOD was requested and is missing or broken.
    """
    reason = _unsupported_by_openood(job, requested) if requested != "native" else None
    name, ours = job.postprocessor, ", ".join(NATIVE)
    engine, why = requested, ""
    if requested == "auto":
        preferred = name in METHODS or not job.is_native
        if preferred and not bridge.openood_installed():
            why = "OpenOOD is not installed"
        elif preferred and reason is not None:
            why = f"--engine openood {reason}"
        engine = "openood" if preferred and not why else "native"
    elif reason is not None:
        way_out = "--engine native" if job.is_native else f"from {ours}"
        raise ConfigError(f"--engine openood {reason}: choose {way_out}")
    if engine == "native" and not job.is_native:
        also = "" if reason is None else f", and --engine openood {reason}"
        raise ConfigError(
            f"--engine native has no postprocessor {name!r}{also}: choose from {ours}"
        )
    if engine == "native" and job.aps_mode and name not in METHODS:
        raise ConfigError(
            f"the native engine cannot search settings for {name!r}: install OpenOOD and choose "
            "--engine openood, or set APS_mode to False"
        )
    return engine, why


def _unsupported_by_openood(job: Job, requested: str) -> str | None:
    """Why OpenOOD's evaluator cannot do a job; None if it can."""
    name = job.benchmark.name
    unsupported = {
        "--id-data digits": name == "digits",
        "--amp": job.amp,
        "--normalization": job.benchmark.norm != load_benchmark(name).norm,
        "--compare": job.compare,
        "--validation": job.validation,
        "torchrun": torchrun.this_process().world > 1,
    }
    for option, used in unsupported.items():
        if used:
            return f"does not support {option}"
    if not bridge.openood_installed():
        return None
    try:
        shifted = bool(bridge.csid_of_evaluator(name))
    except OpenOODError:
        if requested == "openood":
            raise
        return "cannot import OpenOOD"
    if job.fsood and not shifted:
        return f"does not support --fsood with --id-data {name}"
    # OpenOOD's evaluator opens every list of the benchmark, and downloads those that are missing.
    missing = job.benchmark.missing(job.benchmark.every(shifted))
    return f"needs all files of the benchmark ({missing[0]})" if missing else None


def evaluate_run(job: Job, engine: str, run: Run, name: str = "") -> Evaluation:
    """Evaluate the network of one training run; `name` is the run's in messages and files."""
    benchmark, net = job.benchmark, run.net
    if engine == "openood":
        from fusenorm_openood.openood.adapter import openood_view  # imports OpenOOD

        table, scores = bridge.evaluate_with_openood(
            net if job.postprocessor in METHODS else openood_view(net),
            job.openood_postprocessor(),
            benchmark.name,
            benchmark.data_root,
            run.batch_size,
            run.num_workers,
            job.fsood,
            job.progress,
        )
        return Evaluation(table, pd.DataFrame(), scores, sets_of(scores, benchmark.name))
    detector = _searched(job, run, name) if job.aps_mode else job.detector(net)
    if job.compare and isinstance(detector, FuseNorm):
        detector.with_companions()
    return evaluate(detector, benchmark, job.fsood, job.validation, run.load, job.progress)


def _searched(job: Job, run: Run, name: str) -> FuseNorm:
    """The detector with the best settings on validation images, which are printed."""
    settings, sweep, aps_mode = read_fusenorm(job.config)
    id_loader, ood_loader = run.load(job.benchmark.id["val"]), run.load(job.benchmark.val_ood)
    ood = None if aps_mode == "pseudo" else ood_loader
    found = search(run.net, settings, sweep, id_loader, ood, job.progress)
    chosen = ", ".join(f"{key} = {getattr(found.settings, key)}" for key in sweep)
    print(
        f"search over {len(found.trials)} combinations{f', run {name}' * bool(name)}: "
        f"validation AUROC {100 * found.auroc:.2f} with {chosen}",
        flush=True,
    )
    if job.trials is not None:
        path = job.trials / name / "aps" / f"{job.postprocessor}.csv"
        trials = found.trials.round({"AUROC": 4})
        write_whole(path, lambda file: trials.to_csv(file, index=False, lineterminator="\n"))
    return FuseNorm(run.net, found.settings).with_statistics(found.statistics)
