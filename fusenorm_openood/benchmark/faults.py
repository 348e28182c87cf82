"""Images that are truncated or unreadable; with a store, each file is opened once for good."""

import json
from pathlib import Path

import numpy as np

from fusenorm_openood.benchmark.records import manifest
from fusenorm_openood.data.lists import ImageList
from fusenorm_openood.errors import StoreError
from fusenorm_openood.store import ShardSet
from fusenorm_openood.version import __version__


def find_faults(images: ImageList, store: Path | None = None) -> list[tuple[str, str]]:
    """The position and the fault of each faulty image; see `find_fault`.

    Args:
        images: the images.
        store: where it is kept that no file is unreadable, and which ones are truncated, until the
            list, or the size or time of a file, changes; None = every file is opened.

    Raises:
        DataError: with a store, a file is missing.
        StoreError: the store cannot be written.
    """
    if store is None:
        return _located(images, images.faults())
    record = {"version": __version__, "images": manifest(images), "heard": "faults"}
    kept = ShardSet(store, record, f"{images.path.stem}_faults", rows=1)
    try:
        found = {int(n): fault for n, fault in json.loads(kept.read(0)["faults"][0]).items()}
    except StoreError:
        found = images.faults()
        if {"truncated"}.issuperset(found.values()):  # others may become readable unchanged
            kept.write(0, {"faults": np.array([json.dumps(found)], dtype=object)})
            kept.discard_damaged(0)
    return _located(images, found)


def _located(images: ImageList, faults: dict[int, str]) -> list[tuple[str, str]]:
    return [(images.where(number), fault) for number, fault in faults.items()]
