"""How fast images are scored, and how much of the time is spent waiting for them."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

Batch = TypeVar("Batch")
SLOW = 0.2  # share of the time from which on loading is what limits a run


@dataclass
class Pace:
    """Counts images and times over any number of loaders.

    Attributes:
        images: number of images that were scored.
        seconds: how long it took, in this process.
        waited: how many seconds of it no image was there to be scored.
    """

    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches; what happens between two of them counts as scoring."""
        iterator, asked = iter(batches), time.perf_counter()
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                came = time.perf_counter()
                self.waited += came - asked
                self.seconds += came - asked
            yield batch
            asked = time.perf_counter()
            self.seconds += asked - came

    def __str__(self) -> str:
        per_second = self.images / max(self.seconds, 1e-9)
        share = self.waited / max(self.seconds, 1e-9)
        said = (
            f"{per_second:,.0f} images per second, {per_second / torch.get_num_threads():,.0f} per "
            f"thread; {share:.0%} of the time was spent waiting for images"
        )
        return said if share < SLOW else f"{said}: try more loader processes, --num-workers"
