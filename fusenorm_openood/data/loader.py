"""Batches of images that stay on the CPU."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from fusenorm_openood.devices import on_cpu


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
