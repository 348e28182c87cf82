"""Loaders that are read more than once, and the look at their first images."""

import numpy as np
import pytest
import torch
from fusenorm_openood.detectors.baselines import Baseline
from fusenorm_openood.detectors.posthoc import PosthocBaseline
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from fusenorm_openood import FuseNorm
from fusenorm_openood.errors import DataError
from fusenorm_openood.forward.batches import Readings
from tests.nets import Net, some_images

IMAGES = some_images(30)
TWICE = {"strong": ["output"], "react_percentile": 90.0}  # reads its loader twice
ONCE = {"strong": ["output"]}


class Resetting:
    """As DALI's loaders: `__iter__` starts anew and returns the loader itself."""

    def __init__(self, images=IMAGES, size=8, resets=True):
        self.images, self.size, self.resets = images, size, resets
        self.place = self.started = 0

    def __iter__(self):
        self.started += 1
        self.place = 0 if self.resets else self.place
        return self

    def __next__(self):
        if self.place >= len(self.images):
            raise StopIteration
        batch = self.images[self.place : self.place + self.size]
        self.place += self.size
        return batch


def batches_of(images=IMAGES):
    return images.split(8)


@pytest.mark.parametrize("settings", [ONCE, TWICE], ids=["once", "twice"])
def test_a_loader_that_starts_anew_and_returns_itself(settings):
    net, loader = Net(), Resetting()
    expected = FuseNorm(net, **settings).fit(list(batches_of()))
    detector = FuseNorm(net, **settings).fit(loader)
    assert loader.started == (2 if settings is TWICE else 1)
    np.testing.assert_array_equal(detector.score_loader(loader), expected.score_loader([IMAGES]))
    assert detector.calibration_.id_scores.shape == expected.calibration_.id_scores.shape
    torch.testing.assert_close(detector.score(IMAGES), expected.score(IMAGES))


def test_an_iterator_that_is_exhausted_is_an_error_where_two_readings_are_needed():
    for fit in (
        FuseNorm(Net(), **TWICE).fit,
        lambda loader: FuseNorm(Net(), **TWICE, output="odin").fit(loader),
    ):
        with pytest.raises(DataError, match=r"readable more than once, got a Resetting"):
            fit(Resetting(resets=False))


@pytest.mark.parametrize(
    "iterator",
    [
        lambda: (images for images in batches_of()),
        lambda: iter(list(batches_of())),
        lambda: map(torch.clone, batches_of()),
        lambda: zip(batches_of(), batches_of(), strict=True),
    ],
    ids=["generator", "iterator", "map", "zip"],
)
def test_iterators_of_python_are_refused_before_they_are_read(iterator):
    for fit in (FuseNorm(Net()).fit, Baseline(Net(), "react", percentile=90.0).fit):
        loader = iterator()
        with pytest.raises(DataError, match="fit on a DataLoader or a list of batches"):
            fit(loader)
        assert len(list(loader)) == 4


def test_a_loader_with_fewer_batches_the_second_time_is_an_error():
    class Shrinking:
        def __init__(self):
            self.count = 4

        def __iter__(self):
            self.count -= 1
            return iter(batches_of()[: self.count])

    with pytest.raises(DataError, match="with 3 and then 2 batches"):
        FuseNorm(Net(), **TWICE).fit(Shrinking())


class Counting(Dataset):
    """Images that count how often the reading of the whole data set has begun."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        self.read.append(index)
        return IMAGES[index], 0


@pytest.mark.parametrize(("settings", "readings"), [(ONCE, 1), (TWICE, 2)], ids=["once", "twice"])
def test_no_image_is_read_more_often_than_needed(settings, readings):
    data = Counting()
    FuseNorm(Net(), **settings).fit(DataLoader(data, batch_size=8))
    assert sorted(data.read) == sorted([*range(30)] * readings)


class Workers(IterableDataset):
    """Each worker process that reads it leaves a file."""

    def __init__(self, folder):
        self.folder = folder

    def __iter__(self):
        number = len(list(self.folder.iterdir()))
        (self.folder / str(number)).touch()
        yield from IMAGES


@pytest.mark.parametrize(("settings", "readings"), [(ONCE, 1), (TWICE, 2)], ids=["once", "twice"])
def test_worker_processes_are_started_once_a_reading(tmp_path, settings, readings):
    loader = DataLoader(Workers(tmp_path), batch_size=8, num_workers=1)
    detector = FuseNorm(Net(), **settings).fit(loader)
    assert len(list(tmp_path.iterdir())) == readings
    assert detector.calibration_.id_scores.shape[1] == len(IMAGES)


class Watched(DataLoader):
    iterators = 0

    def __iter__(self):
        self.iterators += 1
        return super().__iter__()


@pytest.mark.parametrize(("settings", "readings"), [(ONCE, 1), (TWICE, 2)], ids=["once", "twice"])
def test_a_loader_is_asked_for_one_iterator_a_reading(settings, readings):
    loader = Watched(TensorDataset(IMAGES), batch_size=8)
    FuseNorm(Net(), **settings).fit(loader)
    assert loader.iterators == readings


@pytest.mark.parametrize("settings", [ONCE, TWICE], ids=["once", "twice"])
def test_a_shuffled_loader_gives_the_same_fit(settings):
    net, data = Net(), TensorDataset(IMAGES)
    expected = FuseNorm(net, **settings).fit(DataLoader(data, batch_size=8)).score(IMAGES)
    torch.manual_seed(5)
    shuffled = FuseNorm(net, **settings).fit(DataLoader(data, batch_size=7, shuffle=True))
    torch.testing.assert_close(shuffled.score(IMAGES), expected, rtol=1e-5, atol=1e-5)


def test_post_hoc_baselines_read_once():
    data = Counting()
    PosthocBaseline(Net(), "knn", K=3).fit(DataLoader(data, batch_size=8))
    assert sorted(data.read) == list(range(30))
    loader = Resetting()
    PosthocBaseline(Net(), "mds").fit(loader)
    assert loader.started == 1


def test_the_first_images_are_those_of_the_first_batch_that_has_any():
    batches = [IMAGES[:0], IMAGES[:3], IMAGES[3:]]
    readings = Readings(batches)
    assert torch.equal(readings.first, IMAGES[:3])
    assert [len(batch) for batch in readings] == [0, 3, 27]
    assert [len(batch) for batch in readings] == [0, 3, 27]
    assert len(readings) == 3


@pytest.mark.parametrize("empty", [[], [IMAGES[:0]], DataLoader(TensorDataset(IMAGES[:0]))])
def test_a_loader_without_images_is_an_error(empty):
    with pytest.raises(DataError, match="at least one image"):
        Readings(empty)
