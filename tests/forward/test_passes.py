import pytest
import torch
from torch import nn

from fusenorm_openood import FuseNorm
from fusenorm_openood.detectors.single import SingleScore
from fusenorm_openood.forward.passes import forward_pass
from fusenorm_openood.forward.recorded import RecordedLoader
from fusenorm_openood.kernels.devices import device_of
from fusenorm_openood.network import ResNet18_32x32, T2FNormNet
from fusenorm_openood.network.resnet import has_scoring_logits
from fusenorm_openood.network.running import eval_mode, without_weight_gradients
from fusenorm_openood.network.understanding import understand
from tests.conftest import assert_undisturbed, state_of
from tests.nets import Net, energies, some_images

IMAGES = torch.randn(5, 3, 16, 16)


def the_pass(net, images=IMAGES):
    with torch.no_grad():
        return forward_pass(net, images, understand(net, images))


def test_one_pass_returns_feature_logits_and_predictions(net):
    done = the_pass(net)
    with torch.no_grad():
        logits, feature = net(IMAGES, return_feature=True)
    assert torch.equal(done.logits, logits)
    assert torch.equal(done.feature, feature)
    assert torch.equal(done.pred, logits.argmax(1))
    assert done.maps == {}


def test_t2fnorm_scores_and_classifies_with_different_logits():
    torch.manual_seed(0)
    net = T2FNormNet(ResNet18_32x32(4, width=4), 4).eval()
    net.set_tau(0.1)
    with torch.no_grad():
        net.backbone.fc.bias.copy_(torch.tensor([0.0, 9, -9, 3]))
        done = the_pass(net)
        assert torch.equal(done.logits, net.forward_ood_inference(IMAGES))
        assert torch.equal(done.pred, net(IMAGES).argmax(1))
    assert has_scoring_logits(net)
    assert not has_scoring_logits(net.backbone)


def test_any_network_may_have_separate_scoring_logits(net):
    net.forward_ood_inference = lambda x: -net(x)
    done = the_pass(net)
    with torch.no_grad():
        assert torch.equal(done.logits, -net(IMAGES))
        assert torch.equal(done.pred, net(IMAGES).argmax(1))


def test_device_of_a_network_without_parameters():
    assert device_of(nn.ReLU()) == torch.device("cpu")


def test_every_module_and_parameter_is_restored(net):
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

    net = Odd().bfloat16()
    done = the_pass(net, torch.randn(2, 1, 2, 2).bfloat16())
    exact = done.feature.float() @ net.fc.weight.float().T + net.fc.bias.float()
    torch.testing.assert_close(done.logits, exact)


@pytest.mark.parametrize("half", [torch.bfloat16, "autocast"])
def test_logits_are_computed_in_full_precision_where_the_network_is_half(net, half):
    full, images = the_pass(net), IMAGES
    if half != "autocast":
        net, images = net.to(half), images.to(half)
    with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
        done = the_pass(net, images)
    exact = done.feature.float() @ net.fc.weight.float().T + net.fc.bias.float()
    assert done.feature.dtype == torch.bfloat16
    assert done.logits.dtype == torch.float32
    torch.testing.assert_close(done.logits, exact)
    torch.testing.assert_close(done.logits, full.logits, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_images_are_given_in_the_precision_of_the_weights(dtype, tmp_path):
    net, images = Net().to(dtype), some_images(12)
    expected = energies(net, images.to(dtype))
    detector = SingleScore(net, "ebo")
    dataset = [{"data": image, "label": 0} for image in images]
    recorded = RecordedLoader(dataset, tmp_path, {}, "images")
    for found in (
        detector.score(images),
        detector.score_loader([images]),
        detector.score_loader(recorded),
        torch.from_numpy(
            FuseNorm(net, strong=["output"]).fit(recorded).infer([images]).experts[-1]
        ),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)
