"""Devices that this machine lacks: the scores are those of the CPU, live and from a store.

Tensors of two devices never meet, and on Apple's MPS there is no float64; see `StandIn`.
"""

import pickle
from functools import partial

import numpy as np
import pytest
import torch
from fusenorm_openood.detectors.baselines import Baseline
from fusenorm_openood.detectors.posthoc import PosthocBaseline
from fusenorm_openood.forward.panel import Fitted
from fusenorm_openood.method.posthoc import POSTHOC, Head, Posthoc, Seen
from torch.utils.data import Dataset

from fusenorm_openood import FuseNorm, Settings, atf
from fusenorm_openood.detectors.bank import ScoreBank
from fusenorm_openood.evaluation.records import Known
from fusenorm_openood.forward.react import head_of
from fusenorm_openood.forward.recorded import RecordedLoader
from fusenorm_openood.method.atf import atf_map
from fusenorm_openood.network.named import LazyNetwork
from fusenorm_openood.network.understanding import understand
from tests.nets import CLASSES, Net, some_images
from tests.standin import StandIn

DEVICES = {"mps": False, "xpu": True}
SINGLE = {
    "msp": {},
    "mls": {},
    "ebo": {"temperature": 2},
    "odin": {"temperature": 1000, "noise": 0.01},
    "react": {"percentile": 90},
}
FUSED = {
    "default": Settings(),
    "published": Settings.published(),
    "joint": Settings.joint(),
    "react": Settings(react_percentile=80, strong=("output", "nci")),
    "odin in units of pixels": Settings(output="odin", input_std=(0.2, 0.3, 0.4)),
    "norms alone": Settings(strong=(2,)),
    "gen alone": Settings(strong=("gen",)),
    "all": Settings(output="msp", strong=("output", *POSTHOC)),
}
MAKE = {
    **{name: partial(FuseNorm, settings=settings) for name, settings in FUSED.items()},
    **{f"single {name}": partial(Baseline, name=name, **args) for name, args in SINGLE.items()},
    **{f"single {name}": partial(PosthocBaseline, name=name) for name in POSTHOC},
}
CASES = [("mps", name) for name in MAKE]  # of which another device with float64 has no more
CASES += [("xpu", name) for name in ("default", "published", "norms alone", "single nci")]
everywhere = pytest.mark.parametrize("device", DEVICES, indirect=True)
of_each = pytest.mark.parametrize(("device", "name"), CASES, indirect=["device"])


@pytest.fixture
def device(request):
    """A device that exists in the test."""
    with StandIn(request.param, DEVICES[request.param]):
        yield torch.device(request.param)


@pytest.fixture(autouse=True)
def _no_kernel(monkeypatch):
    monkeypatch.setenv("FUSENORM_KERNEL", "torch")


