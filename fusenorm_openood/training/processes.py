"""The processes that `torchrun` started to train together, and their threads."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fusenorm_openood import torchrun
from fusenorm_openood.errors import ConfigError


class Process(torchrun.Process):
    """This process among those that train together."""

    def wait(self) -> None:
        """Wait until all processes have reached this point."""
        if self.world > 1:
            distributed.barrier()


@contextmanager
def processes(device: torch.device) -> Iterator[Process]:
    """Join the processes that `torchrun` started, if any.

    Raises:
        ConfigError: a device on which several processes cannot train.
    """
    process = Process(*torchrun.this_process())
    if process.world == 1:
        yield process
        return
    if device.type not in ("cpu", "cuda") or device.index is not None:
        raise ConfigError(
            f"the device of {process.world} processes must be 'cuda', with one GPU per process, or "
            f"'cpu', got {str(device)!r}"
        )
    if device.type == "cuda":
        if process.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"the local rank must be < {torch.cuda.device_count()}, the number of CUDA "
                f"devices, got {process.local_rank}: start one process per device"
            )
        torch.cuda.set_device(process.local_rank)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield process
    finally:
        distributed.destroy_process_group()


def data_parallel(net: nn.Module, process: Process, device: torch.device) -> nn.Module:
    """The network, wrapped so that all processes train it together."""
    if process.world == 1:
        return net
    if device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)  # type: ignore[no-untyped-call]
        return DistributedDataParallel(net, [process.local_rank])
    return DistributedDataParallel(net)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Limit torch to `count` threads, and restore the previous number afterwards."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(min(count, before))
        yield
    finally:
        torch.set_num_threads(before)
