"""What the store has of a run's network and images, so that no image is scored twice."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from fusenorm_openood.data.benchmarks import ImageSet, image_loader
from fusenorm_openood.data.lists import ImageList
from fusenorm_openood.errors import TapError
from fusenorm_openood.forward.batches import Pace
from fusenorm_openood.forward.passes import head_of
from fusenorm_openood.forward.recorded import RecordedLoader
from fusenorm_openood.method.scores.base import Head
from fusenorm_openood.network.structure import Structure
from fusenorm_openood.storage.files import file_digest, manifest
from fusenorm_openood.storage.shards import Columns
from fusenorm_openood.storage.stored import stored_row
from fusenorm_openood.version import __version__

Loader = Callable[[ImageSet], Iterable[Any]]


def plain_loader(batch_size: int, num_workers: int) -> Loader:
    """Loaders of images that store nothing."""
    return partial(image_loader, batch_size=batch_size, num_workers=num_workers)


class Known(NamedTuple):
    """What is needed of a network to use its stored scores without loading it."""

    structure: Structure
    head: Head | None


@dataclass(frozen=True)
class Records:
    """The part of a store that belongs to one network, as it is run.

    Attributes:
        store: folder of the store.
        network: what determines the network and how it runs, in terms of JSON; see
            `network_record`.
        batch_size, num_workers: settings of the data loaders.
        pace: counts the images that its network is run on.
    """

    store: Path
    network: Mapping[str, Any]
    batch_size: int = 200
    num_workers: int = 0
    pace: Pace = field(default_factory=Pace, compare=False)

    def loader(self, image_set: ImageSet) -> RecordedLoader:
        """A loader of an image set that stores its scores."""
        images = image_set.images()
        record = {
            **self.network,
            "images": list_digest(images),
            "transform": repr(images.transform),
        }
        name = image_set.imagelist.stem
        how = self.batch_size, self.num_workers, self.pace
        return RecordedLoader(images, self.store, record, name, *how)

    def known(self) -> Known | None:
        """What `keep` stored of the network, if it did."""
        row = self._row(lambda: None)
        if row is None:
            return None
        structure = Structure.from_json(json.loads(row["structure"][0]))
        if "weight" not in row:
            return Known(structure, None)
        bias = torch.from_numpy(row["bias"][0])
        return Known(structure, Head(torch.from_numpy(row["weight"]).view(len(bias), -1), bias))

    def keep(self, net: nn.Module, structure: Structure) -> None:
        """Store how the network is built, and its head."""

        def columns() -> Columns:
            found = {"structure": np.array([json.dumps(structure.to_json())], dtype=object)}
            try:
                weight, bias = (t.detach().cpu().float().numpy() for t in head_of(net, structure))
            except TapError:  # no linear head
                return found
            return {**found, "weight": weight.reshape(1, -1), "bias": bias[None]}

        self._row(columns)

    def _row(self, compute: Callable[[], Columns | None]) -> Columns | None:
        return stored_row(self.store, {**self.network, "content": "structure"}, "network", compute)


def network_record(checkpoint: Path, network: str | None, image_size: int, **run: Any) -> Any:
    """What determines a network's scores, besides its images.

    Args:
        checkpoint: its file, all of whose bytes count.
        network: its architecture, if it is named; of a factory, the bytes of its module count.
        image_size: size of the images.
        run: how it is run, for example in half precision.
    """
    return {
        "version": __version__,
        "checkpoint": file_digest(checkpoint),
        "network": network,
        "code": None if network is None else _code(network.partition(":")[0]),
        "image_size": image_size,
        **run,
    }


def _code(module: str) -> str | None:
    """Digest of the file of a module, None of a package or without one."""
    try:
        found = find_spec(module)
    except (ImportError, ValueError):  # the import of the network raises it as well
        return None
    if found is None or found.origin is None or found.submodule_search_locations is not None:
        return None
    return file_digest(found.origin) if Path(found.origin).is_file() else None


def list_digest(images: ImageList) -> str:
    """SHA-256 of an image list's paths, labels, and the sizes and times of its files."""
    names = (f"{entry.name} {entry.label}" for entry in images.entries)
    return manifest(images.paths(), names)


def find_faults(images: ImageList, store: Path | None = None) -> list[tuple[str, str]]:
    """The position and the fault of each faulty image; see `find_fault`.

    Args:
        images: the images.
        store: where the faults are stored if all files can be read, some of them truncated, until
            the list, or the size or time of a file, changes; None = every file is opened.

    Raises:
        DataError: with a store, a file is missing.
        StoreError: the store cannot be written.
    """
    found: dict[int, str] | None = None

    def columns() -> Columns | None:
        nonlocal found
        found = images.faults()
        if not {"truncated"}.issuperset(found.values()):  # others may become readable unchanged
            return None
        return {"faults": np.array([json.dumps(found)], dtype=object)}

    if store is None:
        columns()
    else:
        record = {"version": __version__, "images": list_digest(images), "content": "faults"}
        row = stored_row(store, record, f"{images.path.stem}_faults", columns)
        if found is None and row is not None:
            found = {int(n): fault for n, fault in json.loads(row["faults"][0]).items()}
    return [(images.where(number), fault) for number, fault in (found or {}).items()]
