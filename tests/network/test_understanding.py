"""Networks whose logits depend on the batch, and those that fail on images."""

import pytest
import torch
from torch import nn

from fusenorm_openood import FuseNorm
from fusenorm_openood.detectors.baselines import Baseline
from fusenorm_openood.errors import TapError
from fusenorm_openood.network.understanding import understand
from tests.nets import BLOCKS, Net, energies, some_images

IMAGES = some_images(24)


class BatchStatistics(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)
        self.eval()

    def forward(self, x):
        return self.fc(self.b(self.norm(self.a(self.stem(x)))).mean((2, 3)))


class AcrossBatch(Net):  # every image is compared with the mean of its batch
    def feature(self, x):
        feature = super().feature(x)
        return feature - feature.mean(0)


class InstanceNorm(BatchStatistics):  # statistics of each image alone
    def __init__(self):
        super().__init__()
        self.norm = nn.InstanceNorm2d(8)
        self.eval()


@pytest.fixture
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("kind", [BatchStatistics, AcrossBatch])
@pytest.mark.parametrize("output", ["energy", "odin"])
def test_a_batch_that_is_mixed_is_never_split(kind, output, monkeypatch):
    monkeypatch.setattr("fusenorm_openood.forward.passes.PIXELS", 8 * 144)  # three parts for one
    net = kind().eval()
    with torch.no_grad():
        classes = net(IMAGES).argmax(1)
    right = energies(net, IMAGES)
    scores = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        detector = FuseNorm(net, strong=["output"], output=output).fit([IMAGES])
        pred, conf = detector.predict(IMAGES)
        assert torch.equal(pred, classes)
        scores.append(conf)
        if output == "energy":
            experts = detector.infer([IMAGES]).experts
            torch.testing.assert_close(torch.tensor(experts[-1]), right)
    torch.testing.assert_close(*scores)


@pytest.mark.parametrize("name", ["mls", "odin"])
def test_baselines_score_a_mixed_batch_as_a_whole(name):
    net = BatchStatistics()
    args = {"temperature": 1000.0, "noise": 0.0} if name == "odin" else {}
    with torch.no_grad():
        logits = net(IMAGES)
    pred, conf = Baseline(net, name, **args).predict(IMAGES)
    assert torch.equal(pred, logits.argmax(1))
    if name == "mls":
        torch.testing.assert_close(conf, logits.amax(1))


class WeaklyMixing(Net):
    def feature(self, x):
        return super().feature(x + 0.05 * x.mean(0, keepdim=True))


def test_weak_influence_of_other_images_is_noticed():
    assert understand(WeaklyMixing().eval(), IMAGES[:2]).batch_dependent


@pytest.mark.parametrize(
    ("kind", "mixes"),
    [(BatchStatistics, True), (AcrossBatch, True), (InstanceNorm, False), (Net, False)],
)
def test_which_networks_mix_a_batch(kind, mixes):
    net = kind().eval()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        structure = understand(net.to(dtype), IMAGES[:2].to(dtype))
        assert structure.batch_dependent == mixes


def test_an_ensemble_beside_each_other_in_the_batch_is_one_error():
    class BatchEnsemble(Net):  # M x B logits
        def forward(self, x):
            return super().forward(x.repeat(4, 1, 1, 1))

    for use in (
        lambda net: FuseNorm(net).fit([IMAGES]),
        lambda net: Baseline(net, "msp").score(IMAGES),
    ):
        with pytest.raises(TapError, match=r"got \[8, 5\] for 2 image"):
            use(BatchEnsemble())


def test_a_single_image_is_enough_to_understand_a_network():
    for images in (IMAGES[:1], torch.zeros(2, 3, 12, 12), torch.full((1, 3, 12, 12), torch.nan)):
        structure = understand(Net(), images)
        assert structure.blocks == BLOCKS
        assert structure.head.names == ("fc",)
        assert not structure.batch_dependent


class Patches(Net):
    """Takes images of one size only."""

    def __init__(self, size, channels=3):
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 3, 1, 1)
        self.size, self.channels = size, channels

    def forward(self, x):
        if x.shape[1:] != (self.channels, self.size, self.size):
            raise ValueError(f"takes images of {self.size} pixels")
        return super().forward(x)


def test_a_network_that_fails_is_one_error_with_its_own_words():
    with pytest.raises(TapError, match=r"\[2, 3, 12, 12\].*takes images of 13 pixels"):
        FuseNorm(Patches(13)).fit([IMAGES])
