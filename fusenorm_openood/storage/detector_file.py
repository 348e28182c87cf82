"""Store a fitted detector in a file: tensors and JSON in safetensors, no pickle.

The file is one safetensors archive. Its metadata have one entry, `fusenorm`, a JSON text with
everything that is no tensor and a SHA-256 of the whole file in which its own digits are zeros.
"""

import json
import re
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from torch import Tensor

from fusenorm_openood.errors import DetectorFileError, os_errors
from fusenorm_openood.storage.files import metadata, write_whole

FORMAT = 4
_NO_CHECKSUM = b"0" * 64
_CHECKSUM = re.compile(rb'\\"checksum\\": \\"([0-9a-f]{64})\\"')


class Contents(NamedTuple):
    """Contents of a detector file: tensors on the CPU, and what can be expressed in JSON."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]  # with the package's `version`


def write_contents(path: Path, contents: Contents) -> None:
    """Write a detector file completely or not at all; DetectorFileError if that fails."""
    record = {"format": FORMAT, "checksum": _NO_CHECKSUM.decode(), **contents.record}
    tensors = {name: tensor.contiguous() for name, tensor in contents.tensors.items()}
    data = safetensors.torch.save(tensors, {"fusenorm": json.dumps(record)})
    digits = sha256(data).hexdigest().encode()
    data = _CHECKSUM.sub(lambda match: match[0].replace(match[1], digits), data, count=1)
    what = f"detector file {path} cannot be written"
    with os_errors(DetectorFileError, what, "choose another folder"):
        write_whole(path, lambda file: file.write_bytes(data))


def read_contents(path: Path) -> Contents:
    """Read a detector file; no byte of it may have changed.

    DetectorFileError if the file is missing, damaged, no detector file or of another format.
    """
    way_out = "give a file that detector.save wrote"
    with os_errors(DetectorFileError, f"detector file {path} cannot be read", way_out):
        data = path.read_bytes()
    found = _CHECKSUM.search(data)
    if found is None:
        raise DetectorFileError(f"{path} is no detector file, or a damaged one: {way_out}")
    without = data[: found.start(1)] + _NO_CHECKSUM + data[found.end(1) :]
    if sha256(without).hexdigest().encode() != found[1]:
        raise DetectorFileError(f"detector file {path} is damaged: copy it again, or fit again")
    try:
        tensors, record = safetensors.torch.load(data), json.loads(metadata(data))
        version = record["format"]
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        raise DetectorFileError(f"{path} is no detector file: {way_out}") from None
    if version != FORMAT:
        raise DetectorFileError(
            f"detector file {path} has format {version!r}, this version of the package reads "
            f"{FORMAT}: install the version that wrote it ({record.get('version')}), or fit again"
        )
    return Contents(tensors, record)
