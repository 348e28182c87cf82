"""Recorded loaders: no image is scored twice, unless its scores would be others."""

from dataclasses import replace

import pytest
import torch
from torch.utils.data import Dataset

from fusenorm_openood import FuseNorm
from fusenorm_openood.detectors.single import SingleScore
from fusenorm_openood.forward import recorded
from fusenorm_openood.forward.recorded import RecordedLoader
from tests.nets import Custom, Net, some_images

FIT = some_images(30, seed=2)


class Images(Dataset):
    """Images that count how often they are read."""

    def __init__(self, count: int = 10) -> None:
        self.images, self.read = some_images(count, seed=3), 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> dict:
        self.read += 1
        return {"data": self.images[number], "label": number % 4}


def mixing():
    """A network whose images influence each other's logits."""
    return Custom(lambda net, x: Net.forward(net, x - x.mean(dim=0)))


def reads_of(detector, loader) -> int:
    """How many images a recorded loader reads to be scored, equal to live scores."""
    images = loader.dataset
    images.read = 0
    conf = detector.infer(loader).conf
    read = images.read
    live = detector.infer(list(images.images.split(loader.batch_size))).conf
    torch.testing.assert_close(torch.from_numpy(conf), torch.from_numpy(live))
    return read


@pytest.mark.parametrize(("make", "again"), [(Net, 0), (mixing, 10)])
def test_another_batch_size_is_scored_anew_if_images_mix(make, again, tmp_path):
    fitted = FuseNorm(make(), strong=["output"]).fit([FIT])
    loader = RecordedLoader(Images(), tmp_path, {}, "images", 5)
    assert reads_of(fitted, loader) == 10
    assert reads_of(fitted, loader) == 0
    assert reads_of(fitted, replace(loader, batch_size=2)) == again


def test_a_pass_serves_others_whose_scores_it_has(tmp_path):
    net, loader = Net(), RecordedLoader(Images(), tmp_path, {}, "images")
    chosen = {"strong": ["output", "mds++"], "taps": ["a.0", "b.0"]}
    assert reads_of(FuseNorm(net, **chosen).fit([FIT]), loader) == 10
    assert reads_of(FuseNorm(net, **chosen, output="msp").fit([FIT]), loader) == 0
    assert reads_of(FuseNorm(net, strong=["gen"], taps=["b.0"]).fit([FIT]), loader) == 0
    assert reads_of(SingleScore(net, "knn").fit([FIT]), loader) == 0
    assert reads_of(FuseNorm(net, **chosen, k_max=0.5).fit([FIT]), loader) == 10
    assert reads_of(FuseNorm(net, strong=["gen"], taps=["a.1"]).fit([FIT]), loader) == 10


def test_a_pass_serves_none_that_need_what_it_lacks(tmp_path):
    net, loader = Net(), RecordedLoader(Images(), tmp_path, {}, "images")
    assert reads_of(SingleScore(net, "msp"), loader) == 12  # two to understand the network
    assert reads_of(SingleScore(net, "knn").fit([FIT]), loader) == 10  # features
    assert reads_of(FuseNorm(net, strong=["output"]).fit([FIT]), loader) == 10  # norms


def test_a_pass_with_gradients_serves_none_without(tmp_path):
    """Gradients split a batch in another way, in which a network may round otherwise."""
    net, loader = Net(), RecordedLoader(Images(), tmp_path, {}, "images")
    chosen = {"strong": ["output"], "taps": ["b.0"]}
    with_gradient = FuseNorm(net, **chosen, output="odin", noise=0.01).fit([FIT])
    assert reads_of(with_gradient, loader) == 10
    assert reads_of(with_gradient, loader) == 0
    assert reads_of(FuseNorm(net, **chosen).fit([FIT]), loader) == 10
    without_step = FuseNorm(net, **chosen, output="odin", noise=0).fit([FIT])
    assert reads_of(without_step, loader) == 0


def test_a_pass_serves_none_with_another_threshold_of_react(tmp_path):
    net, loader = Net(), RecordedLoader(Images(), tmp_path, {}, "images")
    chosen = {"strong": ["output"], "output": "odin", "noise": 0.01, "react_percentile": 80.0}
    reads = [reads_of(FuseNorm(net, **chosen).fit([fit]), loader) for fit in (FIT, FIT, 2 * FIT)]
    assert reads == [10, 0, 10]


def test_short_sets_are_dealt_out_as_if_they_were_one(tmp_path, monkeypatch):
    monkeypatch.setattr(recorded, "SHARD", 4)
    fitted = FuseNorm(Net(), strong=["output"]).fit([FIT])
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


def test_what_was_prepared_is_not_scored_again(tmp_path):
    fitted, images = FuseNorm(Net(), strong=["output"]).fit([FIT]), Images(9)
    loose = [images.images]
    loader, same = fitted.prepare([RecordedLoader(images, tmp_path, {}, "set"), loose])
    assert same is loose
    assert images.read == 9
    assert reads_of(fitted, loader) == 0
