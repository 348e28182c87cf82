"""Training runs on disk, and their networks."""

import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import nn

from fusenorm_openood.errors import CheckpointError
from fusenorm_openood.evaluation.records import Records
from fusenorm_openood.network.checkpoints import check_classes, load_network, network_kind
from fusenorm_openood.network.named import LazyNetwork
from fusenorm_openood.network.structure import Structure


class RootName(NamedTuple):
    """The parts of a root's name: data set, network, trainer, epochs, learning rate."""

    dataset: str
    network: str
    trainer: str
    epochs: int
    lr: str


_ROOT_NAME = re.compile(r"([^_]+)_(.+)_([^_]+)_e(\d+)_lr(\d[\d.]*(?:e-?\d+)?)(?:_.*)?")


def parse_root_name(root: str | Path) -> RootName | None:
    """The parts of a root's name, None if it does not follow OpenOOD's scheme.

    >>> parse_root_name("results/cifar10_t2fnorm_net_t2fnorm_e100_lr0.1_alpha0.1_default")
    RootName(dataset='cifar10', network='t2fnorm_net', trainer='t2fnorm', epochs=100, lr='0.1')
    """
    match = _ROOT_NAME.fullmatch(Path(root).resolve().name)
    if match is None:
        return None
    dataset, network, trainer, epochs, lr = match.groups()
    return RootName(dataset, network, trainer, int(epochs), lr)


def find_checkpoints(root: str | Path) -> dict[str, Path]:
    """The checkpoint of each training run `s0`, `s1`, ... under a root.

    Without such runs it is the root's own checkpoint, and a root that is a file is a checkpoint;
    either has the key `""`.

    Raises:
        CheckpointError: there is no checkpoint, or a run has none, or a folder cannot be read.
    """
    try:
        return _checkpoints(Path(root))
    except OSError as error:
        raise CheckpointError(
            f"root {root} cannot be read ({error.strerror}): give another one"
        ) from None


def _checkpoints(root: Path) -> dict[str, Path]:
    if root.is_file():
        return {"": root}
    found = _runs(root)
    incomplete = [
        run.name
        for run in sorted(root.glob("s*"))
        if run.is_dir() and run.name not in found and run.name[1:].isdigit()
    ]
    if incomplete:
        raise CheckpointError(
            f"training run {root / incomplete[0]} has no best.ckpt: finish or remove it"
        )
    for name in ("best.ckpt", "ckpt.pth"):
        if not found and (root / name).is_file():
            return {"": root / name}
    if not found:
        raise CheckpointError(
            f"no checkpoint {root / 's0' / 'best.ckpt'} (or s1, s2, ...) found: {_inside(root)}"
        )
    return found


def results_folder(root: str | Path, output_dir: str | Path | None = None) -> Path:
    """The folder for results: the requested one, or the root.

    A root that is a checkpoint file, `networks/resnet20.th`, stands for `networks/resnet20`.
    """
    root = Path(root)
    return Path(output_dir or (root.with_suffix("") if os.path.isfile(root) else root))


def unfinished(checkpoint: Path) -> bool:
    """Whether the training run of a checkpoint was interrupted, or is still running."""
    return checkpoint.with_name("unfinished.ckpt").is_file()


def find_roots(folder: str | Path) -> dict[Path, list[str]]:
    """The roots in a folder, which may itself be a root, and the runs of each."""
    folder = Path(folder)
    inside = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return {root: list(runs) for root in (folder, *inside) if (runs := _runs(root))}


def _runs(root: Path) -> dict[str, Path]:
    checkpoints = sorted(root.glob("s*/best.ckpt"))
    return {path.parent.name: path for path in checkpoints if path.is_file()}


def _inside(root: Path, most: int = 5) -> str:
    """What a root contains instead of training runs."""
    if not root.is_dir():
        return f"{root} does not exist"
    roots = list(find_roots(root))
    if roots:
        return f"use {roots[0]}, which contains training runs"
    names = sorted(path.name + "/" * path.is_dir() for path in root.iterdir())
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{root} contains {', '.join(names[:most])}{rest}" if names else f"{root} is empty"


def load_runs(
    checkpoints: Mapping[str, Path],
    num_classes: int,
    network: str | None = None,
    image_size: int | None = None,
    records: Mapping[str, Records] | None = None,
) -> dict[str, nn.Module]:
    """The networks of the training runs under one root, which must be of the same kind.

    Those that all are known from earlier are only loaded when they are to run.

    Args:
        checkpoints: file by run; see `find_checkpoints`.
        num_classes: number of classes of the ID data set.
        network, image_size: see `load_network`.
        records: what is kept of each run's network, if anything is.

    Raises:
        CheckpointError: a file without a known network; runs that differ in architecture,
            training method or number of classes; a number of classes other than the data set's.
        ConfigError: `network` cannot be built.
    """
    expected = num_classes if network else None  # a network that is recognised says its own
    known = {run: kept.known() for run, kept in (records or {}).items()}
    structures = [found and found.structure for found in known.values()]
    if structures and _is_one_kind(structures, num_classes):
        return {
            run: LazyNetwork(partial(load_network, path, expected, network, image_size), known[run])
            for run, path in checkpoints.items()
        }
    networks = {
        run: load_network(path, expected, network, image_size) for run, path in checkpoints.items()
    }
    (first, kind), *others = [(run, network_kind(net, network)) for run, net in networks.items()]
    for run, other in others:
        if other != kind:
            raise CheckpointError(
                f"all runs under one root must be of the same kind, got {checkpoints[first]}, a "
                f"{kind}, and {checkpoints[run]}, a {other}: use a separate root for each kind"
            )
    check_classes(checkpoints[first], kind.classes, num_classes)
    return networks


def _is_one_kind(structures: Sequence[Structure | None], num_classes: int) -> bool:
    """Whether networks are all known, of one kind, and for so many classes."""
    known = [s for s in structures if s is not None]
    kinds = [(s.classes, s.blocks, s.shapes, s.scoring) for s in known]
    same = len(known) == len(structures) and kinds == kinds[:1] * len(kinds)
    return same and known[0].classes == num_classes
