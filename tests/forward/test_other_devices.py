"""Devices that this machine lacks: the scores are those of the CPU, live and from a store.

Tensors of two devices never meet, and on Apple's MPS there is no float64; see `StandIn`.
"""

from functools import partial

import pytest
import torch

from fusenorm_openood import FuseNorm, Settings
from fusenorm_openood.detectors.bank import ScoreBank
from fusenorm_openood.detectors.single import SingleScore
from fusenorm_openood.evaluation.runs import StoredNetwork
from fusenorm_openood.forward.passes import head_of
from fusenorm_openood.forward.recorded import RecordedLoader
from fusenorm_openood.method.scores import POSTHOC, make_score
from fusenorm_openood.method.scores.base import Head
from fusenorm_openood.network.running import LazyNetwork
from fusenorm_openood.network.understanding import understand
from tests.nets import CLASSES, Net, listed, some_images
from tests.standin import StandIn

DEVICES = {"mps": False, "xpu": True}
FUSED = {
    "default": Settings(),
    "published": Settings.published(),
    "joint": Settings.deviation(),
    "react": Settings(react_percentile=80, strong=("output", "nci")),
    "odin in units of pixels": Settings(output="odin", input_std=(0.2, 0.3, 0.4)),
    "norms alone": Settings(strong=(2,)),
    "gen alone": Settings(strong=("gen",)),
    "all": Settings(output="msp", strong=("output", *POSTHOC)),
}
SINGLE = ["msp", "odin", "react", "knn", "nci", "she"]  # the others are in "all"
MAKE = {
    **{name: partial(FuseNorm, settings=settings) for name, settings in FUSED.items()},
    **{f"single {name}": partial(SingleScore, score=name) for name in SINGLE},
}
# Another device with float64 has no more than one of the cases.
CASES = [("mps", name) for name in MAKE] + [("xpu", "default")]
FIT, IMAGES = some_images(40, seed=2), some_images(9)
LABELLED = [(part, torch.arange(len(part)) % CLASSES) for part in FIT.split(20)]
everywhere = pytest.mark.parametrize("device", DEVICES, indirect=True)


@pytest.fixture
def device(request):
    """A device that exists in the test."""
    with StandIn(request.param, DEVICES[request.param]):
        yield torch.device(request.param)


@pytest.fixture(autouse=True)
def _no_kernel(monkeypatch):
    monkeypatch.setenv("FUSENORM_KERNEL", "torch")


def recorded(images, folder, name):
    return RecordedLoader(listed(images), folder, {}, name, 20)


def close(found, expected):
    found, expected = (torch.as_tensor(x).cpu().double() for x in (found, expected))
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("device", "name"), CASES, indirect=["device"])
def test_scores_are_those_of_the_cpu(name, device, tmp_path):
    expected = MAKE[name](Net()).fit(LABELLED).score(IMAGES)
    net, there = Net().to(device), IMAGES.to(device)
    found = MAKE[name](net).fit(LABELLED)
    conf = found.score(there)
    assert conf.device == found.predict(there)[0].device == device
    ways = conf, found.score_loader([IMAGES]), found.score(there[0])
    for given in ways if name in ("default", "single odin") else ways[:1]:
        close(given, expected[: given.numel()].view(given.shape))
    fit, test = recorded(FIT, tmp_path, "fit"), recorded(IMAGES, tmp_path, "test")
    found = MAKE[name](net).fit(fit)
    close(found.infer(test).conf, expected)
    # A head that was kept in a store is on the CPU; images that are new are not.
    structure = understand(net, there)
    known = StoredNetwork(structure, Head(*map(torch.Tensor.cpu, head_of(net, structure))))
    again = MAKE[name](LazyNetwork(lambda: Net().to(device), known)).fit(fit)
    close(again.infer(test).conf, expected)
    close(again.score(IMAGES), expected)


REAL = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()


@pytest.mark.skipif(not REAL, reason="no GPU")
@pytest.mark.parametrize("name", MAKE)
def test_scores_of_a_real_device_are_those_of_the_cpu(name):
    expected = MAKE[name](Net()).fit(LABELLED).score(IMAGES)
    found = MAKE[name](Net().to(REAL[0])).fit(LABELLED).score(IMAGES).double()
    torch.testing.assert_close(found, expected.double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("device", ["mps"], indirect=True)
def test_a_bank_scores_everything(device, tmp_path):
    scores = [make_score(name) for name in POSTHOC]
    bank, plain = (
        ScoreBank(net, FUSED.values(), scores, True).fit(LABELLED)
        for net in (Net().to(device), Net())
    )
    live, loader = [IMAGES], recorded(IMAGES, tmp_path, "images")
    for given in (live, loader):
        bank.add(given)
    plain.add(live)
    for settings in FUSED.values():
        expected = plain.scored(settings, live).conf
        close(bank.scored(settings, live).conf, expected)
        close(bank.scored(settings, loader).conf, expected)


@pytest.mark.parametrize("device", ["mps"], indirect=True)
def test_a_detector_moves_between_devices(device, tmp_path):
    images, fit, other = (some_images(40, seed=s) for s in range(3))
    plain = FuseNorm(Net()).fit([fit], calibration=[other])
    found = FuseNorm(Net().to(device)).fit([fit.to(device)], calibration=[other.to(device)])
    there = images.to(device)
    close(found.p_values(there), plain.p_values(images))
    assert found.is_ood(there).device == device
    assert torch.equal(found.is_ood(there).cpu(), plain.is_ood(images))
    explained, expected = found.explain(there), plain.explain(images)
    close(explained.contributions, expected.contributions)
    for layer, heat in explained.maps.items():
        close(heat, expected.maps[layer])
    found.save(tmp_path / "it")
    loaded = FuseNorm.load(tmp_path / "it", Net())
    close(loaded.score(images), plain.score(images))
    close(loaded.to(device).score(there), plain.score(images))
    close(loaded.to("cpu").score(images), plain.score(images))


@pytest.mark.slow
def test_a_detector_is_exported_from_any_device(tmp_path):
    with StandIn("mps"):
        detector = FuseNorm(Net().to("mps"), strong=("output",)).fit([FIT])
        detector.export(tmp_path / "it.pt2", shape=(3, 12, 12))


def test_the_stand_in_is_as_strict_as_a_device():
    with StandIn("mps"):
        there, double = torch.ones(2, device="mps"), torch.ones(2, dtype=torch.float64)
        for call in (
            lambda: there + torch.ones(2),
            lambda: there.double(),
            lambda: there.to("cpu", torch.float64),
            lambda: there.numpy(),
            lambda: torch.zeros(2, dtype=torch.float64, device="mps"),
            lambda: double.to("mps"),
        ):
            with pytest.raises((RuntimeError, TypeError)):
                call()
        assert (there + torch.tensor(1.0)).cpu().double().tolist() == [2.0, 2.0]