class Images(Dataset):
    def __init__(self, images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> dict:
        return {"data": self.images[number], "label": number % CLASSES}


def labelled(images):
    return [(part, torch.arange(len(part)) % CLASSES) for part in images.split(10)]


def close(found, expected):
    found, expected = (torch.as_tensor(x).cpu().double() for x in (found, expected))
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@of_each
def test_scores_are_those_of_the_cpu(name, device):
    images, fit = some_images(9), labelled(some_images(40, seed=2))
    expected = MAKE[name](Net()).fit(fit)
    found = MAKE[name](Net().to(device)).fit(fit)
    there = images.to(device)
    conf = found.score(there)
    assert conf.device == found.predict(there)[0].device == device
    for given in (conf, found.score(images), found.score_loader([there]), found.score(there[0])):
        close(given, expected.score(images)[: given.numel()].view(given.shape))


@of_each
def test_recorded_scores_are_those_of_the_cpu(name, device, tmp_path):
    images = some_images(9)
    fit = RecordedLoader(Images(some_images(40, seed=2)), tmp_path, {}, "fit", 10)
    test = RecordedLoader(Images(images), tmp_path, {}, "test", 10)
    net = Net().to(device)
    found = MAKE[name](net).fit(fit)
    expected = MAKE[name](Net()).fit(labelled(some_images(40, seed=2))).score(images)
    close(found.infer(test).conf, expected)
    # A head that was kept in a store is on the CPU; images that are new are not.
    structure = understand(net, images.to(device))
    known = Known(structure, Head(*map(torch.Tensor.cpu, head_of(net, structure))))
    lazy = LazyNetwork(lambda: Net().to(device), known)
    again = MAKE[name](lazy).fit(fit)
    close(again.infer(test).conf, expected)
    close(again.score(images), expected)


REAL = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()


@pytest.mark.skipif(not REAL, reason="no GPU")
@pytest.mark.parametrize("name", MAKE)
def test_scores_of_a_real_device_are_those_of_the_cpu(name):
    images, fit = some_images(9), labelled(some_images(40, seed=2))
    expected = MAKE[name](Net()).fit(fit).score(images)
    found = MAKE[name](Net().to(REAL[0])).fit(fit).score(images).double()
    torch.testing.assert_close(found, expected.double(), rtol=1e-3, atol=1e-3)


@everywhere
def test_a_bank_scores_everything(device, tmp_path):
    images, fit = some_images(9), labelled(some_images(40, seed=2))
    experts = [Posthoc.of(name) for name in POSTHOC]
    bank, plain = (
        ScoreBank(net, FUSED.values(), (), experts, True).fit(fit)
        for net in (Net().to(device), Net())
    )
    found = [images, RecordedLoader(Images(images), tmp_path, {}, "images", 10)]
    for loader in ([images], found[1]):
        bank.add(loader)
        plain.add([images]) if loader is not found[1] else plain.add(loader := [images])
    for settings in FUSED.values():
        close(bank.scored(settings, found[1]).conf, plain.scored(settings, loader).conf)


@everywhere
def test_a_detector_moves_between_devices(device, tmp_path):
    images, fit, other = (some_images(40, seed=s) for s in range(3))
    plain = FuseNorm(Net()).fit([fit], calibration=[other])
    found = FuseNorm(Net().to(device)).fit([fit.to(device)], calibration=[other.to(device)])
    there = images.to(device)
    close(found.p_values(there), plain.p_values(images))
    assert found.is_ood(there).device == device
    assert torch.equal(found.is_ood(there).cpu(), plain.is_ood(images))
    close(found.explain(there).shares, plain.explain(images).shares)
    for tap, heat in found.explain(there[0]).maps.items():
        close(heat, plain.explain(images[0]).maps[tap])
    found.save(tmp_path / "it")
    loaded = FuseNorm.load(tmp_path / "it", Net())
    close(loaded.score(images), plain.score(images))
    close(loaded.to(device).score(there), plain.score(images))
    close(loaded.to("cpu").score(images), plain.score(images))


def test_a_detector_is_exported_from_any_device(tmp_path):
    with StandIn("mps"):
        detector = FuseNorm(Net().to("mps")).fit([some_images(40)])
        detector.export(tmp_path / "it.pt2", shape=(3, 12, 12))


@everywhere
def test_norms_and_heat_maps(device):
    x = some_images(4).relu()
    for norms in (atf(x.to(device), alpha=0.5), atf(x.to(device).bfloat16().float(), 1, 1)):
        assert (norms.device, norms.dtype) == (device, torch.float32)
    close(atf(x.to(device)), atf(x))
    close(atf_map(x.to(device)), atf_map(x))


@pytest.mark.parametrize("name", POSTHOC)
@pytest.mark.parametrize("of_a_fit", [False, True])
def test_an_expert_is_computed_where_the_feature_is(name, of_a_fit):
    generator = torch.Generator().manual_seed(0)
    feature, weight = (torch.randn(n, 6, generator=generator) for n in (40, 3))
    head, labels = Head(weight, weight[:, 0]), torch.arange(40) % 3
    seen, expert = Seen(feature, head(feature)), Posthoc.of(name)
    state = expert.fitted(POSTHOC[name].sums(seen, labels), seen, head)
    there = Seen(*(t.to("meta") for t in seen))
    arguments = dict(expert.arguments)
    if not of_a_fit:
        scores = POSTHOC[name].score(there, head, state, arguments)
    elif name == "mds":
        pytest.skip("counts images")
    else:
        scores = POSTHOC[name].score_fit(there, head, state, arguments, labels.to("meta"))
    assert (scores.device.type, scores.dtype, scores.shape) == ("meta", torch.float32, (40,))
    assert scores.shape == POSTHOC[name].score(seen, head, state, arguments).shape


@everywhere
def test_what_was_moved_to_a_device_is_not_pickled(device):
    expert = Posthoc.of("nci")
    fitted = Fitted({90.0: 1.0}, {expert: {"mean": torch.ones(2)}})
    assert fitted.state(expert, device) is fitted.state(expert, device)
    assert fitted.state(expert, device)["mean"].device == device
    copy = pickle.loads(pickle.dumps(fitted))
    assert (copy.thresholds, list(copy.states), copy._moved) == (fitted.thresholds, [expert], {})


def test_the_stand_in_is_as_strict_as_a_device():
    with StandIn("mps"):
        there = torch.ones(2, device="mps")
        for call in (
            lambda: there + torch.ones(2),
            lambda: there.double(),
            lambda: there.to("cpu", torch.float64),
            lambda: there.numpy(),
            lambda: torch.zeros(2, dtype=torch.float64, device="mps"),
            lambda: torch.ones(2, dtype=torch.float64).to("mps"),
        ):
            with pytest.raises((RuntimeError, TypeError)):
                call()
        assert torch.equal((there + torch.tensor(1.0)).cpu(), torch.full((2,), 2.0))
        assert np.array_equal(there.cpu().double().numpy(), np.ones(2))
