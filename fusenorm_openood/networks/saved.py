"""Read files written by `torch.save` or safetensors, without running any code from them."""

import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fusenorm_openood.errors import CheckpointError, DamagedFileError

SAFETENSORS_HEADER = 100_000_000  # bytes; the format's limit


def read_saved(path: Path) -> Any:
    """The content of a file written by `torch.save` or safetensors, on the CPU.

    Tensors and containers only. Errors that are not the file's fault, such as running out of
    memory, are passed on.

    Raises:
        DamagedFileError: the file is truncated or altered, or was not written by either.
        CheckpointError: the file is missing, cannot be opened, or holds objects that cannot be
            loaded without running code.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} not found: give the path of a file") from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be opened: {error.strerror}") from None
    damaged = DamagedFileError(
        f"checkpoint {path} of {path.stat().st_size} bytes cannot be read: it is damaged or was "
        "written by neither torch.save nor safetensors, copy it again"
    )
    is_archive = start[:2] == b"PK"
    if _is_safetensors(start) and not is_archive:
        try:
            return load_file(path)
        except SafetensorError:
            raise damaged from None
    # A damaged archive may still load, with wrong numbers, so its checksums are verified.
    if is_archive and not _is_intact(path):
        raise damaged
    try:
        with path.open("rb") as file:  # by its content; by its path, some torch go by the suffix
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise CheckpointError(
                f"checkpoint {path} holds more than tensors, which cannot be loaded without "
                "running its code: save net.state_dict() instead"
            ) from None
        raise damaged from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, OSError) as error:
        if "TorchScript" in str(error) or "file data.pkl" in str(error):
            raise CheckpointError(
                f"checkpoint {path} holds a program and not weights: save net.state_dict() instead"
            ) from None
        if is_archive or "memory" in str(error):  # the file is intact, or not at fault
            raise
        raise damaged from None


def _is_safetensors(start: bytes) -> bool:
    """Whether the first 9 bytes of a file are a header's length and the beginning of its JSON."""
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= SAFETENSORS_HEADER


def _is_intact(path: Path) -> bool:
    """Whether every member of a zip archive matches its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, NotImplementedError, zlib.error, EOFError):
        return False
