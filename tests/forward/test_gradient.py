import pytest
import torch
from fusenorm_openood.detectors.baselines import Baseline
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fusenorm_openood import FuseNorm, Settings
from fusenorm_openood.errors import TapError
from fusenorm_openood.forward.gradient import ConstantBatchNorm
from tests.conftest import make_loader, make_net
from tests.nets import BLOCKS, Foo, Net, energies, some_images


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


def test_outputs_and_gradients_are_the_same_and_the_graph_is_smaller():
    net, images = make_net().requires_grad_(False), torch.randn(5, 3, 16, 16)
    logits, gradient, kept = backward(net, images, constant=False)
    same, close, fewer = backward(net, images, constant=True)
    assert torch.equal(same, logits)
    torch.testing.assert_close(close, gradient)
    assert fewer < 0.7 * kept


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(3, affine=False),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.BatchNorm2d(3).bfloat16(),
        nn.GroupNorm(1, 3),
    ],
)
def test_every_normalisation_layer_keeps_its_gradient(norm):
    images = torch.randn(4, 3, 8, 8).to(next(norm.parameters(), torch.empty(0)).dtype)
    net = nn.Sequential(norm, nn.Flatten()).eval().requires_grad_(False)
    logits, gradient, _ = backward(net, images, constant=False)
    same, close, _ = backward(net, images, constant=True)
    assert torch.equal(same, logits)
    torch.testing.assert_close(close, gradient)


def test_training_mode_is_unaffected():
    net, images = make_net().train(), torch.randn(5, 3, 16, 16)
    _, gradient, _ = backward(net, images, constant=False)
    torch.testing.assert_close(backward(net, images, constant=True)[1], gradient)


def test_odin_computes_no_weight_gradients():
    net, modes, built = make_net().requires_grad_(True), [], []
    detector = FuseNorm(net, output="odin").fit(make_loader())
    net.layer1.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    for p in net.parameters():
        p.register_hook(built.append)
    images = torch.randn(2, 3, 16, 16)
    detector.score(images)
    assert modes == [True, False]  # first the images' gradient, then none
    assert not built
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    net(images).sum().backward()
    assert len(built) == len(list(net.parameters()))  # the hooks do work


class InPlaceNormalisation(Net):
    def forward(self, x):
        return super().forward(x.sub_(0.5).div_(0.25))


class Normalisation(Net):
    def forward(self, x):
        return super().forward((x - 0.5) / 0.25)


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


class Frozen(Net):
    def feature(self, x):
        with torch.no_grad():
            return super().feature(x)


class Detached(Net):
    def feature(self, x):
        return super().feature(x).detach()


class Inference(Net):
    def forward(self, x):
        with torch.inference_mode():
            return super().forward(x)


class Rounded(Net):  # images of eight bits
    def forward(self, x):
        return super().forward((x * 255).to(torch.uint8) / 255.0)


def odin_by_hand(net, images, noise=0.02, temperature=10.0):
    """Probability of the predicted class after ODIN's step, in plain torch."""
    leaf = images.clone().requires_grad_()
    with torch.enable_grad():
        logits = net(leaf.clone())
        F.cross_entropy(logits / temperature, logits.argmax(1), reduction="sum").backward()
    moved = images - noise * torch.where(leaf.grad >= 0, 1.0, -1.0).to(images.dtype)
    with torch.no_grad():
        return (net(moved) / temperature).softmax(1).amax(1)


def odin(net):
    return Baseline(net, "odin", temperature=10.0, noise=0.02)


@pytest.mark.parametrize("use_reentrant", [False, None])
def test_gradients_through_recomputed_layers(use_reentrant):
    net, images = Recomputing(use_reentrant), some_images()
    expected = odin_by_hand(Recomputing(None), images)
    for _ in range(2):  # the second time, the network is known to recompute
        torch.testing.assert_close(odin(net).score(images), expected)
    settings = Settings.published(strong=["output", "b.1"])
    detector = FuseNorm(net, settings).fit([images])
    assert detector.taps == BLOCKS
    plain = FuseNorm(Recomputing(None), settings).fit([images])
    torch.testing.assert_close(detector.score(images), plain.score(images))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_recomputation_is_one_error():
    net, images = Recomputing(use_reentrant=True), some_images()
    with pytest.raises(TapError, match=r"use_reentrant=False.*choose output='energy'") as caught:
        odin(net).score(images)
    assert "\n" not in str(caught.value)
    with pytest.raises(TapError, match="choose output='energy'"):
        FuseNorm(net, taps=list(BLOCKS), output="odin", strong=["output"]).fit([images])
    detector = FuseNorm(net, taps=list(BLOCKS), strong=["output"]).fit([images])
    plain = FuseNorm(Recomputing(None), strong=["output"]).fit([images])
    torch.testing.assert_close(detector.score(images), plain.score(images))
    with pytest.raises(TapError, match="name the modules to tap"):  # Foo is no name of a block
        FuseNorm(net).fit([images])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_blocks_inside_reentrant_recomputation_are_found_by_the_names_of_their_classes():
    class BasicBlock(Foo):
        pass

    net = Recomputing(use_reentrant=True)
    net.a = nn.Sequential(BasicBlock(8), BasicBlock(8))
    assert FuseNorm(net, strong=["output"]).fit([some_images()]).taps == ("a.0", "a.1")


