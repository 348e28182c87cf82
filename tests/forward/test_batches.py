"""Loaders of every kind, read as often as needed and no more, and how long they take."""

import os
import sys
from collections import UserDict

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fusenorm_openood import FuseNorm
from fusenorm_openood.detectors.single import SingleScore
from fusenorm_openood.errors import DataError
from fusenorm_openood.forward.batches import Readings, Throughput, batches
from tests.nets import Net, some_images

IMAGES = some_images(30)
FOUR = IMAGES[:4]


@pytest.mark.parametrize("labels", [torch.zeros(3), np.zeros(5), [0, 1], (0, 1, 2, 3, 4)])
def test_labels_that_do_not_match_the_images_are_refused(labels):
    for batch in ((FOUR, labels), {"data": FOUR, "label": labels}):
        with pytest.raises(DataError, match=r"a batch of 4 images has . labels: give one label"):
            list(batches([batch]))


@pytest.mark.parametrize(
    "labels",
    [
        (3, -1, 0, 2),
        [torch.tensor(i) for i in (3, -1, 0, 2)],
        torch.tensor([3, -1, 0, 2], dtype=torch.int32),
        torch.tensor([3.0, -1, 0, 2], requires_grad=True),
        np.array([[3], [-1], [0], [2]], dtype=np.int8),
    ],
)
def test_class_labels_are_copied_to_an_integer_array(labels):
    ((images, given),) = batches([(FOUR, labels)])
    assert images is FOUR
    assert given.dtype == np.int64
    assert given.tolist() == [3, -1, 0, 2]
    assert not isinstance(labels, np.ndarray) or not np.shares_memory(given, labels)


NO_LABELS = [
    *(None, -1, "class", torch.tensor(1), ["a.png", "b.png", "c.png", "d.png"], [0, 1, 2, "d"]),
    *([None] * 4, [[0], [1, 2], [], [3]], {"class": torch.zeros(4)}, torch.eye(4), FOUR),
    *((torch.zeros(4), torch.ones(4)), [{"boxes": torch.zeros(2, 4)}] * 4),
    *(torch.zeros(4, dtype=torch.bfloat16), np.array([0.5, 1, 2, 3])),
    np.array([np.nan, np.inf, 2, 3]),
]


@pytest.mark.parametrize("labels", NO_LABELS)
def test_anything_else_counts_as_no_labels(labels):
    ((_, given),) = batches([(FOUR, labels)])
    assert given is None


def test_images_without_labels_are_scored_with_the_label_minus_1():
    detector = SingleScore(Net(), "msp")
    assert detector.infer([FOUR, (FOUR, [0, 1, 2, 3])]).label.tolist() == [-1] * 4 + [0, 1, 2, 3]


@pytest.mark.parametrize("images", ["data", "pixel_values", "image", "images", "img"])
@pytest.mark.parametrize("labels", ["label", "labels", "target", "targets"])
def test_batches_may_be_dicts(images, labels):
    batch = {"index": [0, 1, 2, 3], images: FOUR, labels: torch.arange(4)}
    for kind in (batch, UserDict(batch), [batch], (batch,)):
        ((found, given),) = batches([kind])
        assert found is FOUR
        assert given.tolist() == [0, 1, 2, 3]


def test_batches_may_be_images_alone():
    for batch in (FOUR, [FOUR], {"img": FOUR}, (FOUR, None)):
        ((images, given),) = batches([batch])
        assert images is FOUR
        assert given is None


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_numpy_images_become_float32_tensors(dtype):
    array = FOUR.numpy().astype(dtype)[::-1]
    array.flags.writeable = False
    ((images, _),) = batches([array])
    assert images.dtype == torch.float32
    np.testing.assert_array_equal(images, array.astype(np.float32))


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (FOUR.to(torch.uint8), r"torch\.uint8 \[4, 3, 12, 12\]"),
        (FOUR.numpy().astype(np.uint8), r"uint8 \[4, 3, 12, 12\]"),
        (FOUR[0].numpy(), r"torch\.float32 \[3, 12, 12\]"),
        ([], "list"),
        ([{"data": FOUR}] * 2, "dict"),
        ({"x": FOUR, "y": 0}, "the keys x, y: rename"),
        ({}, "the keys of an empty dict"),
    ],
)
def test_other_batches_are_refused(batch, found):
    with pytest.raises(DataError, match=rf"must .*, got {found}"):
        list(batches([batch]))


@pytest.mark.skipif(sys.platform != "linux", reason="limits open files as Linux does")
def test_no_batch_keeps_a_file_of_a_worker_process_open():
    from resource import RLIMIT_NOFILE, getrlimit, setrlimit

    open_files, (before, most) = len(os.listdir("/proc/self/fd")), getrlimit(RLIMIT_NOFILE)
    data = TensorDataset(torch.randn(120, 3, 2, 2), torch.zeros(120, dtype=torch.long))
    setrlimit(RLIMIT_NOFILE, (open_files + 50, most))
    try:
        kept = [labels for _, labels in batches(DataLoader(data, batch_size=1, num_workers=1))]
    finally:
        setrlimit(RLIMIT_NOFILE, (before, most))
    assert len(kept) == 120


