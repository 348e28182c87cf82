"""Several threads may score with one network at the same time."""

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fusenorm_openood.detectors.baselines import Baseline
from torch import nn

from fusenorm_openood import FuseNorm, Settings
from fusenorm_openood.errors import FuseNormError
from fusenorm_openood.network import ResNet18_32x32, T2FNormNet
from fusenorm_openood.network.running import eval_mode
from tests.conftest import assert_undisturbed, state_of
from tests.nets import Net, energies, some_images

IMAGES = some_images(16)
SCORES, THREADS = 200, 4


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


def in_threads(count: int, work: Callable[[], object]) -> list[object]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda _: work(), range(count)))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings.published(strong=["b.0", "output"]),
        Settings(strong=["output"], output="odin", react_percentile=None),
    ],
    ids=["energy", "published", "odin"],
)
def test_all_scores_of_all_threads_are_right(mode, settings):
    net = getattr(Moody(), mode)()
    net.a.eval()  # a frozen part
    detector = FuseNorm(net, settings).fit([IMAGES])
    right, before = detector.score(IMAGES), state_of(net)
    count = SCORES if settings.output == "energy" else SCORES // 4
    for conf in in_threads(count * THREADS, lambda: detector.score(IMAGES)):
        torch.testing.assert_close(conf, right)
    assert_undisturbed(net, before)


def test_each_thread_may_fit_and_score_with_its_own_detector():
    net = Moody().train()
    expected = {
        output: FuseNorm(net, strong=["output"], output=output).fit([IMAGES]).score(IMAGES)
        for output in ("msp", "mls", "energy", "odin")
    }
    before = state_of(net)

    def fit(output):
        return FuseNorm(net, strong=["output"], output=output).fit([IMAGES]).score(IMAGES)

    with ThreadPoolExecutor(THREADS) as pool:
        outputs = list(expected) * 8
        for output, conf in zip(outputs, pool.map(fit, outputs), strict=True):
            torch.testing.assert_close(conf, expected[output])
    assert_undisturbed(net, before)


def test_one_detector_that_fails_leaves_the_others_undisturbed():
    net = Moody().train()
    fine = FuseNorm(net, strong=["output"]).fit([IMAGES])
    right, before, wrong = fine.score(IMAGES), state_of(net), IMAGES.clone()
    wrong[0, 0, 0, 0] = float("nan")
    failures = []

    def fail():
        for images in (wrong, IMAGES[:, :2]):  # NaN, and too few channels
            for _ in range(20):
                try:
                    fine.score(images)
                except (FuseNormError, RuntimeError) as error:
                    failures.append(error)

    threads = [threading.Thread(target=fail) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(60):
        torch.testing.assert_close(fine.score(IMAGES), right)
    for thread in threads:
        thread.join()
    assert len(failures) == 80
    assert_undisturbed(net, before)


def test_threads_that_share_a_t2fnorm_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Identity(), T2FNormNet(ResNet18_32x32(4, width=2), 4)).eval()
    net[1].set_tau(0.1)
    detector = Baseline(net, "t2fnorm")
    with torch.no_grad():
        right = net[1].forward_ood_inference(IMAGES).softmax(1).amax(1)
        classes = net(IMAGES).argmax(1)
    for pred, conf in in_threads(60, lambda: detector.predict(IMAGES)):
        torch.testing.assert_close(conf, right)
        assert torch.equal(pred, classes)


def test_a_detector_beside_the_networks_own_user():
    net = Moody()
    detector = FuseNorm(net, strong=["output"]).fit([IMAGES])
    right, expected = detector.score(IMAGES), energies(net, IMAGES)
    done = threading.Event()

    def use():
        while not done.is_set():
            torch.testing.assert_close(energies(net, IMAGES), expected)

    with ThreadPoolExecutor(1) as pool:
        user = pool.submit(use)
        for _ in range(60):
            torch.testing.assert_close(detector.score(IMAGES), right)
        done.set()
        user.result()


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
    net = Net()
    expected = FuseNorm(net, Settings.published()).fit([IMAGES]).score(IMAGES)
    detector = FuseNorm(nn.DataParallel(net), Settings.published()).fit([IMAGES])
    for conf in in_threads(20, lambda: detector.score(IMAGES)):
        torch.testing.assert_close(conf, expected)
