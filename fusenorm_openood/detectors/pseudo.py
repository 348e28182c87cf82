"""Loaders of pseudo-OOD images, for a search without OOD images."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fusenorm_openood.data.pseudo import KINDS
from fusenorm_openood.listening.batches import batches


class PseudoOOD:
    """Pseudo-OOD images of one kind, made from the images of a loader; the same in every pass.

    Args:
        loader: ID images.
        kind: one of `KINDS`.
        seed: seed of what is drawn at random.
    """

    def __init__(self, loader: Iterable[Any], kind: str, seed: int = 0) -> None:
        self.loader, self.kind, self.seed = loader, kind, seed

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        for images, _ in batches(self.loader):
            yield KINDS[self.kind](images, generator)


def pseudo_ood(loader: Iterable[Any], kinds: Iterable[str] = tuple(KINDS)) -> list[PseudoOOD]:
    """One loader for each kind of pseudo-OOD image."""
    return [PseudoOOD(loader, kind) for kind in kinds]
