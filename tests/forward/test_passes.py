import pytest
import torch
from torch import nn

from fusenorm_openood.errors import TapError
from fusenorm_openood.forward.passes import forward_pass
from fusenorm_openood.kernels.devices import device_of
from fusenorm_openood.network import ResNet18_32x32, T2FNormNet
from fusenorm_openood.network.resnet import has_scoring_logits
from fusenorm_openood.network.running import eval_mode, without_weight_gradients
from fusenorm_openood.network.understanding import understand
from tests.conftest import assert_undisturbed, state_of


def test_one_pass_returns_feature_logits_and_predictions(net):
    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        done = forward_pass(net, images, understand(net, images))
        logits, feature = net(images, return_feature=True)
    assert torch.equal(done.logits, logits)
    assert torch.equal(done.feature, feature)
    assert torch.equal(done.pred, logits.argmax(1))
    assert done.norms.shape == (0, 5)


def test_t2fnorm_scores_and_classifies_with_different_logits():
    torch.manual_seed(0)
    net = T2FNormNet(ResNet18_32x32(4, width=4), 4).eval()
    net.set_tau(0.1)
    with torch.no_grad():
        net.backbone.fc.bias.copy_(torch.tensor([0.0, 9, -9, 3]))
        images = torch.randn(32, 3, 16, 16)
        done = forward_pass(net, images, understand(net, images))
        assert torch.equal(done.logits, net.forward_ood_inference(images))
        assert torch.equal(done.pred, net(images).argmax(1))
    assert has_scoring_logits(net)
    assert not has_scoring_logits(net.backbone)


def test_any_network_may_have_separate_scoring_logits(net):
    net.forward_ood_inference = lambda x: -net(x)
    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        done = forward_pass(net, images, understand(net, images))
        assert torch.equal(done.logits, -net(images))
        assert torch.equal(done.pred, net(images).argmax(1))


def test_networks_without_logits_are_rejected():
    layer = nn.Flatten(0)  # four values for each image
    net = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Conv2d(3, 1, 1), nn.Flatten(), layer)
    with pytest.raises(TapError, match="must return logits"):
        understand(net, torch.randn(2, 3, 8, 8))


def test_device_of_a_network():
    assert device_of(nn.Linear(2, 3)) == torch.device("cpu")
    assert device_of(nn.ReLU()) == torch.device("cpu")


def test_undisturbed_restores_every_module_and_parameter(net):
    net.train()
    net.layer2.eval()
    net.layer3.requires_grad_(False)
    before = state_of(net)
    with pytest.raises(KeyError), eval_mode(net), without_weight_gradients(net):
        assert not any(m.training for m in net.modules())
        assert not any(p.requires_grad for p in net.parameters())
        raise KeyError
    assert_undisturbed(net, before)


def test_the_layer_that_makes_the_logits_need_not_be_the_last_one_registered():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)
            self.proj = nn.Linear(4, 4)  # the last one registered, not the last one applied

        def forward(self, x):
            return self.fc(self.proj(x.flatten(1)))

    net, images = Odd().bfloat16(), torch.randn(2, 1, 2, 2).bfloat16()
    done = forward_pass(net, images, understand(net, images))
    exact = done.feature.float() @ net.fc.weight.float().T + net.fc.bias.float()
    torch.testing.assert_close(done.logits, exact)


@pytest.mark.parametrize("half", [torch.bfloat16, "autocast"])
def test_logits_are_computed_in_full_precision_where_the_network_is_half(net, half):
    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        full = forward_pass(net, images, understand(net, images))
        if half != "autocast":
            net, images = net.to(half), images.to(half)
        with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
            done = forward_pass(
                net,
                images,
                understand(net, images),
                ["layer1.0"],
                lambda x: x.float().mean((1, 2, 3)),
            )
        exact = done.feature.float() @ net.fc.weight.float().T + net.fc.bias.float()
    assert done.feature.dtype == torch.bfloat16
    assert done.logits.dtype == torch.float32
    torch.testing.assert_close(done.logits, exact)
    torch.testing.assert_close(done.logits, full.logits, rtol=0.1, atol=0.1)
