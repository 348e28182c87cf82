"""Training runs on disk: their checkpoints, their networks, and what a store has of them."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from fusenorm_openood.data import benchmarks, lists
from fusenorm_openood.errors import CheckpointError, TapError, os_errors
from fusenorm_openood.forward.batches import Throughput
from fusenorm_openood.forward.passes import head_of
from fusenorm_openood.forward.recorded import RecordedLoader
from fusenorm_openood.method.scores.base import Head
from fusenorm_openood.network.checkpoints import check_classes, load_network, network_kind
from fusenorm_openood.network.running import LazyNetwork
from fusenorm_openood.network.structure import Structure
from fusenorm_openood.storage import files, shards
from fusenorm_openood.storage.stored import stored_row
from fusenorm_openood.version import __version__

Loader = Callable[[benchmarks.ImageSet], Iterable[Any]]


def find_checkpoints(root: str | Path) -> dict[str, Path]:
    """The checkpoint of each training run `s0`, `s1`, ... under a root.

    Without such runs it is the root's own checkpoint, and a root that is a file is a checkpoint;
    either has the key `""`. CheckpointError if the root or a run has no checkpoint, or a folder
    cannot be read.
    """
    root = Path(root)
    with os_errors(CheckpointError, f"root {root} cannot be read", "give another one"):
        if root.is_file():
            return {"": root}
        found = _runs(root)
        for run in sorted(root.glob("s*")):
            if run.is_dir() and run.name not in found and run.name[1:].isdigit():
                raise CheckpointError(f"training run {run} has no best.ckpt: finish or remove it")
        for name in ("best.ckpt", "ckpt.pth"):
            if not found and (root / name).is_file():
                return {"": root / name}
        if not found:
            raise CheckpointError(
                f"no checkpoint {root / 's0' / 'best.ckpt'} (or s1, s2, ...) found: {_inside(root)}"
            )
    return found


def _runs(root: Path) -> dict[str, Path]:
    return {path.parent.name: path for path in sorted(root.glob("s*/best.ckpt")) if path.is_file()}


def find_roots(folder: str | Path) -> dict[Path, list[str]]:
    """The roots in a folder, which may itself be a root, and the runs of each."""
    folder = Path(folder)
    inside = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return {root: list(runs) for root in (folder, *inside) if (runs := _runs(root))}


def _inside(root: Path, most: int = 5) -> str:
    """What a root contains instead of training runs."""
    if not root.is_dir():
        return f"{root} does not exist"
    if roots := list(find_roots(root)):
        return f"use {roots[0]}, which contains training runs"
    names = sorted(path.name + "/" * path.is_dir() for path in root.iterdir())
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{root} contains {', '.join(names[:most])}{rest}" if names else f"{root} is empty"


def results_folder(root: str | Path, output_dir: str | Path | None = None) -> Path:
    """The folder for results: the requested one, or the root.

    A root that is a checkpoint file, `networks/resnet20.th`, stands for `networks/resnet20`.
    """
    if output_dir:
        return Path(output_dir)
    return Path(root).with_suffix("") if os.path.isfile(root) else Path(root)


class StoredNetwork(NamedTuple):
    """What is needed of a network to use its stored scores without loading it."""

    structure: Structure
    head: Head | None


@dataclass(frozen=True)
class Run:
    """A training run: its network, and how images are scored with it."""

    net: nn.Module
    checkpoint: Path = Path()
    batch_size: int = 200
    num_workers: int = 0
    store: Path | None = None  # where scores are stored, so that no image is scored twice
    key: Mapping[str, Any] = field(default_factory=dict)  # see `network_key`
    throughput: Throughput = field(default_factory=Throughput)  # of images the network is run on

    def load(self, image_set: benchmarks.ImageSet) -> Iterable[Any]:
        """A loader of an image set, which stores the scores of its images if there is a store."""
        if self.store is None:
            return benchmarks.image_loader(image_set, self.batch_size, self.num_workers)
        images = image_set.images()
        about = {"images": list_digest(images), "transform": repr(images.transform)}
        how = self.batch_size, self.num_workers, self.throughput
        name = image_set.imagelist.stem
        return RecordedLoader(images, self.store, {**self.key, **about}, name, *how)

    def save(self, structure: Structure) -> None:
        """Store how the network is built, and its head, if there is a store."""

        def columns() -> shards.Columns:
            found = {"structure": np.array([json.dumps(structure.to_json())], dtype=object)}
            try:
                head = head_of(self.net, structure)
            except TapError:  # no linear head
                return found
            weight, bias = (t.detach().cpu().float().numpy() for t in head)
            return {**found, "weight": weight.reshape(1, -1), "bias": bias[None]}

        if self.store is not None:
            stored_row(self.store, {**self.key, "content": "structure"}, "network", columns)

    @property
    def is_unfinished(self) -> bool:
        """Whether the training was interrupted, or is still running."""
        return self.checkpoint.with_name("unfinished.ckpt").is_file()


def load_runs(
    checkpoints: Mapping[str, Path],
    num_classes: int,
    network: str | None = None,
    image_size: int | None = None,
    batch_size: int = 200,
    num_workers: int = 0,
    store: Path | None = None,
    by_order: bool = False,
    **how: Any,
) -> dict[str, Run]:
    """The training runs under one root, whose networks must be of the same kind.

    If the store has what is needed of all networks, each is loaded when it is first run. For the
    arguments see `find_checkpoints`, `load_network`, `Run` and `network_key`, for errors
    `load_network`; CheckpointError also if runs differ in architecture, training or classes.
    """
    expected = num_classes if network else None  # a network that is recognised has its own
    load = {
        run: partial(load_network, path, expected, network, image_size, by_order)
        for run, path in checkpoints.items()
    }
    keys, stored = {run: dict[str, Any]() for run in load}, {}
    if by_order:
        how["by_order"] = True
    if store is not None:
        keys = {run: network_key(p, network, image_size, **how) for run, p in checkpoints.items()}
        stored = {run: found for run in load if (found := _stored_network(store, keys[run]))}
    kinds = [(s.classes, s.blocks, s.shapes, s.scoring) for s, _ in stored.values()]
    networks: dict[str, nn.Module]
    if kinds and kinds == kinds[:1] * len(load) and kinds[0][0] == num_classes:
        networks = {run: LazyNetwork(load[run], stored[run]) for run in load}
    else:
        networks = {run: load_one() for run, load_one in load.items()}
        (first, kind), *others = ((n, network_kind(net, network)) for n, net in networks.items())
        for run, other in others:
            if other != kind:
                raise CheckpointError(
                    f"all runs under one root must be of the same kind, got {checkpoints[first]} "
                    f"with {kind} and {checkpoints[run]} with {other}: use a separate root for "
                    "each kind"
                )
        check_classes(checkpoints[first], kind.classes, num_classes)
    throughput, loading = Throughput(), (batch_size, num_workers, store)
    return {
        run: Run(net, checkpoints[run], *loading, keys[run], throughput)
        for run, net in networks.items()
    }


def _stored_network(store: Path, key: Mapping[str, Any]) -> StoredNetwork | None:
    """What `Run.save` stored of the network, if it did."""
    row = stored_row(store, {**key, "content": "structure"}, "network", lambda: None)
    if row is None:
        return None
    head, structure = None, Structure.from_json(json.loads(row["structure"][0]))
    if "weight" in row:
        bias = torch.from_numpy(row["bias"][0])
        head = Head(torch.from_numpy(row["weight"]).view(len(bias), -1), bias)
    return StoredNetwork(structure, head)


def network_key(
    checkpoint: Path, network: str | None, image_size: int | None, **how: Any
) -> dict[str, Any]:
    """What determines a network's scores, besides its images, in terms of JSON.

    All bytes of the checkpoint count; of a factory, those of its module; and `how` the network is
    run, for example in half precision.
    """
    return {
        "version": __version__,
        "checkpoint": files.file_digest(checkpoint),
        "network": network,
        "code": None if network is None else _code(network.partition(":")[0]),
        "image_size": image_size,
        **how,
    }


def _code(module: str) -> str | None:
    """Digest of the file of a module, None of a package or without one."""
    try:
        found = find_spec(module)
    except (ImportError, ValueError):  # the import of the network raises it as well
        return None
    if found is None or found.origin is None or found.submodule_search_locations is not None:
        return None
    return files.file_digest(found.origin) if Path(found.origin).is_file() else None


def list_digest(images: lists.ImageList) -> str:
    """SHA-256 of an image list's paths, labels, and the sizes and times of its files."""
    names = (f"{entry.name} {entry.label}" for entry in images.entries)
    return files.manifest(images.paths(), names)


def find_faults(images: lists.ImageList, store: Path | None = None) -> list[tuple[str, str]]:
    """The position and the fault of each faulty image; see `find_fault`.

    With a store, if all files can be read, some of them truncated, they are not opened again until
    the list, or the size or time of a file, changes. With a store, DataError if a file is missing,
    StoreError if the store cannot be written.
    """
    found, name = None, f"{images.path.stem}_faults"
    if store is not None:
        key = {"version": __version__, "images": list_digest(images), "content": "faults"}
        if row := stored_row(store, key, name, lambda: None):
            found = {int(n): fault for n, fault in json.loads(row["faults"][0]).items()}
    if found is None:
        found = images.faults()
        # Files that cannot be read may become readable unchanged.
        if store is not None and {"truncated"}.issuperset(found.values()):
            faults = np.array([json.dumps(found)], dtype=object)
            stored_row(store, key, name, lambda: {"faults": faults})
    return [(images.where(number), fault) for number, fault in found.items()]
