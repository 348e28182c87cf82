"""What the network is shown of an image; tests/training has what it is shown in training."""

import numpy as np
import pytest

from fusenorm_openood.data.benchmarks import load_benchmark
from tests.preprocessing import PREPROCESSING, drawn_image


@pytest.mark.parametrize("name", PREPROCESSING)
def test_images_are_resized_bilinearly_cropped_and_normalised(name):
    image, preprocessing = drawn_image(), PREPROCESSING[name]
    expected = preprocessing.normalised(preprocessing.resized(image))
    benchmark = load_benchmark(name)
    plain = benchmark.csid.get("imagenet_c")
    for image_set in benchmark.every():
        if image_set is not plain:
            np.testing.assert_allclose(image_set.transform(image), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["imagenet200", "imagenet"])
def test_imagenet_c_comes_in_its_final_size_and_is_only_normalised(name):
    image = drawn_image()
    expected = PREPROCESSING[name].normalised(np.asarray(image))
    transform = load_benchmark(name).csid["imagenet_c"].transform
    np.testing.assert_allclose(transform(image), expected, atol=1e-5)
