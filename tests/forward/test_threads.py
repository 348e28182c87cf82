"""Several threads may score with one network at the same time."""

import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from fusenorm_openood import FuseNorm, Settings
from fusenorm_openood.errors import FuseNormError
from fusenorm_openood.network.running import eval_mode
from tests.conftest import assert_undisturbed, state_of
from tests.nets import Net, some_images

IMAGES = some_images(8)
THREADS = 4


@pytest.fixture(autouse=True)
def _threads_that_interrupt_each_other_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


class Moody(Net):
    """A network whose scores depend on its mode."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm2d(8), nn.Dropout(0.9)
        self.eval()

    def forward(self, x):
        x = self.norm(self.a(self.stem(x)))
        return self.fc(self.dropout(self.b(x).mean((2, 3))))


def in_threads(work: Callable[..., object], given: Iterable[object]) -> list[object]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, given))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    ("settings", "count"),
    [(Settings(), 150), (Settings.published(strong=["b.0", "output"]), 50)],
    ids=["default", "published"],
)
def test_all_scores_of_all_threads_are_right(mode, settings, count):
    net = getattr(Moody(), mode)()
    net.a.eval()  # a frozen part
    detector = FuseNorm(net, settings).fit([IMAGES])
    right, before = detector.score(IMAGES), state_of(net)
    for conf in in_threads(detector.score, [IMAGES] * count):
        torch.testing.assert_close(conf, right)
    assert_undisturbed(net, before)


def test_each_thread_may_fit_and_score_with_its_own_detector():
    net = Moody().train()

    def fit(output):
        return FuseNorm(net, strong=["output"], output=output).fit([IMAGES]).score(IMAGES)

    expected = {output: fit(output) for output in ("msp", "energy", "odin")}
    before, outputs = state_of(net), list(expected) * 4
    for output, conf in zip(outputs, in_threads(fit, outputs), strict=True):
        torch.testing.assert_close(conf, expected[output])
    assert_undisturbed(net, before)


def test_one_detector_that_fails_leaves_the_others_undisturbed():
    net = Moody().train()
    fine = FuseNorm(net, strong=["output"]).fit([IMAGES])
    right, before, wrong = fine.score(IMAGES), state_of(net), IMAGES.clone()
    wrong[0, 0, 0, 0] = float("nan")

    def score(images):
        try:
            return fine.score(images)
        except (FuseNormError, RuntimeError) as error:
            return error

    given = [wrong, IMAGES, IMAGES[:, :2]] * 20  # NaN, and too few channels
    for images, found in zip(given, in_threads(score, given), strict=True):
        if images is IMAGES:
            torch.testing.assert_close(found, right)
        else:
            assert isinstance(found, Exception)
    assert_undisturbed(net, before)


def test_overlapping_passes_over_networks_that_share_modules():
    net = Moody().train()
    whole, part = eval_mode(net), eval_mode(net.b)
    whole.__enter__()
    part.__enter__()
    whole.__exit__(None, None, None)
    assert net.training
    assert net.a[0].training
    assert not any(module.training for module in net.b.modules())
    part.__exit__(None, None, None)
    assert all(module.training for module in net.modules())
