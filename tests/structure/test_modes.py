"""Nothing is left on a network, in torch's random numbers, or in a user's hooks."""

import pytest
import torch
from torch import nn

from fusenorm_openood import FuseNorm, Settings, tap_candidates
from fusenorm_openood.detectors.baselines import Baseline
from fusenorm_openood.errors import FuseNormError
from fusenorm_openood.structure.modes import preserved_randomness
from tests.conftest import assert_undisturbed, state_of
from tests.nets import BLOCKS, Net, some_images

IMAGES = some_images()


class Random(Net):
    """Draws random numbers also in evaluation mode."""

    def forward(self, x):
        noise = 1e-4 * torch.randn_like(x)
        return super().forward(x + noise) + 1e-4 * torch.rand(1)


def test_understanding_a_network_draws_no_random_numbers():
    net, plain = Random(), Net()
    expected = torch.get_rng_state()
    tap_candidates(net, IMAGES)
    FuseNorm(net)
    FuseNorm(plain).fit([IMAGES]).score(IMAGES)
    Baseline(plain, "odin", temperature=10.0, noise=0.01).score(IMAGES)
    assert torch.equal(torch.get_rng_state(), expected)


def test_scores_of_a_random_network_depend_on_the_seed_alone():
    net, scores = Random(), []
    detector = FuseNorm(net, strong=["output"]).fit([IMAGES])
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        scores.append(detector.score(IMAGES))
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])
    torch.manual_seed(3)  # the first score of a baseline understands the network
    first = Baseline(net, "mls").score(IMAGES)
    torch.manual_seed(3)
    with torch.no_grad():
        torch.testing.assert_close(first, net(IMAGES).amax(1))


def test_randomness_is_preserved_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(KeyError), preserved_randomness(torch.device("cpu")):
        torch.randn(5)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "settings", [Settings(), Settings.published(), Settings.joint()], ids=["", "published", "joint"]
)
def test_modes_weights_gradients_and_hooks_are_as_before(settings):
    net = Net().train()
    net.a[1].eval()
    net.b.requires_grad_(False)
    net.fc.weight.grad = torch.ones_like(net.fc.weight)
    before, grad = state_of(net), net.fc.weight.grad.clone()
    detector = FuseNorm(net, settings).fit([IMAGES])
    detector.score(IMAGES)
    tap_candidates(net, IMAGES)
    assert_undisturbed(net, before)
    assert torch.equal(net.fc.weight.grad, grad)


def test_the_users_hooks_are_kept_and_heard():
    net, calls = Net(), []
    doubled = net.a[0].register_forward_hook(lambda module, args, output: 2 * output)
    net.fc.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    net.b[0].register_forward_hook(lambda *_: calls.append(1))
    net.register_forward_hook(lambda module, args, output: output / 2)
    before = state_of(net)
    detector = FuseNorm(net, strong=["output"]).fit([IMAGES])
    assert detector.taps == BLOCKS
    assert_undisturbed(net, before)
    with torch.no_grad():
        logits = net(IMAGES)
        feature = net.b(net.a[1](net.a[0](net.stem(IMAGES)))).mean((2, 3))
        torch.testing.assert_close(logits, (feature + 1) @ net.fc.weight.T / 2 + net.fc.bias / 2)
    experts = torch.tensor(detector.infer([IMAGES]).experts)
    torch.testing.assert_close(experts[-1].float(), logits.logsumexp(1))
    assert calls
    doubled.remove()
    assert not torch.equal(torch.tensor(detector.infer([IMAGES]).experts[0]), experts[0])


def test_errors_leave_everything_as_before():
    class Failing(Net):
        def forward(self, x):
            super().forward(x)
            raise RuntimeError("broken")

    net = Failing().train()
    before, randomness = state_of(net), torch.get_rng_state()
    for use in (
        lambda: FuseNorm(net).fit([IMAGES]),
        lambda: tap_candidates(net, IMAGES),
        lambda: Baseline(net, "msp").score(IMAGES),
    ):
        with pytest.raises(FuseNormError, match="broken"):
            use()
    assert_undisturbed(net, before)
    assert torch.equal(torch.get_rng_state(), randomness)


def test_the_users_grad_mode_is_kept():
    detector = FuseNorm(Net(), Settings.published()).fit([IMAGES])
    for grad in (torch.no_grad, torch.enable_grad):
        with grad():
            enabled = torch.is_grad_enabled()
            detector.score(IMAGES)
            assert torch.is_grad_enabled() == enabled


def test_modules_that_the_network_makes_in_its_forward_pass():
    class Lazy(Net):
        def forward(self, x):
            if not hasattr(self, "extra"):
                self.extra = nn.Identity()
            return super().forward(self.extra(x))

    net = Lazy().train()
    conf = FuseNorm(net, strong=["output"]).fit([IMAGES]).score(IMAGES)
    torch.testing.assert_close(conf, FuseNorm(Net(), strong=["output"]).fit([IMAGES]).score(IMAGES))
    assert net.training
