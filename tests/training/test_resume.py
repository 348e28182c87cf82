"""Resuming a run: only a damaged file is called damaged."""

import pytest
import torch

from fusenorm_openood.errors import CheckpointError, DamagedFileError
from fusenorm_openood.network import ResNet18_32x32
from fusenorm_openood.training.loop import Progress, resume, save_progress


def momentum(net):
    return torch.optim.SGD(net.parameters(), 0.1, 0.9)


@pytest.fixture
def run(tmp_path):
    """An interrupted run after one step: file, network, optimiser."""
    torch.manual_seed(0)
    net = ResNet18_32x32(3, width=4)
    optimiser = momentum(net)
    net(torch.randn(2, 3, 8, 8)).sum().backward()
    optimiser.step()
    save_progress(tmp_path / "unfinished.ckpt", net, optimiser, Progress(1, 0.5))
    return tmp_path / "unfinished.ckpt", net, optimiser


@pytest.mark.parametrize("damage", ["truncated", "altered", "emptied"])
def test_a_damaged_run_is_called_damaged(run, damage):
    path, net, optimiser = run
    content = bytearray(path.read_bytes())
    if damage == "altered":
        content[len(content) // 2] ^= 0xFF  # torch loads this without an error, as other numbers
    else:
        content = content[: len(content) - 500] if damage == "truncated" else b""
    path.write_bytes(content)
    with pytest.raises(
        DamagedFileError, match=r"is damaged .* or remove it to start the run again"
    ):
        resume(path, net, optimiser)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, KeyboardInterrupt])
def test_running_out_of_memory_is_not_blamed_on_the_file(run, error, monkeypatch):
    path, net, optimiser = run

    def fail(*args, **kwargs):
        raise error("out of memory")

    for target, name in ((torch, "load"), (net, "load_state_dict"), (optimiser, "load_state_dict")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, fail)
            with pytest.raises(error, match="out of memory"):
                resume(path, net, optimiser)
    assert resume(path, net, optimiser) == Progress(1, 0.5)


def test_a_file_that_cannot_be_opened_is_not_called_damaged(run, tmp_path):
    _, net, optimiser = run
    folder = tmp_path / "folder"
    folder.mkdir()
    loop = tmp_path / "loop.ckpt"
    loop.symlink_to(loop)
    assert resume(folder, net, optimiser) == Progress(0, -1.0)  # no file
    torch.save({"net": {}}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="holds no interrupted run of ResNet18_32x32"):
        resume(tmp_path / "other.ckpt", net, optimiser)
    wider = ResNet18_32x32(3, width=8)
    with pytest.raises(CheckpointError, match="holds no interrupted run"):
        resume(run[0], wider, momentum(wider))
