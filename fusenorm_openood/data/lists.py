"""OpenOOD's image lists: one line per image, with its path and its label."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from fusenorm_openood.data.images import UNREADABLE, find_fault, read_image
from fusenorm_openood.data.transforms import Transform
from fusenorm_openood.errors import DataError


def read_imagelist(path: Path) -> list[tuple[str, int]]:
    """Image paths and labels of a list, -1 for OOD images.

    Raises:
        DataError: the list is missing, empty, or has a line that is not `path label`.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"image list {path} cannot be read: {error.strerror}") from None
    entries = []
    for number, line in enumerate(lines, start=1):
        name, _, label = line.strip().partition(" ")
        try:
            entries.append((name, int(label)))
        except ValueError:
            raise DataError(
                f"{path}, line {number}: must be 'path label' with an integer label, got {line!r}"
            ) from None
    if not entries:
        raise DataError(f"image list {path} is empty: it must have one line 'path label' per image")
    return entries


class ImageList(Dataset[dict[str, Any]]):
    """The images of a list, in OpenOOD's format: `{"data": [3, H, W], "label": int}`.

    Raises:
        DataError: see `read_imagelist`; on access to an image, also a file that is missing or
            cannot be read.
    """

    def __init__(self, path: Path, data_dir: Path, transform: Transform) -> None:
        self.path, self.data_dir, self.transform = path, data_dir, transform
        self.entries = read_imagelist(path)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, label = self.entries[index]
        try:
            image = read_image(self.data_dir / name)
        except UNREADABLE as error:
            reason = "missing" if isinstance(error, FileNotFoundError) else str(error)
            raise DataError(
                f"{self.path}, line {index + 1}: image {self.data_dir / name} cannot be read "
                f"({reason}): restore the file"
            ) from None
        return {"data": self.transform(image), "label": label}

    def first_missing(self) -> str | None:
        """A message about the first image that does not exist, None if all do; reads no image."""
        for number, (name, _) in enumerate(self.entries, start=1):
            if not os.path.isfile(self.data_dir / name):
                return f"{self.path}, line {number}: image {self.data_dir / name} is missing"
        return None

    def faults(self) -> Iterator[tuple[str, str]]:
        """The position and the fault of each faulty image; see `find_fault`. Opens every file."""
        for number, (name, _) in enumerate(self.entries, start=1):
            path = self.data_dir / name
            if (fault := find_fault(path)) is not None:
                yield f"{self.path}, line {number}: image {path}", fault
