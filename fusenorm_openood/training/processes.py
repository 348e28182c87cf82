"""The processes that train together, started by ``torchrun``, and their threads."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fusenorm_openood.errors import ConfigError


class Process(NamedTuple):
    """This process among those that train together, as ``torchrun`` numbers them."""

    rank: int = 0
    local_rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Wait for all of them to come here."""
        if self.world > 1:
            distributed.barrier()


@contextmanager
def processes(device: torch.device) -> Iterator[Process]:
    """Join the processes that ``torchrun`` started, if it did.

    Raises:
        ConfigError: a device that several processes cannot train on.
    """
    env = os.environ
    process = Process(*(int(env.get(k, d)) for k, d in _TORCHRUN.items()))
    if process.world == 1:
        yield process
        return
    if device.type not in ("cpu", "cuda") or device.index is not None:
        raise ConfigError(
            f"{process.world} processes on device {device} found: they train on 'cuda', each on "
            "a device of its own, or on 'cpu'"
        )
    if device.type == "cuda":
        if process.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"process {process.local_rank} of this machine found, counted from 0, and "
                f"{torch.cuda.device_count()} CUDA devices: start one process a device"
            )
        torch.cuda.set_device(process.local_rank)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield process
    finally:
        distributed.destroy_process_group()


_TORCHRUN = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}


def together(net: nn.Module, process: Process, device: torch.device) -> nn.Module:
    """The network as the processes train it together."""
    if process.world == 1:
        return net
    if device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)  # type: ignore[no-untyped-call]
        return DistributedDataParallel(net, [process.local_rank])
    return DistributedDataParallel(net)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute on at most so many threads, and give it back those it had."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(min(count, before))
        yield
    finally:
        torch.set_num_threads(before)