def test_a_branch_of_reentrant_recomputation_is_a_branch():
    class Branch(Foo):
        def forward(self, x):
            return self.skip(x) + checkpoint(self.conv2, x, use_reentrant=True)

    net = Net()
    net.a = nn.Sequential(Branch(8), Branch(8))
    assert FuseNorm(net, strong=["output"]).fit([some_images()]).taps == BLOCKS


def test_gradients_with_frozen_weights_are_the_same():
    images = some_images()
    expected = odin_by_hand(Net(), images)
    net = Net().requires_grad_(False)
    torch.testing.assert_close(odin(net).score(images), expected)
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradients_inside_any_grad_mode(grad):
    images = some_images()
    net, expected = Net(), odin_by_hand(Net(), images)
    with grad():
        torch.testing.assert_close(odin(net).score(images.clone()), expected)


@pytest.mark.parametrize("kind", [Frozen, Detached, Inference, Rounded])
def test_without_a_gradient_one_error_says_the_way_out(kind):
    net, images = kind().eval(), some_images().abs()
    for use in (
        lambda: odin(net).score(images),
        lambda: FuseNorm(net, taps=list(BLOCKS), output="odin", strong=["output"]).fit([images]),
    ):
        with pytest.raises(TapError, match="choose output='energy'") as caught:
            use()
        assert "\n" not in str(caught.value)
    detector = FuseNorm(net, taps=list(BLOCKS), strong=["output"]).fit([images])
    torch.testing.assert_close(
        torch.tensor(detector.infer([images]).experts[-1]), energies(net, images)
    )


def test_a_network_that_was_made_in_inference_mode():
    images = some_images()
    with torch.inference_mode():
        net = Net()
    right = energies(Net(), images)
    detector = FuseNorm(net, taps=list(BLOCKS), strong=["output"]).fit([images])
    torch.testing.assert_close(torch.tensor(detector.infer([images]).experts[-1]), right)
    with pytest.raises(TapError, match="name the modules to tap"):  # Foo is no name of a block
        FuseNorm(net).fit([some_images()])
    with pytest.raises(TapError, match="choose output='energy'"):
        odin(net).score(images)


@pytest.mark.parametrize("name", ["msp", "mls", "ebo", "odin", "react"])
def test_a_network_that_changes_its_input_in_place(name):
    args = {"ebo": {"temperature": 1.0}, "react": {"percentile": 90.0}}
    args["odin"] = {"temperature": 10.0, "noise": 0.02}
    images = some_images()
    before = images.clone()
    expected = Baseline(Normalisation().eval(), name, **args.get(name, {}))
    expected = expected.fit([images]).score(images)
    detector = Baseline(InPlaceNormalisation().eval(), name, **args.get(name, {}))
    torch.testing.assert_close(detector.fit([images]).score(images), expected)
    assert torch.equal(images, before)


@pytest.mark.parametrize("output", ["energy", "odin"])
def test_the_callers_images_are_never_changed(output):
    images = some_images()
    before = images.clone()
    settings = Settings.published(output=output)
    expected = FuseNorm(Normalisation().eval(), settings).fit([images])
    detector = FuseNorm(InPlaceNormalisation().eval(), settings).fit([images])
    torch.testing.assert_close(detector.score(images), expected.score(images))
    torch.testing.assert_close(detector.score_loader([images]), expected.score(images))
    assert torch.equal(images, before)
    torch.testing.assert_close(
        odin(InPlaceNormalisation().eval()).score(images),
        odin_by_hand(Normalisation().eval(), images),
    )
