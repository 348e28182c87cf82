"""Detector files: written, read, and checked against the network."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from fusenorm_openood import errors
from fusenorm_openood.detectors.record import Record, Source, read_record
from fusenorm_openood.detectors.scorer import check_random
from fusenorm_openood.detectors.statistics import DetectorStatistics, packed
from fusenorm_openood.method.calibration import PREDICTED, Calibration
from fusenorm_openood.network.fingerprint import Fingerprint, fixed_images, identify
from fusenorm_openood.network.graph import INPUT
from fusenorm_openood.network.head import weight_of
from fusenorm_openood.network.running import eval_mode, scoring_module, unwrapped
from fusenorm_openood.storage.detector_file import Contents, read_contents, write_contents
from fusenorm_openood.version import __version__

if TYPE_CHECKING:
    from fusenorm_openood.detectors.fusenorm import FuseNorm


def save(detector: "FuseNorm", path: Path) -> None:
    """Write a fitted detector; see `FuseNorm.save`."""
    statistics, preprocessing = detector.check_fitted(), detector.preprocessing
    structure = detector.known_structure
    network = statistics.network or identify(detector.net, ())
    if preprocessing and network.image[:1] not in ((), (preprocessing.channels,)):
        raise errors.ConfigError(
            f"detector.preprocessing has {preprocessing.channels} channels, the images of its fit "
            f"{network.image[0]}: set that of these images"
        )
    tensors, record = packed(statistics)
    groups, known = None, detector.calibration_
    if known is not None:
        parts = {"": known.scores, ".marks": known.marks, ".group": known.group}
        tensors |= {f"reference{name}": torch.from_numpy(part) for name, part in parts.items()}
        names = () if known.by == PREDICTED else known.names
        history = tuple(call._asdict() for call in known.history)
        groups = {"history": history, "by": known.by, "names": names, "least": known.least}
    record |= {
        "calibration": groups,
        "version": __version__,
        "structure": structure and structure.to_json(),
        "network": network._asdict(),
        "source": detector.network_source,
        "class_names": detector.class_names,
        "preprocessing": preprocessing and preprocessing.to_json(),
    }
    write_contents(path, Contents(tensors, record))


def load(cls: "type[FuseNorm]", path: Path, net: nn.Module, strict: bool) -> "FuseNorm":
    """The detector in a file; see `FuseNorm.load`."""
    record, statistics, calibration = _read(path)
    given = identify(net, record.network.image, passes=1)
    is_other = _check_network(path, record.network, given, strict, calibration is not None)
    structure = record.structure
    if structure is not None and structure.head.feature:  # read again, with its affine map
        structure = None
    with _sensible(path):
        _check_modules(record, statistics, unwrapped(net))
        detector = cls(net, statistics.settings, structure)
        if detector.experts and detector.strong != statistics.strong:
            raise errors.ConfigError(f"strong must be {', '.join(detector.strong)}")
        if structure is not None:
            check_random(net, structure, statistics.settings.random)
        detector.adopt(statistics)
        detector.class_names = record.class_names
    detector.calibration_, detector.preprocessing = calibration, record.preprocessing
    detector.other_network = given if is_other else None
    source = record.source._asdict()
    detector.network_source = {name: value for name, value in source.items() if value is not None}
    if record.network.image:  # whose scores an image of this size has to have
        with _sensible(path), suppress(errors.NonFiniteError):  # of images that are no photographs
            detector.expert_scores(fixed_images(record.network.image))
    return detector


def read_source(path: Path) -> Source:
    """How the command line built the network of a file; DetectorFileError as in `load`."""
    return _read(path)[0].source


@contextmanager
def _sensible(path: Path) -> Iterator[None]:
    """Context in which an error is that of a file whose parts do not fit each other."""
    try:
        yield
    except errors.FuseNormError as error:
        raise errors.DetectorFileError(
            f"detector file {path} holds what no fit has given ({error}): fit again"
        ) from None


def _read(path: Path) -> tuple[Record, DetectorStatistics, Calibration | None]:
    contents = read_contents(path)
    with _sensible(path):
        return read_record(contents)


def _check_network(
    path: Path, known: Fingerprint, given: Fingerprint, strict: bool, is_calibrated: bool
) -> bool:
    """Whether the network computes otherwise than the known one, which is an error if strict."""
    differences = given.differences(known)
    if differences:
        more = f", and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise errors.DetectorFileError(
            f"detector file {path} was made with {known.kind}, and this {given.kind} differs "
            f"({', '.join(differences[:3])}{more}): give the network that it was fitted with"
        )
    if given.weights != known.weights:
        what = f"other weights of the same network, {known.kind}: give the checkpoint"
    elif not given.agrees(known):
        what = f"another forward of {known.kind}, which computes other logits: give the network"
    else:
        return False
    message = f"detector file {path} was made with {what} that it was fitted with, or fit again"
    if strict:
        raise errors.DetectorFileError(message)
    stale = "the fit and the calibration are" if is_calibrated else "the fit is"
    errors.warn(f"{message}: {stale} stale")
    return True


def _check_modules(record: Record, statistics: DetectorStatistics, core: nn.Module) -> None:
    """Require that what the file says of modules is true of the network."""
    structure, modules = record.structure, dict(core.named_modules())
    if structure is None:
        return
    for field in ("runs", "shapes", "layouts"):
        named = {name.removesuffix(INPUT) for name in getattr(structure, field)}
        if absent := named - modules.keys():
            raise errors.ConfigError(f"structure.{field} names the absent module {min(absent)!r}")
    if structure.scoring != (scoring := scoring_module(core)):
        raise errors.ConfigError(f"structure.scoring must be {scoring!r}")
    layers = nn.ModuleList(modules[name] for name in structure.head.names)
    with eval_mode(layers):  # a spectral norm in training changes when read
        weights = list(map(weight_of, layers))
    widths = [weight.shape[1] for weight in weights if weight is not None]
    for number, (expert, state) in enumerate(statistics.fitted.states.items()):
        for name, letters in expert.state.items():
            sizes = dict(zip(letters.split(), state[name].shape, strict=True))
            known = len(widths) == len(weights) > 0 and not structure.head.feature
            if known and sizes.get("D", sum(widths)) != sum(widths):
                raise errors.ConfigError(f"state.{number}.{name} must be of width {sum(widths)}")
