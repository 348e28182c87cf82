"""What a file keeps of a fitted FuseNorm, and whether the file belongs to a network."""

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.detectors.calibration import Calibration, packed, unpacked
from fusenorm_openood.detectors.storage import Contents, read_contents, write_contents
from fusenorm_openood.errors import DetectorFileError
from fusenorm_openood.networks.fingerprint import Fingerprint, fingerprint
from fusenorm_openood.structure.reading import Structure
from fusenorm_openood.structure.wrappers import unwrapped
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
        "network": fingerprint(unwrapped(net))._asdict(),
        "source": kept.network_source,
        "class_names": kept.class_names,
        "preprocessing": kept.preprocessing and kept.preprocessing.to_json(),
    }
    write_contents(path, Contents(tensors, record))


def read_kept(path: Path, net: nn.Module, strict: bool) -> Kept:
    """Read a detector for this network; other weights are an error, or if not `strict` a warning.

    Raises:
        DetectorFileError: the file is missing, damaged, of a newer format, or of another network.
    """
    tensors, record = read_contents(path)
    try:
        known, reference = Fingerprint(**record["network"]), tensors.get("reference")
        known_structure = record["structure"] and Structure.from_json(record["structure"])
        if known_structure and known_structure.head.feature:  # found anew, with its map
            known_structure = None
        preprocessing = record["preprocessing"]
        names = record["class_names"]
        kept = Kept(
            unpacked(tensors, record),
            None if reference is None else reference.numpy(),
            known_structure,
            preprocessing and Preprocessing.from_json(preprocessing),
            None if names is None else tuple(names),
            record.get("source", {}),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DetectorFileError(
            f"detector file {path} lacks what this version reads ({error}): fit again"
        ) from None
    _check_network(path, known, fingerprint(unwrapped(net)), strict)
    return kept


def _check_network(path: Path, known: Fingerprint, given: Fingerprint, strict: bool) -> None:
    differences = given.differences(known)
    if differences:
        more = f", and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise DetectorFileError(
            f"detector file {path} was made with a {known.kind}, this {given.kind} differs "
            f"({', '.join(differences[:3])}{more}): give the network that it was fitted with"
        )
    if given.weights != known.weights:
        message = (
            f"detector file {path} was made with other weights of a {known.kind}: give the "
            "checkpoint that it was fitted with, or fit again"
        )
        if strict:
            raise DetectorFileError(message)
        warnings.warn(message, UserWarning, stacklevel=4)
