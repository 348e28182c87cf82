"""Far off means out: the more absurd an image, the less it may be accepted."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusenorm_openood import FuseNorm, Settings, load_network
from fusenorm_openood.data.benchmarks import image_loader, load_benchmark
from fusenorm_openood.forward.experts import Fitted
from fusenorm_openood.network.understanding import understand
from tests.conftest import make_net

COUNT = 100
SIZE = (COUNT, 3, 24, 24)


def stripes(g):
    period = torch.randint(1, 9, (COUNT, 1, 1, 1), generator=g)
    return (torch.arange(24).expand(COUNT, 1, 24, 24) // period % 2).float()


def checkerboards(g):
    lines = stripes(g)
    return (lines - lines.transpose(2, 3)).abs()


KINDS = {
    "uniform noise": lambda g: torch.rand(SIZE, generator=g),
    "Gaussian noise": lambda g: 0.5 + 0.25 * torch.randn(SIZE, generator=g),
    "one colour": lambda g: torch.rand(COUNT, 3, 1, 1, generator=g),
    "one grey": lambda g: torch.rand(COUNT, 1, 1, 1, generator=g),
    "saturated": lambda g: torch.rand(SIZE, generator=g).round(),
    "saturated colour": lambda g: torch.rand(COUNT, 3, 1, 1, generator=g).round(),
    "grey noise": lambda g: torch.rand(COUNT, 1, 24, 24, generator=g),
    "stripes": stripes,
    "checkerboards": checkerboards,
}
BARE = Settings(strong=("output",), clip=False, cap=1.0)
PATTERNS = ("stripes", "checkerboards")  # have content: far off are those of more contrast


@pytest.fixture(scope="module")
def fitted(digits):
    """Three methods and their thresholds of 95 % acceptance."""
    data_root, checkpoint = digits
    benchmark, net = load_benchmark("digits", data_root), load_network(checkpoint)
    found = []
    for method in (Settings(), Settings.deviation(), BARE):
        detector = FuseNorm(net, method).fit(image_loader(benchmark.id["val"]))
        known = detector.infer(image_loader(benchmark.id["test"])).conf
        found.append((detector, float(np.percentile(known, 5))))
    return found


@pytest.mark.parametrize("contrast", [1, 3, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_images_without_content_are_rejected_at_any_contrast(fitted, kind, contrast):
    if kind in PATTERNS and contrast == 1:
        pytest.skip("a wide stripe is much like a one")
    x = KINDS[kind](torch.Generator().manual_seed(0)).expand(SIZE)
    about_grey = contrast * (x - 0.5) / 0.5  # pixels 0.5 + contrast * (x - 0.5), normalised
    brighter = contrast * x
    for images in (about_grey, brighter):
        for detector, threshold in fitted[:2]:
            assert (detector.score(images) >= threshold).double().mean() <= 0.01


def test_without_the_clip_the_most_absurd_images_are_accepted(fitted):
    detector, threshold = fitted[2]
    x = KINDS["saturated"](torch.Generator().manual_seed(0))
    assert (detector.score(100 * (x - 0.5)) >= threshold).double().mean() > 0.5


METHODS = {"fusenorm": Settings(), "fusenorm_deviation": Settings.deviation()}
BLOCKS, STRONG = 8, 4


def id_scores(images=300, seed=0):
    """Scores of eight blocks, whose norms rise and fall together, and of strong experts."""
    g = np.random.default_rng(seed)
    blocks = np.exp(0.3 * g.normal(size=images) + 0.1 * g.normal(size=(BLOCKS, images)))
    return np.concatenate([blocks, g.normal(size=(STRONG, images))])


NET = make_net()
STRUCTURE = understand(NET, torch.randn(2, 3, 16, 16))


def made(method):
    detector = FuseNorm(NET, method, STRUCTURE)
    return detector.with_statistics(detector.learn(id_scores()[: len(detector.experts)], Fitted()))


DETECTORS = {name: made(method) for name, method in METHODS.items()}
directions = st.lists(st.floats(-1, 1), min_size=BLOCKS, max_size=BLOCKS).filter(
    lambda d: max(map(abs, d)) > 0.2
)


def ray(direction, steps, strong):
    """Images farther and farther in one direction, their strong experts all with one score."""
    blocks = np.exp(np.outer(direction, steps))
    return np.concatenate([blocks, np.full((STRONG, len(steps)), strong)])


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=25)
@given(direction=directions, strong=st.sampled_from([0.0, 3.0, 1e3, 1e30]))
def test_no_strong_score_however_high_rescues_what_is_far_off(method, direction, strong):
    detector = DETECTORS[method]
    known = detector.confidence(id_scores(2000, seed=1))
    far = detector.confidence(ray(direction, np.array([20.0, 50.0]), strong))
    assert (far < np.percentile(known, 5)).all()
    assert (far < known.min()).all()


def test_the_published_method_has_no_such_penalty():
    assert made(Settings.deviation(clip=False)).id_statistics_.joint is None
