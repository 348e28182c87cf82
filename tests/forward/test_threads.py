"""Several threads may score with one network at the same time."""

import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from fusenorm_openood import FuseNorm, Settings
from fusenorm_openood.detectors.single import SingleScore
from fusenorm_openood.errors import FuseNormError
from fusenorm_openood.network import ResNet18_32x32, T2FNormNet
from fusenorm_openood.network.running import eval_mode
from tests.conftest import assert_undisturbed, state_of
from tests.nets import Net, energies, some_images

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


def test_threads_that_share_a_t2fnorm_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Identity(), T2FNormNet(ResNet18_32x32(4, width=2), 4)).eval()
    net[1].set_tau(0.1)
    detector = SingleScore(net, "t2fnorm")
    with torch.no_grad():
        right = net[1].forward_ood_inference(IMAGES).softmax(1).amax(1)
        classes = net(IMAGES).argmax(1)
    for pred, conf in in_threads(detector.predict, [IMAGES] * 30):
        torch.testing.assert_close(conf, right)
        assert torch.equal(pred, classes)


def test_detectors_beside_the_networks_own_user():
    net = Moody()
    detector = FuseNorm(net, strong=["output"]).fit([IMAGES])
    right, expected = detector.score(IMAGES), energies(net, IMAGES)

    def use(is_own):
        return energies(net, IMAGES) if is_own else detector.score(IMAGES)

    for number, found in enumerate(in_threads(use, [False, True] * 60)):
        torch.testing.assert_close(found, expected if number % 2 else right)


def test_overlapping_passes_restore_the_modes_from_before_the_first():
    net = Moody().train()
    net.a.eval()
    before = {name: module.training for name, module in net.named_modules()}
    first, second = eval_mode(net), eval_mode(net)
    first.__enter__()
    second.__enter__()
    assert not any(module.training for module in net.modules())
    first.__exit__(None, None, None)
    assert not any(module.training for module in net.modules())  # the second still runs
    second.__exit__(None, None, None)
    assert {name: module.training for name, module in net.named_modules()} == before


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


def test_a_data_parallel_network_runs_on_one_device():
    net, settings = Net(), Settings.published()
    expected = FuseNorm(net, settings).fit([IMAGES]).score(IMAGES)
    detector = FuseNorm(nn.DataParallel(net), settings).fit([IMAGES])
    for conf in in_threads(detector.score, [IMAGES] * 20):
        torch.testing.assert_close(conf, expected)
