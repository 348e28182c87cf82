"""Networks told from each other by modules, weights and what they compute."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor

from fusenorm_openood import FuseNorm, FuseNormPostprocessor
from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.deployment.files import network_key
from fusenorm_openood.detectors.single import SingleScore
from fusenorm_openood.errors import ConfigError, DetectorFileError
from fusenorm_openood.network.fingerprint import EXACT, fingerprint, identify, is_network
from tests.nets import Custom, Net, some_images
from tests.without_openood.test_postprocessor import config

IMAGES, NEW = some_images(30), some_images(4, seed=2)
SIZE = Preprocessing(12, (12, 12), "bilinear", (0.5,) * 3, (0.25,) * 3)


class Stem(Net):
    """A network whose forward depends on what no module and no weight says."""

    def __init__(self, act=F.relu, seed=0):
        super().__init__(seed)
        self.act = act

    def feature(self, x):
        return self.b(self.a(self.act(self.stem(x)))).mean((2, 3))


def test_what_only_bright_images_show_is_another_forward():
    plain, clamped = (
        Custom(Net.forward),
        Custom(lambda net, x: Net.forward(net, x.clamp(-2.1, 2.6))),
    )
    assert not is_network(clamped, identify(plain, (3, 12, 12)))


FORWARDS = [F.gelu, F.leaky_relu, torch.abs]


@pytest.mark.parametrize("act", FORWARDS)
def test_another_forward_is_another_network(act, tmp_path):
    net, other = Stem(), Stem(act)
    detector = FuseNorm(net).fit([IMAGES])
    detector.save(tmp_path / "d")
    with pytest.raises(DetectorFileError, match="computes other logits"):
        FuseNorm.load(tmp_path / "d", other)
    with pytest.warns(UserWarning, match="computes other logits"):
        FuseNorm.load(tmp_path / "d", other, strict=False)
    with pytest.raises(ConfigError, match="another forward: fit again"):
        FuseNorm(other).with_statistics(detector.id_statistics_)
    assert FuseNorm(Stem()).with_statistics(detector.id_statistics_).is_fitted
    records = [network_key(n, SIZE, tmp_path / "store") for n in (net, other, Stem(), Stem(act))]
    assert records[0] == records[2] != records[1] == records[3]


def test_rounding_of_another_machine_is_the_same_network():
    known = identify(Net(), (3, 12, 12))
    logits = torch.tensor(known.logits)
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).clamp(-3, 3) / 3
    there = logits + 0.9 * EXACT * noise * (logits.max() - logits.min())
    assert known.agrees(known._replace(logits=tuple(map(tuple, there.tolist()))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_network_in_another_precision_is_its_own(dtype):
    net = Net().to(dtype)
    known = identify(net, (3, 12, 12))
    assert known.logits
    assert is_network(nn.DataParallel(net), known)
    assert known.agrees(identify(Net(), (3, 12, 12))._replace(rounding=0.02))


def test_the_configuration_of_modules_counts_and_what_training_alone_uses_does_not():
    def net(**changes):
        kinds = {"conv": nn.Conv2d(3, 4, 3, padding=1), "act": nn.ReLU(), "drop": nn.Dropout(0.1)}
        torch.manual_seed(0)
        kinds |= {"bn": nn.BatchNorm2d(4, momentum=0.1), "pool": nn.AdaptiveAvgPool2d(1)}
        kinds = {**kinds, **changes}
        torch.manual_seed(0)
        kinds["conv"].reset_parameters()
        return nn.Sequential(*kinds.values()).eval()

    known = fingerprint(net())
    same = [net(act=nn.ReLU(inplace=True)), net(drop=nn.Dropout(0.5, inplace=True))]
    same += [net(bn=nn.BatchNorm2d(4, momentum=0.5))]
    assert {fingerprint(n).digest for n in same} == {known.digest}
    others = {
        "0": net(conv=nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")),
        "1": net(act=nn.GELU()),
        "3": net(bn=nn.BatchNorm2d(4, eps=1e-3)),
        "4": net(pool=nn.AdaptiveMaxPool2d(1)),
    }
    for name, other in others.items():
        assert fingerprint(other).weights == known.weights
        (said,) = fingerprint(other).differences(known)
        assert said.startswith(f"{name} is ")
        assert not is_network(other, known)
    assert fingerprint(net(act=nn.GELU("tanh"))).digest != fingerprint(others["1"]).digest


def test_the_logits_of_a_random_network_are_left_out():
    def noisy(x):
        return x + torch.randn_like(x)

    assert identify(Stem(noisy), (3, 12, 12)).logits == ()
    assert identify(Stem(noisy), (3, 12, 12)).digest == identify(Stem(noisy), (3, 12, 12)).digest


def test_weights_in_a_wrapper_class_are_saved(tmp_path):
    """As torchao's and FSDP2's, which have no bytes of their own."""
    net = Net()
    plain = net.fc.weight.detach()
    net.fc.weight = nn.Parameter(TwoTensor(plain, plain.clone()), requires_grad=False)
    known = fingerprint(net)
    assert [name for name in known.shapes if "fc" in name] == [
        "fc.weight.a",
        "fc.weight.b",
        "fc.bias",
    ]
    net.fc.weight = nn.Parameter(TwoTensor(plain, plain + 1), requires_grad=False)
    assert fingerprint(net).weights != known.weights


OTHERS = {
    "weights": lambda: Net(seed=3),
    "forward": lambda: Stem(torch.tanh),
    "structure": lambda: Custom(lambda net, x: {"logits": Net.forward(net, x), "other": x}),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_second_setup_with_another_network_fits_again(other):
    def postprocessor():
        return FuseNormPostprocessor(config(output="energy", noise=0.0))

    first, second = Net(), other()
    p, fresh = postprocessor(), postprocessor()
    loaders = {"val": [{"data": IMAGES, "label": torch.zeros(len(IMAGES))}]}
    p.setup(first, loaders)
    p.postprocess(first, NEW)
    p.setup(second, loaders)
    fresh.setup(second, loaders)
    for a, b in zip(p.postprocess(second, NEW), fresh.postprocess(second, NEW), strict=True):
        assert torch.equal(a, b)
    p.setup(first, loaders)  # and back
    fresh.setup(first, loaders)
    assert torch.equal(p.postprocess(first, NEW)[1], fresh.postprocess(first, NEW)[1])


def test_a_second_setup_with_the_same_network_and_new_weights_fits_again():
    net, p = Net(), FuseNormPostprocessor(config())
    loaders = {"val": [{"data": IMAGES, "label": torch.zeros(len(IMAGES))}]}
    p.setup(net, loaders)
    net.load_state_dict(Net(seed=5).state_dict())
    p.setup(net, loaders)
    fresh = FuseNormPostprocessor(config())
    fresh.setup(net, loaders)
    assert torch.equal(p.postprocess(net, NEW)[1], fresh.postprocess(net, NEW)[1])


def test_odin_of_a_network_that_mixes_images_is_kept_with_the_batch_size():
    mixing = Custom(lambda net, x: Net.forward(net, x) + x.mean())
    for net, mixes in ((Net(), False), (mixing, True)):
        detector = SingleScore(net, "odin", temperature=1000.0, noise=0.001)
        detector.structure(NEW)
        assert detector.scoring().record["batch_dependent"] is mixes
