"""Gradients with respect to the images, through networks that are left unchanged."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fusenorm_openood import FuseNorm, Settings
from fusenorm_openood.detectors.single import SingleScore
from fusenorm_openood.errors import TapError
from fusenorm_openood.forward.gradient import ConstantBatchNorm
from tests.conftest import make_net
from tests.nets import BLOCKS, Custom, Foo, Net, energies, some_images, within

IMAGES = some_images()
LAYERS = {"taps": ["b.0"], "strong": ["output"]}  # no graph is read, and odin is the only score


def backward(net: nn.Module, images: torch.Tensor, constant: bool):
    """Logits, gradient with respect to the images, and bytes that the graph saves."""
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    leaf = images.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if constant:
            with ConstantBatchNorm():
                logits = net(leaf)
        else:
            logits = net(leaf)
    (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum(), leaf)
    return logits.detach(), gradient, sum(kept.values())


def assert_same(net, images):
    """Bytes of the graph without and with constant batch norm, whose gradients are the same."""
    logits, gradient, kept = backward(net, images, constant=False)
    same, close, fewer = backward(net, images, constant=True)
    assert torch.equal(same, logits)
    torch.testing.assert_close(close, gradient)
    return kept, fewer


def test_gradients_are_the_same_and_the_graph_is_smaller():
    kept, fewer = assert_same(make_net().requires_grad_(False), torch.randn(5, 3, 16, 16))
    assert fewer < 0.7 * kept


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(3, affine=False),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.BatchNorm2d(3).bfloat16(),
        nn.BatchNorm2d(3).train(),
        nn.GroupNorm(1, 3),
    ],
    ids=str,
)
def test_every_normalisation_layer_keeps_its_gradient(norm):
    images = torch.randn(4, 3, 8, 8).to(next(norm.parameters(), torch.empty(0)).dtype)
    norm.training = norm.training and norm.affine and norm.weight.dtype == torch.float32
    assert_same(nn.Sequential(norm, nn.Flatten()).requires_grad_(False), images)


def test_odin_computes_no_weight_gradients():
    net, modes, built = Net(), [], []
    detector = FuseNorm(net, **LAYERS, output="odin").fit([IMAGES])
    net.a.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    for p in net.parameters():
        p.register_hook(built.append)
    detector.score(IMAGES)
    assert modes == [True, False]  # first the images' gradient, then none
    assert not built
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    net(IMAGES).sum().backward()
    assert len(built) == len(list(net.parameters()))  # the hooks do work


def in_place():
    return Custom(lambda net, x: Net.forward(net, x.sub_(0.5).div_(0.25)))


def out_of_place():
    return Custom(lambda net, x: Net.forward(net, (x - 0.5) / 0.25))


class Recomputing(Net):
    """A network with batch normalisation that recomputes its stages in the backward pass."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.norm, self.use_reentrant = nn.BatchNorm2d(8), use_reentrant
        self.eval()

    def forward(self, x):
        x = self.stem(x)
        for stage in (lambda x: self.norm(self.a(x)), self.b):
            if self.use_reentrant is None:
                x = stage(x)
            else:
                x = checkpoint(stage, x, use_reentrant=self.use_reentrant)
        return self.fc(x.mean((2, 3)))


def odin_by_hand(net, noise=0.02, temperature=10.0):
    """Probability of the predicted class after ODIN's step, in plain torch."""
    leaf = IMAGES.clone().requires_grad_()
    with torch.enable_grad():
        logits = net(leaf.clone())
        F.cross_entropy(logits / temperature, logits.argmax(1), reduction="sum").backward()
    moved = IMAGES - noise * torch.where(leaf.grad >= 0, 1.0, -1.0).to(IMAGES.dtype)
    with torch.no_grad():
        return (net(moved) / temperature).softmax(1).amax(1)


def odin(net):
    return SingleScore(net, "odin", temperature=10.0, noise=0.02)


