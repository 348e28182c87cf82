import pytest
import torch

from fusenorm_openood.data.pseudo import KINDS, RANDOM
from fusenorm_openood.detectors.search import PseudoImages, PseudoOOD, pseudo_ood
from fusenorm_openood.storage.stored import row_batches

SIZES = [
    (1, 3, 32, 32),
    (4, 1, 28, 28),
    (3, 3, 5, 7),
    (2, 1, 1, 1),
    (2, 3, 18, 26),
]


def images(shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_the_shape_and_repeats_itself(kind, shape):
    x = images(shape)
    before = x.clone()
    made = [KINDS[kind](x, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(x, before)
    assert made[0].shape == x.shape
    assert made[0].dtype == x.dtype
    assert torch.isfinite(made[0]).all()
    assert torch.equal(*made)
    if min(shape[2:]) > 1:
        assert all(not torch.equal(a, b) for a, b in zip(made[0], x, strict=True))


def test_jigsaws_and_rotations_keep_all_pixels():
    x = images((8, 3, 35, 34))
    for kind in ("jigsaw", "rotation"):
        made = KINDS[kind](x, torch.Generator().manual_seed(0))
        torch.testing.assert_close(made.flatten(2).sort().values, x.flatten(2).sort().values)


def test_a_negative_of_a_negative_is_the_image():
    x = images((2, 3, 8, 8))
    again = KINDS["inversion"](KINDS["inversion"](x, torch.Generator()), torch.Generator())
    torch.testing.assert_close(again, x)


def test_zoom_shows_the_centre_and_blur_removes_detail():
    x = torch.zeros(1, 1, 32, 32)
    x[..., 12:20, 12:20] = 1
    assert (KINDS["zoom"](x, torch.Generator()) == 1).all()
    x = images((1, 3, 32, 32))
    assert KINDS["blur"](x, torch.Generator()).std() < 0.2 * x.std()


def test_loaders_of_pseudo_ood_images_are_the_same_in_every_pass():
    loader = [(images((4, 3, 8, 8)), None), images((2, 3, 8, 8))]
    loaders = pseudo_ood(loader)
    assert [each.kind for each in loaders] == list(KINDS)
    for each in loaders:
        first, second = torch.cat(list(each)), torch.cat(list(each))
        assert torch.equal(first, second)
        assert len(first) == 6
    assert not torch.equal(*(torch.cat(list(PseudoOOD(loader, "noise", s))) for s in (0, 1)))


@pytest.mark.parametrize("shape", SIZES[-2:])
@pytest.mark.parametrize("kind", KINDS)
def test_only_some_kinds_draw_and_how_much_the_shape_says(kind, shape):
    after = []
    for x in (images(shape), torch.zeros(shape)):
        generator = torch.Generator().manual_seed(3)
        before = generator.get_state()
        KINDS[kind](x, generator)
        after.append(generator.get_state())
    assert torch.equal(*after)
    assert kind in RANDOM or torch.equal(before, after[0])


@pytest.mark.parametrize("order", [range(11), [7, 0, 10, 3, 7]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_pseudo_ood_images_by_number_are_those_of_the_loader_in_any_order(kind, order):
    x = images((11, 3, 8, 8))
    loader = [(x[batch.start : batch.stop], None) for batch in row_batches(range(11), 4)]
    expected = torch.cat(list(PseudoOOD(loader, kind)))
    made = PseudoImages([{"data": image, "label": 1} for image in x], kind, 4)
    assert len(made) == 11
    for number in order:
        assert torch.equal(made[number]["data"], expected[number])
        assert made[number]["label"] == -1
