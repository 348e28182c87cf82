import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F

from fusenorm_openood import FuseNorm, Settings, atf, compute_id_statistics, fuse, normalise
from fusenorm_openood.detectors.bank import ScoreBank
from fusenorm_openood.errors import (
    ConfigError,
    DataError,
    NonFiniteError,
    NotFittedError,
    TapError,
)
from fusenorm_openood.forward.passes import PIXELS, parts
from fusenorm_openood.network.structure import read_structure
from tests.conftest import assert_undisturbed, make_loader, make_net, state_of
from tests.method.test_joint import left_out, log_m

IMAGES = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def published(net, **changes):
    return FuseNorm(net, Settings.published(**changes))


@pytest.fixture(scope="module")
def fitted():
    """A detector that no test may change."""
    return FuseNorm(make_net()).fit(make_loader())


def separate_passes(net, id_images, images, output, react, temperature, noise):
    """FuseNorm as published: norms, then ReAct, then ODIN, each in its own passes."""
    blocks = [b for stage in (1, 2, 3, 4) for b in getattr(net, f"layer{stage}")]

    def norms(x):
        rows, x = [], F.relu(net.bn1(net.conv1(x)))
        for block in blocks:
            x = block(x)
            rows.append(atf(x))
        return torch.stack(rows).double()

    with torch.no_grad():
        _, features = net(id_images, return_feature=True)
    threshold = np.percentile(features.numpy(), react) if react else float("inf")

    def logits(x):
        return net.fc(net(x, return_feature=True)[1].clip(max=threshold))

    def out(x):
        if output == "odin":
            x = x.clone().requires_grad_()
            y = logits(x) / temperature
            F.cross_entropy(y, y.argmax(1)).backward()
            x = (x - noise * torch.where(x.grad >= 0, 1.0, -1.0)).detach()
        with torch.no_grad():
            y = logits(x).double() / temperature
        if output in ("odin", "msp"):
            p = y.softmax(1).amax(1)
            return torch.log(p) - torch.log1p(-p)
        return temperature * y.logsumexp(1) if output == "energy" else temperature * y.amax(1)

    def scores(x):
        with torch.no_grad():
            n = norms(x)
        return torch.cat([n, out(x)[None]]).detach().numpy()

    z = normalise(scores(images), compute_id_statistics(scores(id_images), 1, 99.9))
    return fuse(z[[6, 8]], z[[0, 1, 2, 3, 4, 5, 7]])


