import pytest
import torch
from torch import nn

from fusenorm_openood import FuseNorm
from fusenorm_openood.listening.gradient import ConstantBatchNorm
from tests.conftest import make_loader, make_net


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
