"""Recorded loaders: what was heard once is not heard again, unless it would be something else."""

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from fusenorm_openood import FuseNorm
from fusenorm_openood.forward import recorded
from fusenorm_openood.forward.recorded import RecordedLoader
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


def test_short_sets_are_dealt_out_as_if_they_were_one(tmp_path, monkeypatch):
    monkeypatch.setattr(recorded, "SHARD", 4)
    fitted = FuseNorm(make_net()).fit([Images(40).images])
    sizes = [3, 4, 2, 9, 1, 8]  # 1, 1, 1, 3, 1 and 2 shards
    read = []
    for rank in range(3):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 3}.items():
            monkeypatch.setenv(name, str(value))
        store = tmp_path / str(rank)  # as if the others had written nothing yet
        sets = [Images(size) for size in sizes]
        fitted.prepare(
            RecordedLoader(images, store, {}, f"set{number}") for number, images in enumerate(sets)
        )
        read.append([images.read for images in sets])
    assert read == [[3, 0, 0, 4, 1, 0], [0, 4, 0, 4, 0, 4], [0, 0, 2, 1, 0, 4]]


def test_what_was_prepared_is_not_heard_again(tmp_path):
    fitted, images = FuseNorm(make_net()).fit([Images(40).images]), Images(9)
    loose = [images.images]
    prepared, same = fitted.prepare([RecordedLoader(images, tmp_path, {}, "set"), loose])
    assert same is loose
    assert images.read == 9
    live = fitted.infer(loose)
    assert (fitted.infer(prepared).conf == live.conf).all()
    assert images.read == 9
