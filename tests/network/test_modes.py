"""Nothing is left on a network, in torch's random numbers, or in a user's hooks."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from fusenorm_openood import FuseNorm, Settings, tap_candidates
from fusenorm_openood.detectors.single import SingleScore
from fusenorm_openood.errors import FuseNormError, NetworkError
from fusenorm_openood.network.running import eval_mode
from tests.conftest import assert_undisturbed, state_of
from tests.nets import BLOCKS, Custom, Net, energies, some_images

IMAGES = some_images()


def drawing():
    """A network that draws random numbers also in evaluation mode."""
    return Custom(
        lambda net, x: Net.forward(net, x + 1e-4 * torch.randn_like(x)) + 1e-4 * torch.rand(1)
    )


def test_understanding_a_network_draws_no_random_numbers():
    net, plain = drawing(), Net()
    expected = torch.get_rng_state()
    tap_candidates(net, IMAGES)
    FuseNorm(net)
    FuseNorm(plain).fit([IMAGES]).score(IMAGES)
    SingleScore(plain, "odin", temperature=10.0, noise=0.01).score(IMAGES)
    assert torch.equal(torch.get_rng_state(), expected)


def test_scores_of_a_random_network_depend_on_the_seed_alone():
    net, scores = drawing(), []
    detector = FuseNorm(net, strong=["output"]).fit([IMAGES])
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        scores.append(detector.score(IMAGES))
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])
    torch.manual_seed(3)  # the first score of a baseline understands the network
    first = SingleScore(net, "mls").score(IMAGES)
    torch.manual_seed(3)
    with torch.no_grad():
        torch.testing.assert_close(first, net(IMAGES).amax(1))


@pytest.mark.parametrize(
    "settings",
    [Settings(), Settings.published(), Settings.deviation()],
    ids=["", "published", "joint"],
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


def test_the_users_hooks_are_kept_and_called():
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
    def failing(net, x):
        Net.forward(net, x)
        raise RuntimeError("broken")

    net = Custom(failing).train()
    before, randomness = state_of(net), torch.get_rng_state()
    for use in (
        lambda: FuseNorm(net).fit([IMAGES]),
        lambda: tap_candidates(net, IMAGES),
        lambda: SingleScore(net, "msp").score(IMAGES),
    ):
        with pytest.raises(FuseNormError, match=r"\[2, 3, 12, 12\].*broken"):
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
    def lazy(net, x):
        if not hasattr(net, "extra"):
            net.extra = nn.Identity()
        return Net.forward(net, net.extra(x))

    net = Custom(lazy).train()
    conf = FuseNorm(net, strong=["output"]).fit([IMAGES]).score(IMAGES)
    torch.testing.assert_close(conf, FuseNorm(Net(), strong=["output"]).fit([IMAGES]).score(IMAGES))
    assert net.training


class Adapter(nn.Linear):
    """Adds a product of low rank, which it merges into its weight in evaluation mode."""

    def __init__(self, *shape):
        super().__init__(*shape)
        self.down = nn.Parameter(0.3 * torch.randn(2, shape[0]))
        self.up = nn.Parameter(0.3 * torch.randn(shape[1], 2))
        self.merged, self.calls = False, 0

    def train(self, mode=True):
        self.calls += 1
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.up.data @ self.down.data
            self.merged = not mode
        return self

    def forward(self, x):
        y = super().forward(x)
        return y if self.merged else y + x @ self.down.T @ self.up.T


class FrozenNorm(nn.Sequential):
    """Keeps its batch norm in evaluation mode, as detectors do."""

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def adapted(frozen=False, inner=False):
    net = Net()
    net.fc = Adapter(8, 5)
    norm = nn.BatchNorm2d(8)
    norm.running_mean += 0.3
    net.a = (FrozenNorm if frozen else nn.Sequential)(*net.a, norm)
    if inner:  # an adapter in a module that overrides `train`, too
        net.b = FrozenNorm(*net.b, nn.BatchNorm2d(8), nn.Sequential(Channels(8, 8)))
    return net.train()


class Channels(Adapter):
    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def step(net):
    """State and gradients after a training step."""
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.nn.functional.cross_entropy(net(IMAGES), torch.arange(len(IMAGES)) % 5).backward()
    optimiser.step()
    gradients = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    return {n: m.training for n, m in net.named_modules()}, net.state_dict(), gradients


def freeze(net, name):
    if name is not None:
        net.get_submodule(name).eval()
    return net


@pytest.mark.parametrize(
    ("kind", "frozen"),
    [
        ({}, None),
        ({}, "fc"),  # an adapter that is merged stays merged
        ({}, "a"),
        ({"frozen": True}, None),
        ({"frozen": True, "inner": True}, None),
        ({"frozen": True, "inner": True}, "b.3.0"),
        ({"frozen": True, "inner": True}, "b"),
    ],
)
def test_a_training_step_afterwards_is_the_one_it_would_have_been(kind, frozen):
    expected = step(freeze(adapted(**kind), frozen))
    net = freeze(adapted(**kind), frozen)
    FuseNorm(net, Settings.published()).fit([IMAGES]).score(IMAGES)
    for found, right in zip(step(net), expected, strict=True):
        assert found.keys() == right.keys()
        assert all(torch.equal(torch.as_tensor(found[n]), torch.as_tensor(right[n])) for n in right)
    if frozen is None:
        assert "fc.down" in expected[2]


def test_what_is_in_evaluation_mode_is_not_touched():
    net = adapted(frozen=True, inner=True)
    net.fc.eval()
    net.b[3][0].eval()
    calls = net.fc.calls, net.b[3][0].calls
    detector = FuseNorm(net, strong=["output"]).fit([IMAGES])
    assert (net.fc.calls, net.b[3][0].calls) == calls
    assert [net.training, net.fc.training, net.b.training, net.b[3].training] == [1, 0, 1, 1]
    torch.testing.assert_close(
        torch.tensor(detector.infer([IMAGES]).experts[-1]), energies(net.eval(), IMAGES)
    )


def test_a_train_of_one_object_is_called_and_kept():
    net, modes = adapted(), []
    net.b.train = modes.append
    FuseNorm(net).fit([IMAGES])
    assert modes
    assert vars(net.b)["train"] == modes.append


def test_overlapping_passes_merge_once():
    net = adapted()
    weight = net.fc.weight.detach().clone()
    with eval_mode(net):
        with eval_mode(net.fc):
            merged = net.fc.weight.detach().clone()
        assert net.fc.merged
        assert torch.equal(net.fc.weight, merged)
    assert net.fc.training
    assert not net.fc.merged
    assert torch.equal(net.fc.weight, weight)


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_a_spectral_norm_in_training_mode_takes_no_step(norm, tmp_path):
    net = Net()
    net.fc = norm(net.fc)
    before = {name: value.clone() for name, value in net.train().state_dict().items()}
    detector = FuseNorm(net).fit([IMAGES])
    detector.score(IMAGES)
    detector.save(tmp_path / "detector.safetensors")
    FuseNorm.load(tmp_path / "detector.safetensors", net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_network_that_needs_gradients_is_one_error():
    def ascent(net, x):
        feature = net.feature(x)
        return net.fc(feature + torch.autograd.grad(net.fc(feature).sum(), feature)[0])

    with pytest.raises(NetworkError, match="does not require grad"):
        FuseNorm(Custom(ascent)).fit([IMAGES])
