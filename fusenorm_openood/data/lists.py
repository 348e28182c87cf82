"""OpenOOD's image lists: one line per image, with its path and its label."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset

from fusenorm_openood.data.images import find_fault, read_image, reading
from fusenorm_openood.data.preprocessing import Transform
from fusenorm_openood.errors import DataError
from fusenorm_openood.kernels.devices import on_cpu


class Entry(NamedTuple):
    """One image of a list: its path, its label (-1 for OOD images) and its line, from 1."""

    name: str
    label: int
    line: int


def read_imagelist(path: Path) -> list[Entry]:
    """The entries of a list in UTF-8; a label is the last field of a line that is not blank.

    DataError if the list is missing, empty or not in UTF-8, or has another line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        wrong = "\0" if "\0" in text else ""  # UTF-16 without a byte-order mark
    except OSError as error:
        raise DataError(f"image list {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        wrong = chr(error.object[error.start])
    if wrong:
        raise DataError(
            f"image list {path} must be in UTF-8, got byte 0x{ord(wrong):02x}: convert it, for "
            "example with 'iconv -f LATIN1 -t UTF-8' or 'iconv -f UTF-16 -t UTF-8'"
        )
    entries = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            name, label = line.strip().rsplit(maxsplit=1)
            entries.append(Entry(name, int(label), number))
        except ValueError:
            raise DataError(
                f"{path}, line {number}: must be 'path label' with an integer label, got {line!r}"
            ) from None
    if not entries:
        raise DataError(f"image list {path} is empty: it must have one line 'path label' per image")
    return entries


class ImageList(Dataset[dict[str, Any]]):
    """The images of a list, in OpenOOD's format: `{"data": [3, H, W], "label": int}`.

    DataError as of `read_imagelist`, and on access to an image that is missing or cannot be read.
    """

    def __init__(self, path: Path, data_dir: Path, transform: Transform) -> None:
        self.path, self.data_dir, self.transform = path, data_dir, transform
        self.entries = read_imagelist(path)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self.entries[index]
        with reading(self.where(index)):
            image = read_image(self.data_dir / entry.name)
        return {"data": self.transform(image), "label": entry.label}

    def check_labels(self, num_classes: int) -> None:
        """Raise DataError unless all labels are among a network's classes."""
        for name, label, line in self.entries:
            if not 0 <= label < num_classes:
                raise DataError(
                    f"{self.path}, line {line}: the label of {name} must be one of the network's "
                    f"{num_classes} classes 0 to {num_classes - 1}, got {label}: use the list of "
                    "this data set"
                )

    def first_missing(self) -> str | None:
        """A message about the first image that does not exist, None if all do; reads no image."""
        for number, path in enumerate(self.paths()):
            if not os.path.isfile(path):
                return f"{self.where(number)} is missing"
        return None

    def faults(self) -> dict[int, str]:
        """The fault of each faulty image by its number; see `find_fault`. Opens every file."""
        found = ((n, find_fault(self.data_dir / e.name)) for n, e in enumerate(self.entries))
        return {number: fault for number, fault in found if fault is not None}

    def paths(self) -> Iterator[str]:
        """The files, as strings, which is faster than paths."""
        return (os.path.join(self.data_dir, entry.name) for entry in self.entries)

    def where(self, number: int) -> str:
        """An image's list, line and file."""
        entry = self.entries[number]
        return f"{self.path}, line {entry.line}: image {self.data_dir / entry.name}"


class CpuLoader(DataLoader[Any]):
    """A DataLoader whose seeds, order and batches are on the CPU.

    Torch makes them on the device of `torch.set_default_device`, which may have no random numbers.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        with on_cpu():
            batches = super().__iter__()
        end = object()
        while True:
            with on_cpu():
                batch = next(batches, end)
            if batch is end:
                return
            yield batch
