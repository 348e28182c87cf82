"""What cannot work is an error at the first batch, before a long reading."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fusenorm_openood import FuseNorm
from fusenorm_openood.detectors.bank import ScoreBank
from fusenorm_openood.detectors.single import SingleScore
from fusenorm_openood.errors import FuseNormError, TapError
from fusenorm_openood.method.settings import Settings
from tests.nets import BLOCKS, CLASSES, Custom, Net, energies, some_images

BATCH = 4


class Images(Dataset):
    def __init__(self, channels: int = 3, dtype: torch.dtype = torch.float32) -> None:
        self.images = some_images(40).to(dtype)[:, :channels]
        self.read = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        self.read += 1
        return self.images[index]


def headless():
    return Custom(lambda net, x: net.feature(x)[:, :CLASSES].tanh())


def unused():
    return Custom(Net.forward, spare=nn.Conv2d(3, 3, 3))


def doubling():
    return Custom(lambda net, x: Net.forward(net, x).repeat(2, 1))


def frozen():
    return Custom(lambda net, x: net.fc(net.feature(x).detach()))


WRONG = {
    "a tap that never fires": (unused, {"taps": ["a.0", "spare"]}, "never fired"),
    "a tap without a map": (Net, {"taps": ["a.0", "fc"]}, r"got \[2, 5\]"),
    "no head for post-hoc experts": (headless, {}, r"set strong=\['output'\]"),
    "no head for ReAct": (
        headless,
        {"strong": ["output"], "react_percentile": 90.0},
        "set react_percentile=None",
    ),
    "a batch twice as large": (doubling, {}, r"got \[4, 5\] for 2 image"),
    "no gradient": (
        frozen,
        {"taps": list(BLOCKS), "strong": ["output"], "output": "odin"},
        "choose output='energy'",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_work_is_told_at_the_first_batch(kind):
    make, settings, message = WRONG[kind]
    for use in (
        lambda net, loader: FuseNorm(net, **settings).fit(loader),
        lambda net, loader: ScoreBank(net, [Settings(**settings)]).fit(loader),
    ):
        data = Images()
        with pytest.raises(TapError, match=message):
            use(make(), DataLoader(data, batch_size=BATCH))
        assert data.read <= BATCH


@pytest.mark.parametrize("name", ["react", "knn"])
def test_single_scores_tell_at_the_first_batch(name):
    data = Images()
    with pytest.raises(TapError):
        SingleScore(headless(), name).fit(DataLoader(data, batch_size=BATCH))
    assert data.read <= BATCH


def test_images_with_other_channels_are_told_at_the_first_batch():
    data = Images(channels=2)
    with pytest.raises(FuseNormError, match=r"\[2, 2, 12, 12\].*3 channels, but got 2 channels"):
        FuseNorm(Net()).fit(DataLoader(data, batch_size=BATCH))
    assert data.read <= BATCH


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize(
    ("weights", "images"),
    [*zip(FLOATS, FLOATS[::-1], strict=True), (FLOATS[0], FLOATS[0]), (FLOATS[2], FLOATS[1])],
)
def test_images_and_weights_may_differ_in_precision(weights, images):
    net, data = Net().to(weights), Images(dtype=images)
    detector = FuseNorm(net).fit(DataLoader(data, batch_size=BATCH))
    assert detector.taps == BLOCKS
    scored = detector.infer([data.images])
    assert len(scored.conf) == len(data)
    exact = energies(Net(), some_images(40))
    tolerance = 1e-5 if images.itemsize >= 4 and weights.itemsize >= 4 else 0.05
    torch.testing.assert_close(
        torch.tensor(scored.experts[4]).double(), exact, rtol=tolerance, atol=tolerance
    )
    assert SingleScore(net, "msp").score(data.images).isfinite().all()


@pytest.mark.parametrize("weights", [torch.float32, torch.float64])
def test_odin_in_every_precision(weights):
    net, images = Net().to(weights), some_images(40)
    detector = FuseNorm(net, Settings.published()).fit([images.double()])
    expected = FuseNorm(Net(), Settings.published()).fit([images])
    torch.testing.assert_close(detector.score(images), expected.score(images), rtol=1e-2, atol=1e-2)


def test_a_network_on_float64_is_scored_in_float64():
    net, images = Net().double(), some_images(40)
    scored = FuseNorm(net, strong=["output"]).fit([images]).infer([images])
    with torch.no_grad():
        exact = net(images.double()).logsumexp(1)
    torch.testing.assert_close(torch.tensor(scored.experts[-1]), exact, rtol=1e-12, atol=1e-12)


def test_weights_of_which_some_are_integers():
    class Quantised(Net):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.arange(5), requires_grad=False)

        def named_parameters(self, *args, **kwargs):  # the integers come first
            yield from reversed(list(super().named_parameters(*args, **kwargs)))

    images = some_images(40)
    expected = FuseNorm(Net()).fit([images]).score(images)
    torch.testing.assert_close(FuseNorm(Quantised().eval()).fit([images]).score(images), expected)
