import numpy as np
import pytest
import torch

from fusenorm_openood import FuseNorm
from fusenorm_openood.errors import DataError
from fusenorm_openood.listening.batches import batches

IMAGES = torch.randn(4, 3, 8, 8)


@pytest.mark.parametrize(
    "labels", [torch.zeros(3), np.zeros(5), [0, 1], (0, 1, 2, 3, 4), torch.tensor(1)]
)
def test_labels_that_do_not_match_the_images_are_rejected(net, labels):
    for batch in ((IMAGES, labels), {"data": IMAGES, "label": labels}):
        with pytest.raises(DataError, match=r"a batch of 4 images has . labels"):
            list(batches([batch]))
        with pytest.raises(DataError, match="one label per image"):
            FuseNorm(net, output="energy", react_percentile=None).fit([batch])


@pytest.mark.parametrize("labels", [None, torch.zeros(4), np.zeros((4, 2)), [0, 1, 2, 3]])
def test_one_label_per_image_or_none_is_accepted(labels):
    ((images, given),) = batches([(IMAGES, labels)])
    assert images is IMAGES
    assert given is labels
