"""Loaders of pseudo-OOD images, for a search without OOD images."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fusenorm_openood.data.pseudo import KINDS, RANDOM
from fusenorm_openood.forward.batches import batches
from fusenorm_openood.forward.recorded import RecordedLoader
from fusenorm_openood.storage.stored import row_batches

SEED = 0


class PseudoOOD:
    """Pseudo-OOD images of one kind, made from the images of a loader; the same in every pass.

    Args:
        loader: ID images.
        kind: one of `KINDS`.
        seed: seed of what is drawn at random.
    """

    def __init__(self, loader: Iterable[Any], kind: str, seed: int = SEED) -> None:
        self.loader, self.kind, self.seed = loader, kind, seed

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        for images, _ in batches(self.loader):
            yield KINDS[self.kind](images, generator)


class PseudoImages(Dataset[dict[str, Any]]):
    """The images of a `PseudoOOD` by number; the batch of the last one is kept.

    Args:
        images: ID images of one size, in OpenOOD's format.
        kind: one of `KINDS`.
        batch_size: that of the loader, whose batches the images are made in.
        seed: seed of what is drawn at random.
    """

    def __init__(self, images: Dataset[Any], kind: str, batch_size: int, seed: int = SEED) -> None:
        self.images, self.kind = images, kind
        rows = range(len(images))  # type: ignore[arg-type]
        self.batches = row_batches(rows, batch_size)
        self._batch_of = [number for number, batch in enumerate(self.batches) for _ in batch]
        self._states = [torch.Generator().manual_seed(seed).get_state()]  # before each batch
        self._made: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self._batch_of)

    def __getitem__(self, number: int) -> dict[str, Any]:
        batch = self._batch_of[number]
        if self._made is None or self._made[0] != batch:
            self._made = batch, self._make(batch)
        return {"data": self._made[1][number - self.batches[batch].start], "label": -1}

    def _make(self, number: int) -> Tensor:
        images = torch.stack([self.images[row]["data"] for row in self.batches[number]])
        generator = torch.Generator()
        if self.kind in RANDOM:
            while len(self._states) <= number:  # what is drawn depends on the shapes alone
                generator.set_state(self._states[-1])
                skipped = self.batches[len(self._states) - 1]
                KINDS[self.kind](images.new_zeros(len(skipped), *images.shape[1:]), generator)
                self._states.append(generator.get_state())
            generator.set_state(self._states[number])
        return KINDS[self.kind](images, generator)


def pseudo_ood(loader: Iterable[Any], kinds: Iterable[str] = tuple(KINDS)) -> list[Iterable[Any]]:
    """One loader for each kind of pseudo-OOD image, recorded if the given one is."""
    if isinstance(loader, RecordedLoader):
        return [_recorded(loader, kind) for kind in kinds]
    return [PseudoOOD(loader, kind) for kind in kinds]


def _recorded(loader: RecordedLoader, kind: str) -> RecordedLoader:
    made_of = {"pseudo": kind, "seed": SEED, "batch_size": loader.batch_size}
    return replace(
        loader,
        dataset=PseudoImages(loader.dataset, kind, loader.batch_size),
        record={**loader.record, **made_of},
        name=f"{loader.name}_{kind}",
    )