def test_gradients_through_recomputed_layers():
    net, expected = Recomputing(use_reentrant=False), odin_by_hand(Recomputing(None))
    for _ in range(2):  # the second time, it is known that the network recomputes
        torch.testing.assert_close(odin(net).score(IMAGES), expected)
    settings = Settings.published(strong=["output", "b.1"])
    detector = FuseNorm(net, settings).fit([IMAGES])
    assert detector.taps == BLOCKS
    plain = FuseNorm(Recomputing(None), settings).fit([IMAGES])
    torch.testing.assert_close(detector.score(IMAGES), plain.score(IMAGES))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_recomputation_is_one_error():
    net = Recomputing(use_reentrant=True)
    with pytest.raises(TapError, match=r"use_reentrant=False.*choose output='energy'") as caught:
        odin(net).score(IMAGES)
    assert "\n" not in str(caught.value)
    with pytest.raises(TapError, match="choose output='energy'"):
        FuseNorm(net, **LAYERS, output="odin").fit([IMAGES])
    detector = FuseNorm(net, taps=list(BLOCKS), strong=["output"]).fit([IMAGES])
    plain = FuseNorm(Recomputing(None), strong=["output"]).fit([IMAGES])
    torch.testing.assert_close(detector.score(IMAGES), plain.score(IMAGES))
    with pytest.raises(TapError, match="name the modules to tap"):  # Foo is no name of a block
        FuseNorm(net).fit([IMAGES])


def test_a_branch_of_reentrant_recomputation_is_a_branch():
    class Branch(Foo):
        def forward(self, x):
            return self.skip(x) + checkpoint(self.conv2, x, use_reentrant=True)

    net = Net()
    net.a = nn.Sequential(Branch(8), Branch(8))
    assert FuseNorm(net, strong=["output"]).fit([IMAGES]).taps == BLOCKS


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradients_in_any_grad_mode_and_with_frozen_weights(grad):
    expected = odin_by_hand(Net())
    for net in (Net(), Net().requires_grad_(False)):
        required = [p.requires_grad for p in net.parameters()]
        with grad():
            torch.testing.assert_close(odin(net).score(IMAGES.clone()), expected)
        assert [p.requires_grad for p in net.parameters()] == required


def made_in_inference_mode():
    with torch.inference_mode():
        return Net()


frozen = within(torch.no_grad, Net.feature)
NO_GRADIENT = {
    "frozen": lambda: Custom(lambda net, x: net.fc(frozen(net, x))),
    "detached": lambda: Custom(lambda net, x: net.fc(net.feature(x).detach())),
    "inference": lambda: Custom(within(torch.inference_mode)),
    "rounded": lambda: Custom(lambda net, x: Net.forward(net, (x * 255).to(torch.uint8) / 255.0)),
    "made in inference mode": made_in_inference_mode,
}


@pytest.mark.parametrize("kind", NO_GRADIENT)
def test_without_a_gradient_one_error_says_the_way_out(kind):
    net, images = NO_GRADIENT[kind](), IMAGES.abs()
    for use in (
        lambda: odin(net).score(images),
        lambda: FuseNorm(net, **LAYERS, output="odin").fit([images]),
    ):
        with pytest.raises(TapError, match="choose output='energy'") as caught:
            use()
        assert "\n" not in str(caught.value)
    found = FuseNorm(net, **LAYERS).fit([images]).infer([images]).experts[-1]
    right = energies(Net() if kind == "made in inference mode" else net, images)
    torch.testing.assert_close(torch.from_numpy(found), right)


def detectors_of(net):
    """A detector for each way in which images are given to a network."""
    yield from (SingleScore(net, name) for name in ("msp", "react"))
    yield odin(net)
    yield from (FuseNorm(net, Settings.published(output=name)) for name in ("energy", "odin"))


def test_a_network_that_changes_its_input_in_place_changes_no_images():
    before, images = IMAGES.clone(), IMAGES.clone()
    every = zip(
        detectors_of(in_place()),
        detectors_of(out_of_place()),
        strict=True,
    )
    for detector, expected in every:
        right = expected.fit([images]).score(images)
        torch.testing.assert_close(detector.fit([images]).score(images), right)
        torch.testing.assert_close(detector.score_loader([images]), right.double())
        assert torch.equal(images, before)
    torch.testing.assert_close(odin(in_place()).score(images), odin_by_hand(out_of_place()))
