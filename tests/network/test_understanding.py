"""Networks whose logits depend on the batch, are random, or cannot take one image alone."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fusenorm_openood import FuseNorm, Settings
from fusenorm_openood.detectors.configuration import detector_for
from fusenorm_openood.detectors.single import SingleScore
from fusenorm_openood.errors import NetworkError, TapError
from fusenorm_openood.forward.recorded import RecordedLoader
from fusenorm_openood.network.understanding import understand
from tests.nets import BLOCKS, Custom, Net, energies, listed, some_images

IMAGES = some_images(33)


class BatchStatistics(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)
        self.eval()

    def forward(self, x):
        return self.fc(self.b(self.norm(self.a(self.stem(x)))).mean((2, 3)))


def across_batch():
    """Every image is compared with the mean of its batch."""
    return Custom(lambda net, x: net.fc((f := net.feature(x)) - f.mean(0)))


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
@pytest.mark.parametrize(("kind", "output"), [(BatchStatistics, "energy"), (across_batch, "odin")])
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


def test_weak_influence_of_other_images_is_noticed():
    net = Custom(lambda net, x: Net.forward(net, x + 0.05 * x.mean(0, keepdim=True)))
    assert understand(net, IMAGES[:2]).batch_dependent


@pytest.mark.parametrize(
    ("kind", "mixes"),
    [(BatchStatistics, True), (across_batch, True), (InstanceNorm, False), (Net, False)],
)
def test_which_networks_mix_a_batch(kind, mixes):
    net = kind().eval()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        structure = understand(net.to(dtype), IMAGES[:2].to(dtype))
        assert structure.batch_dependent == mixes


def test_a_single_image_is_enough_to_understand_a_network():
    for images in (IMAGES[:1], torch.zeros(2, 3, 12, 12), torch.full((1, 3, 12, 12), torch.nan)):
        structure = understand(Net(), images)
        assert structure.blocks == BLOCKS
        assert structure.head.names == ("fc",)
        assert not structure.batch_dependent


class AlwaysOn(nn.Dropout):
    def train(self, mode=True):
        return super().train(True)


def crop(x, pixels):
    return F.pad(x, (1, 1, 1, 1))[..., pixels : pixels + 12, :12]


def half(net, x):
    """Stochastic depth that drops a block for all images, or none."""
    x = net.a(net.stem(x))
    x = net.b[0](x)
    x = net.b[1](x) if torch.rand(()) < 0.5 else x
    return net.fc(x.mean((2, 3)))


RANDOM = {
    "dropout": lambda net, x: net.fc(F.dropout(net.feature(x), 0.5, True)),
    "rare dropout": lambda net, x: net.fc(F.dropout(net.feature(x), 0.03, True)),
    "noise of one number": lambda net, x: Net.forward(net, x * (1 + 0.2 * torch.rand(1))),
    "crop by Python": lambda net, x: Net.forward(net, crop(x, random.randint(0, 2))),
    "crop by NumPy": lambda net, x: Net.forward(net, crop(x, np.random.randint(0, 3))),
    "stochastic depth": half,
    "dropped tokens": lambda net, x: net.fc(
        net.b(net.a(net.stem(x))).flatten(2).mT[:, : torch.randint(20, 36, ())]
    ).mean(1),
    "mean of dropout": lambda net, x: net.fc(
        torch.stack([F.dropout(f, 0.5, True) for f in [net.feature(x)] * 10]).mean(0)
    ),
    "own generator": lambda net, x: Net.forward(
        net, x + 0.1 * torch.randn(x.shape, generator=net.own)
    ),
    "a counter": lambda net, x: Net.forward(net, x * (1 + 0.1 * next(net.count))),
    "a saturated softmax": lambda net, x: net.fc(
        F.dropout(1e3 * net.feature(x), 0.5, True)
    ).softmax(1),
    "a module that stays in training mode": lambda net, x: net.fc(net.extra(net.feature(x))),
}


def seeded(net, x):
    torch.manual_seed(7)
    return net.fc(net.feature(x) * torch.rand(8).add(0.5))


DETERMINISTIC = {
    "plain": Net.forward,
    "seeded": seeded,
    "rounding": lambda net, x: Net.forward(net, x + 1e-6 * torch.randn_like(x)),
    "unused": lambda net, x: Net.forward(net, x + 0 * torch.rand(())),
}


def changed(kind):
    own = torch.Generator().manual_seed(0)
    return Custom(
        {**RANDOM, **DETERMINISTIC}[kind], own=own, extra=AlwaysOn(), count=iter(range(99))
    )


def states():
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


@pytest.mark.parametrize("kind", RANDOM)
def test_a_random_network_is_recognised_and_draws_nothing_of_the_users(kind):
    net = changed(kind)
    before = states()
    found = understand(net, IMAGES)
    assert found.random
    assert not found.batch_dependent
    assert states() == before


def test_a_random_network_is_one_error_that_says_so():
    net = changed("rare dropout")
    for use in (
        lambda: FuseNorm(net).fit([IMAGES]),
        lambda: SingleScore(net, "msp").score(IMAGES),
        lambda: SingleScore(net, "knn", K=5).fit([IMAGES]),
    ):
        with pytest.raises(TapError, match=r"other logits for the same images.*random='allow'"):
            use()


@pytest.mark.parametrize("kind", DETERMINISTIC)
def test_what_differs_by_rounding_or_not_at_all_is_not_random(kind):
    found = understand(changed(kind), IMAGES)
    assert not found.random
    assert not found.batch_dependent
    assert found.smallest_batch == 1


def test_randomness_that_is_allowed_is_a_warning_that_is_kept(tmp_path):
    net = changed("dropout")
    with pytest.warns(UserWarning, match="verdicts are random"):
        detector = FuseNorm(net, random="allow").fit([IMAGES])
    detector.score(IMAGES)
    detector.save(tmp_path / "detector.safetensors")
    with pytest.warns(UserWarning, match="verdicts are random"):
        loaded = FuseNorm.load(tmp_path / "detector.safetensors", net)
    assert loaded.settings.random == "allow"
    for name in ("msp", "gen"):
        config = {"postprocessor": {"postprocessor_args": {"random": "allow"}}}
        with pytest.warns(UserWarning, match="verdicts are random"):
            detector_for(name, config)(net).score(IMAGES)


def test_the_setting_is_in_files_only_where_it_is_not_the_default():
    assert "random" not in Settings().to_json()
    assert Settings(random="allow").to_json()["random"] == "allow"


class PixelRows(Net):
    """Squeezes in a module, and puts the dimension back at the end."""

    def __init__(self):
        super().__init__()
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), Squeeze())

    def forward(self, x):
        return self.fc(self.pool(self.b(self.a(self.stem(x))))).reshape(len(x), -1)


class Squeeze(nn.Module):
    def forward(self, x):
        return x.squeeze()


class Rows(Net):
    """Reads a map row by row with a recurrent layer."""

    def __init__(self):
        super().__init__()
        self.rows = nn.LSTM(8 * 6, 8, batch_first=True)

    def forward(self, x):
        x = self.b(self.a(self.stem(x))).permute(0, 2, 1, 3).flatten(2).squeeze()
        return self.fc(self.rows(x)[0][..., -1, :])


def refuses(net, x):
    if len(x) == 1:
        raise ValueError("Expected more than 1 value per channel")
    return Net.forward(net, x)


SQUEEZING = {
    "feature": lambda net, x: net.fc(net.feature(x)[:, :, None, None].squeeze()),
    "logits": lambda net, x: Net.forward(net, x).squeeze(),
    "softmax": lambda net, x: Net.forward(net, x).squeeze().softmax(-1),
    "refuses": refuses,
}


def squeezing(kind):
    other = {"module": PixelRows, "rows": Rows}
    return (other[kind]() if kind in other else Custom(SQUEEZING[kind])).eval()


KINDS = [*SQUEEZING, "module", "rows"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_last_batch_of_one_and_one_image_score_as_beside_others(kind):
    settings = Settings() if kind in ("softmax", "rows") else Settings.published()
    net = squeezing(kind)
    structure = understand(net, IMAGES)
    assert (structure.smallest_batch, structure.batch_dependent) == (2, False)
    assert understand(net, IMAGES[:1]) == structure
    detector = FuseNorm(net, settings).fit(list(IMAGES.split(32)))
    whole = FuseNorm(net, settings).fit([IMAGES]).id_statistics_.id_scores
    np.testing.assert_allclose(detector.id_statistics_.id_scores, whole, rtol=1e-4, atol=1e-5)
    expected = detector.score(IMAGES)
    batches = list(IMAGES.split(8))
    torch.testing.assert_close(detector.score_loader(batches), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(detector.score(IMAGES[4]), expected[4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        detector.explain(IMAGES[4]).conf[0], float(expected[4]), rtol=1e-4, atol=1e-5
    )
    assert detector.predict(IMAGES[:1])[0].shape == (1,)


@pytest.mark.parametrize("kind", ["feature", "rows"])
def test_single_experts_score_one_image(kind):
    net = squeezing(kind)
    for name, args in (("mls", {}), ("odin", {"temperature": 10.0, "noise": 0.01})):
        baseline = SingleScore(net, name, **args)
        torch.testing.assert_close(baseline.score(IMAGES[3]), baseline.score(IMAGES)[3])
    react = SingleScore(net, "react", percentile=80.0).fit(list(IMAGES.split(16)))
    torch.testing.assert_close(react.score(IMAGES[3]), react.score(IMAGES)[3])


def test_recorded_batches_of_one(tmp_path):
    net = squeezing("feature")
    loader = RecordedLoader(listed(IMAGES), tmp_path, {}, "images", 32)
    found = FuseNorm(net).fit(loader).infer(loader).experts
    expected = FuseNorm(net).fit([IMAGES]).infer([IMAGES]).experts
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_networks_without_one_row_per_image_are_refused():
    for run in (
        lambda net, x: Net.forward(net, torch.cat([x, x])[:2]),  # always two rows
        lambda net, x: Net.forward(net, x)[:, :2].T,  # a square for two images
    ):
        with pytest.raises(TapError, match=r"for 3 image\(s\)"):
            FuseNorm(Custom(run)).fit([IMAGES[:2]])


def test_crops_in_the_batch_are_no_rows_of_a_head():
    net = Custom(
        lambda net, x: Net.forward(net, torch.cat([x, x.flip(-1)])).unflatten(0, (2, -1)).mean(0)
    )
    structure = understand(net, IMAGES)
    assert (structure.classes, structure.head.names, structure.batch_dependent) == (5, (), False)


def test_one_image_of_a_network_that_mixes_is_the_networks_own_error():
    def normalised(net, x):
        return net.fc(F.batch_norm(net.feature(x), None, None, training=True))

    detector = FuseNorm(Custom(normalised), strong=["output"]).fit([IMAGES])
    assert detector.taps == BLOCKS
    with pytest.raises(NetworkError, match="more than 1 value"):
        detector.score(IMAGES[0])
