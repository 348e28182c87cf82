"""What networks come wrapped in, T2FNorm networks inside others, and networks without hooks."""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from fusenorm_openood import FuseNorm, Settings, atf, tap_candidates
from fusenorm_openood.detectors.single import SingleScore
from fusenorm_openood.errors import FuseNormError, TapError
from fusenorm_openood.network import ResNet18_32x32, T2FNormNet
from fusenorm_openood.network.running import scoring_module, unwrapped
from tests.nets import BLOCKS, Custom, Net, energy_detector, norms_of, outputs_of, some_images

IMAGES = some_images(24, (16, 16))


@pytest.fixture(scope="module")
def gloo(tmp_path_factory):
    """A process group of this process alone."""
    distributed = torch.distributed
    if not distributed.is_available() or distributed.is_initialized():
        pytest.skip("needs a process group of its own")
    store = distributed.FileStore(str(tmp_path_factory.mktemp("gloo") / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def t2fnorm() -> T2FNormNet:
    torch.manual_seed(0)
    net = T2FNormNet(ResNet18_32x32(5, width=4), 5).eval()
    net.set_tau(0.1)
    with torch.no_grad():  # classes of scoring and of classification that differ
        net.backbone.fc.weight.mul_(10)
        net.backbone.fc.bias.copy_(torch.tensor([0.0, 2, -2, 1, -1]))
    return net


class Preprocessing(nn.Module):
    """Takes pixels in [0, 1] with another size, and returns classes beside the logits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x):
        x = F.interpolate((x - 0.1) / 0.5, (16, 16))
        return {"logits": self.net(x), "size": x.shape}


class ByKeyword(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images):
        return self.net(x=images)


def same(x):
    return x


WRAPPERS = {
    "DataParallel": (nn.DataParallel, same),
    "Sequential": (lambda net: nn.Sequential(nn.Identity(), net), same),
    "Sequential with Upsample": (
        lambda net: nn.Sequential(nn.Upsample(scale_factor=2), net),
        lambda x: F.interpolate(x, scale_factor=2),
    ),
    "preprocessing": (Preprocessing, lambda x: (x - 0.1) / 0.5),
    "by keyword": (ByKeyword, same),
    "nested": (lambda net: nn.DataParallel(nn.Sequential(nn.DataParallel(net))), same),
    "compiled": (lambda net: torch.compile(net, backend="eager"), same),
}


@pytest.fixture(scope="module")
def inner():
    return t2fnorm()


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapped_t2fnorm_network_scores_by_its_scoring_logits(kind, inner):
    wrap, before = WRAPPERS[kind]
    images = before(IMAGES)
    settings = {"strong": ["output", "fdbd"], "output": "energy", "taps": "stages"}
    expected = FuseNorm(inner, **settings).fit([images]).infer([images])
    scored = FuseNorm(wrap(inner), **settings).fit([IMAGES]).infer([IMAGES])
    with torch.no_grad():
        logits = inner.forward_ood_inference(images).double()
        classes = inner(images).argmax(1)
    np.testing.assert_allclose(scored.experts[-2], logits.logsumexp(1), rtol=1e-5)
    np.testing.assert_allclose(scored.experts, expected.experts, rtol=1e-4, atol=1e-6)
    assert scored.pred.tolist() == classes.tolist()
    assert (logits.argmax(1) != classes).any()
    pred, conf = SingleScore(wrap(inner), "t2fnorm").predict(IMAGES)
    torch.testing.assert_close(conf.double(), logits.softmax(1).amax(1))
    assert torch.equal(pred, classes)


def test_odin_steps_on_the_images_before_any_preprocessing(inner):
    leaf = IMAGES.clone().requires_grad_()
    with torch.enable_grad():
        logits = inner.forward_ood_inference((leaf - 0.1) / 0.5)
        F.cross_entropy(logits / 10, logits.argmax(1)).backward()
    moved = IMAGES - 0.02 * torch.where(leaf.grad >= 0, 1.0, -1.0)
    with torch.no_grad():
        p = (inner.forward_ood_inference((moved - 0.1) / 0.5) / 10).softmax(1).amax(1)
    got = SingleScore(Preprocessing(inner), "odin", temperature=10.0, noise=0.02).score(IMAGES)
    torch.testing.assert_close(got, p)


def test_a_network_that_does_not_call_its_scoring_module_is_one_error():
    with pytest.raises(TapError, match="does not call its module 'spare'"):
        FuseNorm(Custom(Net.forward, spare=t2fnorm())).fit([IMAGES])


def test_the_module_with_scoring_logits():
    net = t2fnorm()
    assert scoring_module(net) == ""
    assert scoring_module(nn.Sequential(net)) == "0"
    assert scoring_module(net.backbone) is None


@pytest.mark.parametrize("kind", ["DistributedDataParallel", "nested"])
def test_wrappers_of_torch_change_nothing(kind, request):
    net = Net()
    if kind == "DistributedDataParallel":
        request.getfixturevalue("gloo")
        wrapped = nn.parallel.DistributedDataParallel(net)
    else:
        wrapped = WRAPPERS[kind][0](net)
    settings = Settings.published(strong=["output", 2])
    expected = FuseNorm(net, settings).fit([IMAGES])
    detector = FuseNorm(wrapped, settings).fit([IMAGES])
    assert expected.taps == BLOCKS
    assert [tap.removeprefix("0.module.") for tap in detector.taps] == list(BLOCKS)
    torch.testing.assert_close(detector.score(IMAGES), expected.score(IMAGES))


def traced(net):
    return torch.jit.trace(net, IMAGES)


def exported(net):
    return torch.export.export(net, (IMAGES,)).module()


NO_HOOKS = {
    "scripted": lambda: torch.jit.script(Net()),
    "traced": lambda: traced(Net()),
    "exported": lambda: exported(Net()),
    "inside": lambda: nn.DataParallel(torch.jit.script(Net())),
}


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
@pytest.mark.parametrize("kind", NO_HOOKS)
def test_networks_whose_modules_run_no_hooks_are_one_error(kind):
    net = NO_HOOKS[kind]()
    for use in (
        lambda: FuseNorm(net),
        lambda: tap_candidates(net, IMAGES),
        lambda: SingleScore(net, "msp").score(IMAGES),
    ):
        with pytest.raises(TapError, match="give the network that it was made from"):
            use()


@pytest.mark.parametrize("net", [lambda x: x.mean((2, 3)), None, {"model": Net()}], ids=type)
def test_what_is_no_module_is_one_error(net):
    with pytest.raises(TapError, match=rf"must be a torch.nn.Module, got {type(net).__name__}"):
        FuseNorm(net)


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_module_is_a_part_of_the_module_around_it():
    net = Net()
    net.a[0] = torch.jit.script(net.a[0])
    net.b[1].conv2 = torch.jit.script(net.b[1].conv2)
    detector = FuseNorm(net, strong=["output"]).fit([IMAGES])
    assert detector.taps == ("a.1", "b.0", "b.1")
    assert torch.isfinite(detector.score(IMAGES)).all()
    with pytest.raises(TapError, match="name the modules to tap"):
        FuseNorm(nn.Sequential(torch.jit.script(Net()), nn.Identity())).fit([IMAGES])


def test_a_graph_module_of_fx_works():
    net, taps = torch.fx.symbolic_trace(Net()), ["stem", "a.0.conv2", "b.1.conv2"]
    expected = FuseNorm(Net(), taps=taps, react_percentile=90.0).fit([IMAGES])
    detector = FuseNorm(net, taps=taps, react_percentile=90.0).fit([IMAGES])
    torch.testing.assert_close(detector.score(IMAGES), expected.score(IMAGES))
    # Its blocks are no modules, and the value of the last one is read by none.
    alone = energy_detector(net, IMAGES)
    norms = norms_of(Net(), BLOCKS[:3], IMAGES).double()
    torch.testing.assert_close(torch.tensor(alone.infer([IMAGES]).experts[:3]), norms)
    assert len(alone.taps) == 3
    assert "b.1.conv1" in alone.known_structure.notes[0]


def test_unwrapping():
    net = Net()
    assert unwrapped(net) is net
    assert unwrapped(nn.DataParallel(torch.compile(nn.DataParallel(net), backend="eager"))) is net


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_network_of_torchvision_is_tapped():
    engines = torch.backends.quantized.supported_engines
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = next(e for e in reversed(engines) if e != "none")
    try:
        torch.manual_seed(0)
        net = torchvision.models.quantization.resnet18(quantize=True, num_classes=5).eval()
        blocks = tuple(f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1))
        with pytest.raises(FuseNormError, match="gradient"):
            FuseNorm(net, strong=["output"], output="odin").fit([IMAGES[:4]])
        detector = FuseNorm(net, strong=["output"], output="energy").fit([IMAGES])
        assert detector.taps == blocks
        with torch.no_grad():
            torch.testing.assert_close(SingleScore(net, "mls").score(IMAGES), net(IMAGES).amax(1))
        maps = [x.dequantize() for x in outputs_of(net, blocks, IMAGES)]
        right = torch.stack([atf(x) for x in maps]).double()
        torch.testing.assert_close(torch.tensor(detector.infer([IMAGES]).experts[:8]), right)
    finally:
        torch.backends.quantized.engine = before


def test_any_network_may_have_separate_scoring_logits():
    net = Net()
    net.forward_ood_inference = lambda x: -net(x)
    with torch.no_grad():
        logits = net(IMAGES)
    pred, conf = SingleScore(net, "mls").predict(IMAGES)
    torch.testing.assert_close(conf, (-logits).amax(1))
    assert torch.equal(pred, logits.argmax(1))
