"""What reaches an epoch of training: the optimiser, and images by the recipe's seed and rank."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from fusenorm_openood.storage.torchrun import Process
from fusenorm_openood.training.loop import train
from fusenorm_openood.training.recipes import Recipe
from tests.conftest import drawn_benchmark
from tests.preprocessing import PREPROCESSING, drawn_image

RECIPE = Recipe(id_data="cifar10", width=2, epochs=1, batch_size=4)


@pytest.fixture
def epochs(monkeypatch):
    """Model, optimiser and images of every epoch, which trains nothing."""
    reached = []

    def epoch(model, optimiser, loader, *args):
        images = torch.cat([batch["data"] for batch in loader])
        reached.append((model, optimiser, images))
        return 0.0

    monkeypatch.setattr("fusenorm_openood.training.loop.train_epoch", epoch)
    return reached


def copies(name, data_root, count):
    """A benchmark whose training list names one image so many times."""
    benchmark = drawn_benchmark(name, data_root)
    train = benchmark.id["train"]
    drawn_image().save(train.data_dir / "drawn.png")
    train.imagelist.write_text("drawn.png 0\n" * count)
    return benchmark


def test_the_optimiser_is_sgd_with_nesterov_momentum_and_weight_decay(tmp_path, epochs):
    train(RECIPE, drawn_benchmark("cifar10", tmp_path), tmp_path / "run", progress=False)
    model, optimiser, _ = epochs[0]
    assert type(optimiser) is torch.optim.SGD
    (group,) = optimiser.param_groups
    assert set(group["params"]) == set(model.parameters())
    assert group["nesterov"]
    assert (group["momentum"], group["weight_decay"], group["dampening"]) == (0.9, 5e-4, 0)


def views(name, tmp_path, epochs, count):
    """The different images that a drawn one becomes in so many readings, as bytes."""
    recipe = replace(RECIPE, id_data=name, batch_size=100)
    train(recipe, copies(name, tmp_path, count), tmp_path / "run", progress=False)
    return {PREPROCESSING[name].pixels(image.numpy()).tobytes() for image in epochs[0][2]}


def mirrored(images):
    return [*images, *(image[:, ::-1] for image in images)]


@pytest.mark.parametrize("name", ["cifar10", "digits"])
def test_images_are_cropped_with_a_margin_of_an_eighth_and_mirrored(name, tmp_path, epochs):
    size = PREPROCESSING[name].size
    margin = size // 8
    padded = np.pad(
        PREPROCESSING[name].resized(drawn_image()), [(margin, margin), (margin, margin), (0, 0)]
    )
    places = [(y, x) for y in range(2 * margin + 1) for x in range(2 * margin + 1)]
    crops = [padded[y : y + size, x : x + size] for y, x in places]
    expected = crops if name == "digits" else mirrored(crops)  # mirrored digits are no digits
    seen = views(name, tmp_path, epochs, count=12 * len(expected))
    assert seen == {image.tobytes() for image in expected}


@pytest.mark.parametrize("name", ["imagenet"])
def test_images_of_imagenet_are_regions_of_random_scale_and_shape(
    name, tmp_path, epochs, monkeypatch
):
    drawn = []

    def region(image, scale, ratio):
        drawn.append((*scale, *ratio))
        return 5, 12, 24, 40  # top, left, height, width

    monkeypatch.setattr(transforms.RandomResizedCrop, "get_params", staticmethod(region))
    seen = views(name, tmp_path, epochs, count=20)
    box = 12, 5, 52, 29
    large = drawn_image().crop(box).resize((224, 224), Image.Resampling.BILINEAR)
    assert seen == {image.tobytes() for image in mirrored([np.asarray(large)])}
    assert drawn == [(0.08, 1, 3 / 4, 4 / 3)] * 20


def test_ranks_seeds_and_epochs_differ_in_what_they_see_and_repeat_it(tmp_path, epochs):
    benchmark = copies("cifar10", tmp_path, 20)

    def seen(run, rank, seed):
        epochs.clear()
        recipe = replace(RECIPE, epochs=2, seed=seed)
        # Rank 1 alone: what two processes share is tested with two.
        train(recipe, benchmark, tmp_path / run, process=Process(rank, rank), progress=False)
        return [images for _, _, images in epochs]

    first, second = seen("a", rank=0, seed=0)
    assert not torch.equal(first, second)
    again = seen("b", rank=0, seed=0)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, seen("c", rank=1, seed=0)[0])
    assert not torch.equal(first, seen("d", rank=0, seed=1)[0])


def test_of_equally_good_epochs_the_last_is_kept(tmp_path, monkeypatch):
    number, reached = itertools.count(), iter([0.4, 0.5, 0.5, 0.3])

    def epoch(model, *args):
        torch.nn.init.constant_(model.fc.bias, next(number))
        return 0.0

    monkeypatch.setattr("fusenorm_openood.training.loop.train_epoch", epoch)
    monkeypatch.setattr(
        "fusenorm_openood.training.loop.validation_accuracy", lambda *args: next(reached)
    )
    benchmark = drawn_benchmark("cifar10", tmp_path)
    best = train(replace(RECIPE, epochs=4), benchmark, tmp_path / "run", progress=False)
    assert set(torch.load(best)["fc.bias"].tolist()) == {2}
