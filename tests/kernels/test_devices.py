import threading

import pytest
import torch
from torch import nn

from fusenorm_openood import on_device
from fusenorm_openood.kernels.devices import device_of, moved


def test_cuda_means_the_device_within_the_context():
    net, images = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), torch.ones(3, 2)
    weight = net[0].weight
    with on_device("meta"):
        assert images.cuda().is_meta
        assert images.cuda(0, non_blocking=True).is_meta
        assert images.cuda(device="cuda:1", memory_format=torch.preserve_format).is_meta
        assert nn.Parameter(images).cuda().is_meta
        assert all(tensor.is_meta for tensor in net.cuda().state_dict().values())
    assert on_device("meta")(images.cuda)().is_meta  # as a decorator
    with on_device("cpu"):
        assert images.cuda() is images
        net = nn.Linear(2, 2)
        weight = net.weight
        assert net.cuda().weight is weight
        assert net(images.cuda()).device.type == "cpu"


def test_nothing_remains_after_the_context():
    before = torch.Tensor.cuda, nn.Module.cuda
    seen = []

    def elsewhere():
        with pytest.raises((RuntimeError, AssertionError)):
            torch.ones(1).cuda("cuda:99")
        seen.append(True)

    with pytest.raises(KeyError), on_device("cpu"):
        assert (torch.Tensor.cuda, nn.Module.cuda) == before
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        raise KeyError
    assert seen
    assert (torch.Tensor.cuda, nn.Module.cuda) == before
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(1).cuda("cuda:99")


def test_cuda_itself_is_unaffected():
    with on_device("cuda"), pytest.raises((RuntimeError, AssertionError)):
        torch.ones(1).cuda("cuda:99")


def test_images_take_the_precision_of_the_weights():
    images = torch.ones(3, 2)
    assert moved(nn.Linear(2, 2).double(), images).dtype == torch.float64
    assert moved(nn.Linear(2, 2).bfloat16(), images).dtype == torch.bfloat16
    assert moved(nn.ReLU(), images.half()).dtype == torch.float16
    assert device_of(nn.ReLU()) == torch.device("cpu")
