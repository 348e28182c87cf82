"""What a file keeps of a fitted FuseNorm, and whether the file belongs to a network."""

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.detectors.calibration import Calibration, packed
from fusenorm_openood.detectors.record import STATES, Record, Source, read_record
from fusenorm_openood.detectors.storage import Contents, read_contents, write_contents
from fusenorm_openood.errors import ConfigError, DetectorFileError
from fusenorm_openood.networks.fingerprint import Fingerprint
from fusenorm_openood.structure.head import weight_of
from fusenorm_openood.structure.identity import identify
from fusenorm_openood.structure.modes import undisturbed
from fusenorm_openood.structure.reading import Structure
from fusenorm_openood.structure.recording import INPUT
from fusenorm_openood.structure.wrappers import scoring_module, unwrapped
from fusenorm_openood.version import __version__


class Kept(NamedTuple):
    """Everything but the network; see the attributes of `FuseNorm`."""

    calibration: Calibration
    reference: NDArray[np.float64] | None
    structure: Structure | None
    preprocessing: Preprocessing | None
    class_names: tuple[str, ...] | None
    network_source: dict[str, str]


def write_kept(path: Path, kept: Kept, net: nn.Module) -> None:
    """Write a detector for a network to a file.

    Raises:
        DetectorFileError: the file cannot be written.
    """
    tensors, record = packed(kept.calibration)
    if kept.reference is not None:
        tensors["reference"] = torch.from_numpy(kept.reference)
    record |= {
        "version": __version__,
        "structure": kept.structure and kept.structure.to_json(),
        "network": (kept.calibration.network or identify(net, ()))._asdict(),
        "source": kept.network_source,
        "class_names": kept.class_names,
        "preprocessing": kept.preprocessing and kept.preprocessing.to_json(),
    }
    write_contents(path, Contents(tensors, record))


def read_source(path: Path) -> Source:
    """How the command line built the network of a file.

    Raises:
        DetectorFileError: the file is missing, damaged, of a newer format, or nonsense.
    """
    return _read(path)[0].source


def read_kept(path: Path, net: nn.Module, strict: bool) -> Kept:
    """Read a detector for this network; other weights are an error, or if not `strict` a warning.

    Raises:
        DetectorFileError: the file is missing, damaged, of a newer format, nonsense, or of another
            network.
    """
    record, calibration, reference = _read(path)
    _check_network(path, record.network, identify(net, record.network.image, passes=1), strict)
    _check_modules(path, record, calibration, unwrapped(net))
    structure = record.structure
    if structure is not None and structure.head.feature:  # found anew, with its affine map
        structure = None
    return Kept(
        calibration,
        reference,
        structure,
        record.preprocessing,
        record.class_names,
        {name: value for name, value in record.source._asdict().items() if value is not None},
    )


def nonsense(path: Path, error: Exception | str) -> DetectorFileError:
    """The error for a file whose parts do not fit each other."""
    return DetectorFileError(
        f"detector file {path} holds what no fit has given ({error}): fit again"
    )


def _read(path: Path) -> tuple[Record, Calibration, NDArray[np.float64] | None]:
    contents = read_contents(path)
    try:
        record, calibration = read_record(contents)
    except ConfigError as error:
        raise nonsense(path, error) from None
    reference = contents.tensors.get("reference")
    return record, calibration, None if reference is None else reference.numpy()


def _check_network(path: Path, known: Fingerprint, given: Fingerprint, strict: bool) -> None:
    differences = given.differences(known)
    if differences:
        more = f", and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise DetectorFileError(
            f"detector file {path} was made with a {known.kind}, this {given.kind} differs "
            f"({', '.join(differences[:3])}{more}): give the network that it was fitted with"
        )
    if given.weights != known.weights:
        what = f"other weights of a {known.kind}: give the checkpoint"
    elif not given.agrees(known):
        what = f"a {known.kind} that computes other logits with these weights: give the network"
    else:
        return
    message = f"detector file {path} was made with {what} that it was fitted with, or fit again"
    if strict:
        raise DetectorFileError(message)
    warnings.warn(message, UserWarning, stacklevel=4)


def _check_modules(path: Path, record: Record, calibration: Calibration, core: nn.Module) -> None:
    """Require that what the file says of modules is true of the network."""
    structure, modules = record.structure, dict(core.named_modules())
    if structure is None:
        return
    for field in ("runs", "shapes", "layouts"):
        named = {name.removesuffix(INPUT) for name in getattr(structure, field)}
        if absent := named - modules.keys():
            raise nonsense(path, f"structure.{field} names the absent module {min(absent)!r}")
    if structure.scoring != (scoring := scoring_module(core)):
        raise nonsense(path, f"structure.scoring must be {scoring!r}")
    layers = nn.ModuleList(modules[name] for name in structure.head.names)
    with undisturbed(layers):  # a spectral norm in training changes when read
        weights = list(map(weight_of, layers))
    widths = [weight.shape[1] for weight in weights if weight is not None]
    for number, (expert, state) in enumerate(calibration.fitted.states.items()):
        for name, letters in STATES[expert.name].items():
            sizes = dict(zip(letters.split(), state[name].shape, strict=True))
            known = len(widths) == len(weights) > 0 and not structure.head.feature
            if known and sizes.get("D", sum(widths)) != sum(widths):
                raise nonsense(path, f"state.{number}.{name} must be of width {sum(widths)}")
