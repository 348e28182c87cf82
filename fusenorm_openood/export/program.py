"""Make a program of a detector and its network, run it, and write it."""

import json
import shutil
from collections.abc import Sequence
from copy import copy
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusenorm_openood import errors
from fusenorm_openood.errors import ConfigError, ExportError
from fusenorm_openood.export.judge import Dtype, Inputs, Judge, error_of, facts_of, float32_copy
from fusenorm_openood.export.targets import TARGETS, Outputs, Run, Target
from fusenorm_openood.kernels.devices import on_cpu
from fusenorm_openood.method.calibration import PREDICTED
from fusenorm_openood.method.scores.base import Score
from fusenorm_openood.storage.files import write_whole
from fusenorm_openood.version import __version__

if TYPE_CHECKING:
    from fusenorm_openood.detectors.fusenorm import FuseNorm

TOLERANCE = 10  # times the error, between confidences of PyTorch and of a program of any image
OLDEST_TORCH = (2, 9)


class Exported(NamedTuple):
    """What was exported.

    Attributes:
        path: the file.
        outputs: names of the program's outputs.
        max_rank: the largest rank with which an image is OOD, None if there are no ranks; of a
            calibration by predicted class one for each class.
        difference: largest difference of its confidences from PyTorch's on a few drawn images,
            relative to those above 1; None if its runtime is not installed.
    """

    path: Path
    outputs: tuple[str, ...]
    max_rank: int | list[int] | None
    difference: float | None


def export_detector(
    detector: "FuseNorm",
    path: Path,
    dtype: Dtype | None,
    acceptance: float,
    shape: Sequence[int] | None,
    target: str | None,
    resize_from: tuple[int, int] | None,
) -> Exported:
    """Write a detector and its network as one program; see `FuseNorm.export`."""
    statistics, calibration = detector.check_fitted(), detector.calibration_
    metadata: dict[str, Any] = {"version": __version__, "calibration_images": 0}
    if calibration is not None:
        if calibration.by not in (None, PREDICTED):
            raise ConfigError(
                f"a program cannot know the {calibration.by} of an image, by which the calibration "
                "images are grouped: calibrate by predicted class, or without groups"
            )
        metadata |= facts_of(calibration, acceptance)
    rows = detector.rows[: len(detector.experts)]
    if any(isinstance(expert, Score) and expert.needs_gradient for expert in rows):
        raise ConfigError(
            f"output='odin' with noise={detector.settings.noise:g} needs a gradient, which an "
            "exported program cannot compute: fit with noise=0, or with output='energy', 'msp' or "
            "'mls'"
        )
    chosen = find_target(path, target)
    inputs = Inputs.of(detector.preprocessing, dtype, shape, resize_from)
    images = inputs.examples()
    twin = copy(detector)
    twin.net, twin.companions = float32_copy(detector.net), ()
    expected = twin.score(inputs.normalised(images)).numpy()
    error = error_of(statistics.fusion, statistics.id_scores)
    judge = Judge(twin.scoring(), rows, statistics.fusion, inputs, calibration, error)
    preprocessing = detector.preprocessing
    metadata |= {
        "outputs": judge.outputs,
        "dtype": str(inputs.dtype).removeprefix("torch."),
        "error": error,
        "class_names": detector.class_names,
        "experts": detector.experts,
        "strong": detector.strong,
        "preprocessing": preprocessing and preprocessing.to_json(),
        "resize_from": resize_from,
    }
    with TemporaryDirectory() as folder, on_cpu():  # where torch loads programs
        draft, difference = Path(folder) / path.name, None
        _write(chosen, judge, images[:2], json.dumps(metadata), draft)
        if chosen.runtime and find_spec(chosen.runtime):
            difference = _compared(chosen, judge, draft, images.numpy(), expected, path)
        move(draft, path)
    return Exported(path, judge.outputs, metadata.get("max_rank"), difference)


def is_new_enough() -> bool:
    """Whether this torch is one that exports are tested with, or a newer one."""
    return tuple(map(int, torch.__version__.split(".")[:2])) >= OLDEST_TORCH


def find_target(path: Path, name: str | None) -> Target:
    """The target of that name, or else the first one with the suffix of a file.

    ConfigError for an unknown target, or a file with another suffix.
    """
    by_suffix = {target.suffix: known for known, target in reversed(TARGETS.items())}
    if name is None and path.suffix not in by_suffix:
        raise ConfigError(
            f"{path} must end in {', '.join(by_suffix)}, which says what the program is for"
        )
    name = name or by_suffix[path.suffix]
    if name not in TARGETS:
        raise ConfigError(errors.unknown("target", name, TARGETS))
    if path.suffix != TARGETS[name].suffix:
        raise ConfigError(f"a program for {name} must end in {TARGETS[name].suffix}, got {path}")
    return TARGETS[name]


def run_all(target: Target, run: Run, images: NDArray[Any]) -> Outputs:
    """The outputs of any number of images, as many at a time as the program takes."""
    size = target.batch or len(images)
    parts = [run(images[first : first + size]) for first in range(0, len(images), size)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _write(target: Target, judge: Judge, images: Tensor, metadata: str, draft: Path) -> None:
    if not is_new_enough():
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ExportError(
            f"exporting needs torch {oldest}, this is {torch.__version__}: pip install -U torch"
        )
    for package in target.tools:
        if find_spec(package) is None:
            raise ExportError(
                f"exporting {draft.name} needs {package}, which is missing: "
                f"pip install 'fusenorm-openood[{target.extra}]'"
            )
    try:
        target.write(judge, images, metadata, draft)
    except errors.FuseNormError:
        raise
    except Exception as error:
        raise ExportError(
            f"{type(judge.net).__name__} cannot be written as {draft.name} "
            f"({errors.first_sentence(error)}): export it to a file that ends in .pt2"
        ) from error


def _compared(
    target: Target,
    judge: Judge,
    draft: Path,
    images: NDArray[Any],
    expected: NDArray[np.float64],
    path: Path,
) -> float:
    """The largest difference of a program's confidences; ExportError if they or ranks are wrong."""
    if images.dtype == np.float32:  # a last image that is not finite
        images = np.concatenate([images, images[:1]])
        images[-1, 0, 0, 0] = np.nan
    found = run_all(target, target.load(draft), images)
    conf = found["confidence"][: len(expected)]
    difference = float((abs(conf - expected) / np.maximum(abs(expected), 1)).max())
    faults = []
    if not difference <= TOLERANCE * judge.error:
        most = TOLERANCE * judge.error
        faults.append(
            f"confidences that differ from PyTorch's by {difference:.2g}, more than {most:.2g}"
        )
    if judge.thresholds is not None:
        given, logits = torch.from_numpy(found["confidence"]), torch.from_numpy(found["logits"])
        wanted = judge.ranks(given, logits.argmax(1), judge.thresholds)
        wanted[len(expected) :] = 1
        if found["rank"].tolist() != wanted.tolist():
            faults.append(f"ranks {found['rank'].tolist()} in place of {wanted.tolist()}")
    if faults:
        raise ExportError(
            f"the exported program gives {' and '.join(faults)}, so {path} was not written: report "
            "this with the network's name"
        )
    return difference


def move(draft: Path, path: Path) -> None:
    """Move a program to its place: a file, all files of the same name, or a folder."""
    with errors.os_errors(ExportError, f"{path} cannot be written", "choose another folder"):
        for part in sorted(draft.parent.iterdir()):  # .bin before .xml
            place = path.with_name(part.name)
            if part.is_dir():
                shutil.copytree(part, place, dirs_exist_ok=True)
            else:
                write_whole(place, partial(shutil.copyfile, part))
