import subprocess
import sys
from collections import UserDict

import numpy as np
import pytest
import torch

from fusenorm_openood import FuseNorm
from fusenorm_openood.errors import DataError
from fusenorm_openood.forward.batches import batches

IMAGES = torch.randn(4, 3, 8, 8)

FEW_FILES = """
import resource, torch
from torch.utils.data import DataLoader, TensorDataset
from fusenorm_openood import FuseNorm
from fusenorm_openood.network import ResNet18_32x32
from fusenorm_openood.training.epoch import validation_accuracy

resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
net = ResNet18_32x32(5, width=1).eval()
data = TensorDataset(torch.randn(150, 3, 8, 8), torch.zeros(150, dtype=torch.long))
loader = DataLoader(data, batch_size=1, num_workers=1)
print(len(FuseNorm(net, output="energy").fit(loader).score_loader(loader)))
print(validation_accuracy(net, loader) >= 0)
"""


@pytest.mark.parametrize("labels", [torch.zeros(3), np.zeros(5), [0, 1], (0, 1, 2, 3, 4)])
def test_labels_that_do_not_match_the_images_are_rejected(net, labels):
    for batch in ((IMAGES, labels), {"data": IMAGES, "label": labels}):
        with pytest.raises(DataError, match=r"a batch of 4 images has . labels"):
            list(batches([batch]))
        with pytest.raises(DataError, match="one label per image"):
            FuseNorm(net, output="energy", react_percentile=None).fit([batch])


@pytest.mark.parametrize(
    "labels",
    [
        [3, -1, 0, 2],
        (3, -1, 0, 2),
        [torch.tensor(i) for i in (3, -1, 0, 2)],
        torch.tensor([3, -1, 0, 2], dtype=torch.int32),
        torch.tensor([3.0, -1, 0, 2], requires_grad=True),
        np.array([[3], [-1], [0], [2]], dtype=np.int8),
    ],
)
def test_class_labels_are_copied_to_an_integer_array(labels):
    ((images, given),) = batches([(IMAGES, labels)])
    assert images is IMAGES
    assert given.dtype == np.int64
    assert given.tolist() == [3, -1, 0, 2]
    assert not isinstance(labels, np.ndarray) or not np.shares_memory(given, labels)


@pytest.mark.parametrize(
    "labels",
    [
        None,
        -1,
        "class",
        torch.tensor(1),
        ["a.png", "b.png", "c.png", "d.png"],
        [0, 1, 2, "d"],
        [None] * 4,
        [[0], [1, 2], [], [3]],
        {"class": torch.zeros(4)},
        (torch.zeros(4), torch.ones(4)),
        [{"boxes": torch.zeros(2, 4)}] * 4,
        torch.eye(4),
        torch.zeros(4, dtype=torch.bfloat16),
        np.array([0.5, 1, 2, 3]),
        np.array([np.nan, np.inf, 2, 3]),
        IMAGES,
    ],
)
def test_anything_else_counts_as_no_labels(net, labels):
    ((_, given),) = batches([(IMAGES, labels)])
    assert given is None
    scored = FuseNorm(net, output="energy").fit([IMAGES]).infer([(IMAGES, labels)])
    assert scored.label.tolist() == [-1] * 4


@pytest.mark.parametrize("images", ["data", "pixel_values", "image", "images", "img"])
@pytest.mark.parametrize("labels", ["label", "labels", "target", "targets"])
def test_batches_may_be_dicts(images, labels):
    batch = {"index": [0, 1, 2, 3], images: IMAGES, labels: torch.arange(4)}
    for kind in (batch, UserDict(batch), [batch], (batch,)):
        ((found, given),) = batches([kind])
        assert found is IMAGES
        assert given.tolist() == [0, 1, 2, 3]


def test_batches_may_be_images_alone():
    for batch in (IMAGES, [IMAGES], {"img": IMAGES}, (IMAGES, None)):
        ((images, given),) = batches([batch])
        assert images is IMAGES
        assert given is None


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_numpy_images_become_float32_tensors(dtype):
    array = IMAGES.numpy().astype(dtype)[::-1]
    array.flags.writeable = False
    ((images, _),) = batches([array])
    assert images.dtype == torch.float32
    np.testing.assert_array_equal(images, array.astype(np.float32))


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (IMAGES.to(torch.uint8), r"torch\.uint8 \[4, 3, 8, 8\]"),
        (IMAGES.numpy().astype(np.uint8), r"uint8 \[4, 3, 8, 8\]"),
        (IMAGES[0].numpy(), r"torch\.float32 \[3, 8, 8\]"),
        ([], "list"),
        ([{"data": IMAGES}] * 2, "dict"),
        ({"x": IMAGES, "y": 0}, "the keys x, y: rename"),
        ({}, "the keys of an empty dict"),
    ],
)
def test_other_batches_are_rejected(batch, found):
    with pytest.raises(DataError, match=rf"must .*, got {found}"):
        list(batches([batch]))


@pytest.mark.skipif(sys.platform != "linux", reason="limits open files as Linux does")
def test_no_batch_keeps_a_file_of_a_worker_process_open():
    done = subprocess.run(
        [sys.executable, "-c", FEW_FILES], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["150", "True"], done.stderr
