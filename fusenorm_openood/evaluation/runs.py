"""Training runs on disk, and their networks."""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import nn

from fusenorm_openood.errors import CheckpointError
from fusenorm_openood.evaluation.records import Records
from fusenorm_openood.network.checkpoints import check_classes, load_network, network_kind
from fusenorm_openood.network.running import LazyNetwork


def find_checkpoints(root: str | Path) -> dict[str, Path]:
    """The checkpoint of each training run `s0`, `s1`, ... under a root.

    Without such runs it is the root's own checkpoint, and a root that is a file is a checkpoint;
    either has the key `""`.

    Raises:
        CheckpointError: there is no checkpoint, or a run has none, or a folder cannot be read.
    """
    root = Path(root)
    try:
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
    except OSError as error:
        raise CheckpointError(
            f"root {root} cannot be read ({error.strerror}): give another one"
        ) from None
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


def unfinished(checkpoint: Path) -> bool:
    """Whether the training run of a checkpoint was interrupted, or is still running."""
    return checkpoint.with_name("unfinished.ckpt").is_file()


def load_runs(
    checkpoints: Mapping[str, Path],
    num_classes: int,
    network: str | None = None,
    image_size: int | None = None,
    records: Mapping[str, Records] | None = None,
) -> dict[str, nn.Module]:
    """The networks of the training runs under one root, which must be of the same kind.

    If the store knows all of them, they are loaded when they are first run.

    Args:
        checkpoints: file by run; see `find_checkpoints`.
        num_classes: number of classes of the ID data set.
        network, image_size: see `load_network`.
        records: the part of the store of each run's network, if there is a store.

    Raises:
        CheckpointError: a file without a known network; runs that differ in architecture,
            training method or number of classes; a number of classes other than the data set's.
        ConfigError: `network` cannot be built.
    """
    expected = num_classes if network else None  # a network that is recognised has its own
    load = {
        run: partial(load_network, path, expected, network, image_size)
        for run, path in checkpoints.items()
    }
    known = {run: stored for run, r in (records or {}).items() if (stored := r.known())}
    kinds = [(s.classes, s.blocks, s.shapes, s.scoring) for s, _ in known.values()]
    if kinds and kinds == kinds[:1] * len(load) and kinds[0][0] == num_classes:
        return {run: LazyNetwork(load[run], known[run]) for run in load}
    networks = {run: load_one() for run, load_one in load.items()}
    (first, kind), *others = [(run, network_kind(net, network)) for run, net in networks.items()]
    for run, other in others:
        if other != kind:
            raise CheckpointError(
                f"all runs under one root must be of the same kind, got {checkpoints[first]}, a "
                f"{kind}, and {checkpoints[run]}, a {other}: use a separate root for each kind"
            )
    check_classes(checkpoints[first], kind.classes, num_classes)
    return networks