@pytest.mark.parametrize(
    ("output", "react"), [("msp", 90.0), ("mls", None), ("energy", 90.0), ("odin", 90.0)]
)
def test_equals_the_published_separate_passes(net, output, react):
    loader = make_loader()
    id_images = torch.cat([images for images, _ in loader])
    detector = published(net, output=output, react_percentile=react).fit(loader)
    temperature = 1000 if output == "odin" else 1
    expected = separate_passes(net, id_images, IMAGES, output, react, temperature, 0.01)
    np.testing.assert_allclose(detector.score(IMAGES), expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize(("make", "output"), [(FuseNorm, "energy"), (published, "odin")])
def test_batch_size_memory_format_and_grad_mode_change_nothing(net, output, make):
    scores = make(net, output=output).fit(make_loader(batch_size=60)).score(IMAGES)
    detector = make(net, output=output).fit(make_loader(batch_size=7))
    close = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(
        torch.cat([detector.score(i) for i in IMAGES.split(2)]), scores, **close
    )
    nhwc = IMAGES.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(detector.score(nhwc), scores, **close)
    with torch.no_grad():
        torch.testing.assert_close(detector.score(IMAGES), scores, **close)
    with torch.inference_mode():
        torch.testing.assert_close(detector.score(IMAGES.clone()), scores, **close)


def test_the_confidence_is_its_formula(net, loader):
    detector = FuseNorm(net, strong=("output", "knn", "mds++")).fit(loader)
    known, in_sample = detector.id_statistics_.id_scores, detector.infer(loader).experts
    scores = detector.infer(make_loader(seed=5, scale=1.2)).experts
    high = np.percentile(known[8:], 95, axis=1)[:, None]
    of_id, strong = (np.minimum(x[8:], high) for x in (known, scores))
    z = (strong - of_id.mean(1, keepdims=True)) / of_id.std(1, keepdims=True)
    pairs = zip(known[8:], in_sample[8:], strict=True)
    weights = [max(0, spearmanr(*pair).statistic) for pair in pairs]
    apart, distance = left_out(known[:8]), log_m(known[:8], scores[:8])
    penalty = np.minimum(10, np.exp((distance - apart.mean()) / apart.std() - 3))
    assert (strong == high).any()  # the clip matters
    assert min(weights) < 0.995  # and the trust
    assert (penalty > 0.5).any()
    expected = np.average(z, axis=0, weights=weights) - penalty
    np.testing.assert_allclose(detector.confidence(scores), expected, rtol=1e-4, atol=1e-4)


def test_strong_experts_by_number_name_and_default(net):
    known = read_structure(net, torch.randn(2, 3, 32, 32))

    def strong(strong, **settings):
        return FuseNorm(net, structure=known, strong=strong, **settings).strong

    assert FuseNorm(net, structure=known).strong == ("output", "logitgap", "fdbd", "head_mds")
    assert strong("auto") == ("layer4.0", "output")
    assert strong("auto", taps="stages") == ("layer4.1", "output")
    assert strong(["knn", "energy"]) == ("knn", "output")
    detector = FuseNorm(net, structure=known, strong=["knn", "energy"])
    assert detector.experts[-2:] == ("output", "knn")
    assert strong([2, "layer1.0"]) == ("layer2.0", "layer1.0")
    with pytest.raises(ConfigError, match="must name each expert once"):
        strong([2, "layer2.0"])
    with pytest.raises(ConfigError, match="strong expert 8 is out of range: there are 8 taps"):
        strong([8])
    with pytest.raises(
        ConfigError, match=r"'layer5\.0' .*'energy' .*'layer4\.0'.*layer1\.0, .*knn"
    ):
        strong(["layer5.0"])
    with pytest.raises(ConfigError, match=r"expert 'msp' with .*, or set output='msp'"):
        strong(["msp"])


def test_nothing_runs_before_the_first_images():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

        def forward(self, x):
            raise AssertionError("the network ran")

    net = Fails()
    detector = FuseNorm(net)
    assert detector.taps == detector.strong == detector.experts == ()
    assert FuseNorm(net, taps=["conv"], strong="auto").taps == ("conv",)
    detector = FuseNorm(net, taps=["conv"], strong=["output", 0, "knn"])
    assert detector.strong == ("output", "conv", "knn")
    assert detector.experts == ("conv", "output", "knn")
    ScoreBank(net, [Settings(), Settings(taps="stages")])
    for wrong in (
        {"taps": ["stem"]},
        {"strong": ["stem"]},
        {"strong": ["msp"]},
        {"taps": ["conv"], "strong": [1]},
        {"taps": ["conv"], "strong": ["fc"]},
        {"taps": ["conv", "module.conv"]},
    ):
        with pytest.raises((ConfigError, TapError)):
            FuseNorm(net, **wrong)


def test_settings_can_be_given_as_an_object_or_by_name(net):
    settings = Settings(alpha=0.5)
    assert FuseNorm(net, settings, base=5).settings == Settings(alpha=0.5, base=5)
    with pytest.raises(ConfigError, match=r"unknown setting 'alhpa' .*: choose from taps"):
        FuseNorm(net, alhpa=0.5)


def test_companions_take_no_part_in_the_fusion(net, loader):
    for make, experts in ((published, 9), (FuseNorm, 12)):
        plain = make(net, react_percentile=90.0).fit(loader).infer(loader)
        detector = make(net, react_percentile=90.0).with_companions().fit(loader)
        compared = detector.infer(loader)
        np.testing.assert_allclose(compared.conf, plain.conf)
        np.testing.assert_allclose(compared.experts[:experts], plain.experts)
        companions = ("msp", "mls", "energy", "msp+react", "mls+react", "energy+react")
        shown = companions if make is published else companions[:-1]  # `output` is energy+react
        assert detector.row_names[experts:] == shown
        logits = net(torch.cat([images for images, _ in loader])).detach()
        np.testing.assert_allclose(compared.experts[experts + 1], logits.amax(1), rtol=1e-5)
    labels = [score.label for score in FuseNorm(net).with_companions().companions]
    assert labels == ["msp", "mls"]  # `output` is energy


def test_a_detector_and_its_statistics_can_be_pickled(net, loader):
    detector = FuseNorm(net).fit(loader)
    scores = detector.score(IMAGES)
    assert torch.equal(pickle.loads(pickle.dumps(detector)).score(IMAGES), scores)
    statistics = pickle.loads(pickle.dumps(detector.id_statistics_))
    assert torch.equal(FuseNorm(net).with_statistics(statistics).score(IMAGES), scores)
    with pytest.raises(ConfigError, match="fit again"):
        FuseNorm(net, taps="stages").with_statistics(statistics)


def test_scoring_before_fitting_is_an_error(net, loader):
    detector = FuseNorm(net)
    for score, given in (
        (detector.score, IMAGES),
        (detector.expert_scores, IMAGES),
        (detector.score_loader, loader),
        (detector.infer, loader),
    ):
        with pytest.raises(NotFittedError, match="call fit"):
            score(given)


@pytest.mark.parametrize("empty", [[], [(torch.empty(0, 3, 16, 16), torch.empty(0))]])
@pytest.mark.parametrize("react", [90.0, None])
def test_an_empty_loader_is_an_error(net, loader, empty, react):
    with pytest.raises(DataError, match="loader"):
        FuseNorm(net, react_percentile=react).fit(empty)
    with pytest.raises(DataError, match="loader must give at least one image, got none"):
        FuseNorm(net, react_percentile=react).fit(loader).score_loader(empty)


KIND = r"images must be a floating-point tensor \[B, C, H, W\], got"


@pytest.mark.parametrize("images", [IMAGES[0, 0], IMAGES.numpy()])
def test_images_of_another_kind_are_an_error(fitted, images):
    with pytest.raises(DataError, match=KIND):
        fitted.score(images)
    with pytest.raises(DataError, match="preprocessed"):
        fitted.score((IMAGES * 9).to(torch.uint8))


@pytest.mark.parametrize(("output", "bad"), [("energy", float("nan")), ("odin", float("inf"))])
def test_non_finite_images_are_reported(net, loader, output, bad):
    detector = FuseNorm(net, output=output).fit(loader)
    images = IMAGES.clone()
    images[3, 0, 2, 2] = bad
    before = state_of(net)
    with pytest.raises(
        NonFiniteError, match=r"image 3 of the batch .* the image itself contains NaN"
    ):
        detector.score(images)
    for react in (90.0, None):
        with pytest.raises(NonFiniteError, match=r"image 3 .* the image itself"):
            FuseNorm(net, output=output, react_percentile=react).fit([images])
    assert_undisturbed(net, before)


def test_non_finite_features_are_reported(net, loader):
    with torch.no_grad():
        net.layer3[0].conv1.weight *= float("nan")
    with pytest.raises(NonFiniteError, match=r"image 0 of .* 'layer3\.0'; the image is finite"):
        FuseNorm(net).fit(loader)
    with pytest.raises(NonFiniteError, match=r"penultimate feature .* the image is finite"):
        published(net).fit(loader)


def test_forward_passes_are_shared(net, loader):
    """One pass for the experts without a gradient; ODIN adds one for its perturbed images."""
    calls = []

    def note(module, args, output):
        if len(args[0]) > 2:  # not the passes by which the network is understood
            calls.append(1)

    handle = net.conv1.register_forward_hook(note)
    for output, passes in (("energy", 1), ("odin", 2)):
        calls.clear()
        detector = FuseNorm(net, output=output).fit(loader)
        assert len(calls) == passes * len(loader)
        calls.clear()
        detector.score(IMAGES)
        assert len(calls) == passes
    handle.remove()


def test_fit_keeps_no_feature_map(net):
    """Statistics hold one number per expert and image, and what experts fit."""
    width = net.fc.in_features
    for strong, rest in ((["energy"], 0), (("output", "fdbd", "mds++"), 8 * width * (width + 8))):
        statistics = FuseNorm(net, strong=strong).fit(make_loader(64)).id_statistics_
        assert statistics.id_scores.shape == (8 + len(strong), 64)
        held = len(pickle.dumps(replace(statistics, network=None)))
        assert held < 8 * (8 + len(strong)) * 64 + rest + 12_000


def test_a_cpu_processes_four_large_images_per_thread_and_a_device_whole_batches():
    images = torch.empty(3, 3, 1000, 1000, device="meta")
    assert [len(part) for part in parts(images)] == [3]
    assert len(parts(images[:0])) == 1
    images = torch.empty(1, 1, 1, 1).expand(5 * torch.get_num_threads(), 3, 1000, 1000)
    assert len(parts(images)) == 2
    assert len(parts(images, with_graph=True)) == 3


def test_a_batch_larger_than_one_part_is_scored_completely(net, loader):
    at_once = torch.get_num_threads() * PIXELS // 16**2
    images = torch.randn(2 * at_once + 1, 3, 16, 16)
    for largest, with_graph in ((at_once, False), (at_once // 2, True)):
        sizes = [len(part) for part in parts(images, with_graph=with_graph)]
        assert sum(sizes) == len(images)
        assert max(sizes) <= largest
        assert min(sizes) >= max(sizes) - 1 > 1
    detector = FuseNorm(net, output="odin").fit(loader)
    by_parts = torch.cat([detector.score(part) for part in images.split(50)])
    torch.testing.assert_close(detector.score(images), by_parts, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_host_waits_for_the_device_only_where_scores_are_read(net, loader):
    detector, images = FuseNorm(net.cuda(), output="energy").fit(loader), IMAGES.cuda()
    detector.score(images)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        detector.scoring()(images).matrix(detector.rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("temperature", [0.5, 5.0])
def test_the_temperature_reaches_the_output_expert(net, loader, temperature):
    with torch.no_grad():
        logits = net(IMAGES).double() / temperature
    p = logits.softmax(1).amax(1)
    expected = {"energy": temperature * logits.logsumexp(1), "msp": (p / (1 - p)).log()}
    for output, scores in expected.items():
        detector = FuseNorm(net, output=output, strong=["output"], temperature=temperature)
        found = detector.fit(loader).infer([IMAGES]).experts[8]
        np.testing.assert_allclose(found, scores, rtol=1e-4, atol=1e-5)