class Resetting:
    """As DALI's loaders: `__iter__` starts anew and returns the loader itself."""

    def __init__(self, resets=True):
        self.resets = resets
        self.place = self.started = 0

    def __iter__(self):
        self.started += 1
        self.place = 0 if self.resets else self.place
        return self

    def __next__(self):
        if self.place >= len(IMAGES):
            raise StopIteration
        batch = IMAGES[self.place : self.place + 8]
        self.place += 8
        return batch


class Workers(IterableDataset):
    """Images; each process that reads them leaves a file."""

    def __init__(self, folder):
        self.folder = folder

    def __iter__(self):
        number = len(list(self.folder.iterdir()))
        (self.folder / str(number)).touch()
        yield from IMAGES


@pytest.mark.parametrize(("react", "readings"), [(None, 1), (90.0, 2)], ids=["once", "twice"])
def test_loaders_are_read_as_often_as_needed(react, readings, tmp_path):
    net, settings = Net(), {"strong": ["output"], "react_percentile": react}
    expected = FuseNorm(net, **settings).fit(list(IMAGES.split(8))).score(IMAGES)
    resetting = Resetting()
    workers = DataLoader(Workers(tmp_path), batch_size=8, num_workers=1)
    for loader in (resetting, workers):
        detector = FuseNorm(net, **settings).fit(loader)
        torch.testing.assert_close(detector.score(IMAGES), expected)
        assert detector.id_statistics_.id_scores.shape[1] == len(IMAGES)
    assert resetting.started == len(list(tmp_path.iterdir())) == readings
    shuffled = DataLoader(TensorDataset(IMAGES), batch_size=7, shuffle=True)
    detector = FuseNorm(net, **settings).fit(shuffled)
    torch.testing.assert_close(detector.score(IMAGES), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("score", ["knn", "mds++", "react"])
def test_single_scores_read_once(score):
    loader = Resetting()
    SingleScore(Net(), score).fit(loader)
    assert loader.started == 1


def test_an_iterator_that_is_exhausted_is_an_error_where_two_readings_are_needed():
    with pytest.raises(DataError, match=r"readable more than once, got Resetting"):
        FuseNorm(Net(), strong=["output"], react_percentile=90.0).fit(Resetting(resets=False))


def test_iterators_of_python_are_refused_before_they_are_read():
    parts = IMAGES.split(8)
    made = (images for images in parts)
    for loader in (made, iter(list(parts)), map(torch.clone, parts), zip(parts, strict=True)):
        for fit in (FuseNorm(Net()).fit, SingleScore(Net(), "react").fit):
            with pytest.raises(DataError, match="fit on a DataLoader or a list of batches"):
                fit(loader)
        assert len(list(loader)) == 4


def test_a_loader_with_fewer_batches_the_second_time_is_an_error():
    class Shrinking:
        count = 4

        def __iter__(self):
            self.count -= 1
            return iter(IMAGES.split(8)[: self.count])

    readings = Readings(Shrinking())
    assert len(list(readings)) == 3
    with pytest.raises(DataError, match="with 3 and then 2 batches"):
        list(readings)


def test_the_first_images_are_those_of_the_first_batch_that_has_any():
    readings = Readings([IMAGES[:0], IMAGES[:3], IMAGES[3:]])
    assert torch.equal(readings.first, IMAGES[:3])
    for _ in range(2):
        assert [len(batch) for batch in readings] == [0, 3, 27]
    assert len(readings) == 3
    for empty in ([], [IMAGES[:0]], DataLoader(TensorDataset(IMAGES[:0]))):
        with pytest.raises(DataError, match="at least one image"):
            Readings(empty)


def test_time_is_counted_as_waiting_or_as_scoring(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)

    def run(throughput, batches, loading, scoring):
        nonlocal now

        def loader():
            nonlocal now
            for size in (*batches, None):  # the last, to find out that there are no more
                now += loading
                if size is not None:
                    yield size

        for size in throughput.timed(loader()):
            now += scoring
            throughput.images += size

    throughput, idle = Throughput(), Throughput()
    assert str(throughput).startswith("0 images per second")
    run(throughput, [10, 10, 80], loading=2.0, scoring=4.0)
    assert (throughput.images, throughput.seconds, throughput.waited) == (100, 20.0, 8.0)
    assert str(throughput).startswith("5 images per second")
    assert "40% of the time was spent waiting for images: try more loader" in str(throughput)
    run(idle, [10] * 10, loading=0.1, scoring=10.0)
    assert "1% of the time was spent waiting for images" in str(idle)
    assert "--num-workers" not in str(idle)
