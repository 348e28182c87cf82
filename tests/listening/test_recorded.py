"""Recorded loaders: what was heard once is not heard again, unless it would be something else."""

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from fusenorm_openood import FuseNorm
from fusenorm_openood.listening.recorded import RecordedLoader
from tests.conftest import make_net


class Images(Dataset):
    """Images of one seed, which count how often they are read."""

    def __init__(self, count: int = 10) -> None:
        self.images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(3))
        self.read = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> dict:
        self.read += 1
        return {"data": self.images[number], "label": number % 4}


class Mixing(nn.Module):
    """A network whose images influence each other's logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def forward(self, images):
        return self.net(images - images.mean(dim=0))


@pytest.mark.parametrize(("make", "again"), [(make_net, False), (Mixing, True)])
def test_another_batch_size_is_scored_anew_if_images_mix(make, again, tmp_path):
    net, images = make(), Images()
    fitted = FuseNorm(net).fit([Images(40).images])

    def score(batch_size):
        images.read = 0
        return fitted.infer(RecordedLoader(images, tmp_path, {}, "images", batch_size)).conf

    score(5)
    assert images.read == len(images)
    score(5)
    assert images.read == 0
    conf = score(2)
    assert (images.read > 0) == again
    live = fitted.infer(list(images.images.split(2))).conf
    torch.testing.assert_close(torch.from_numpy(conf), torch.from_numpy(live))
