"""Which layers are tapped, and how their outputs are read."""

import pytest
import torch
import torchvision
from torch import nn

from fusenorm_openood import tap_candidates
from fusenorm_openood.errors import TapError
from fusenorm_openood.forward.passes import hooked_layers
from fusenorm_openood.forward.taps import first_of_last_stage, resolve_taps
from fusenorm_openood.network import ResNet18_32x32, ResNet50, T2FNormNet, WideResNet
from fusenorm_openood.network.structure import read_structure
from tests.conftest import assert_undisturbed, make_net, state_of
from tests.nets import outputs_of

IMAGES = torch.randn(2, 3, 16, 16)
BLOCKS_OF_RESNET18 = tuple(f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1))


@pytest.fixture(scope="module")
def structure():
    """How the network of the fixture `net` is built."""
    return read_structure(make_net(), IMAGES)


@pytest.mark.parametrize(
    ("make", "count", "ends", "strong"),
    [
        (ResNet50, 16, ["layer1.2", "layer2.3", "layer3.5", "layer4.2"], "layer4.0"),
        (lambda: WideResNet(16, 1), 6, [f"block{s}.layer.1" for s in (1, 2, 3)], "block3.layer.0"),
        (torchvision.models.resnet18, 8, [f"layer{s}.1" for s in (1, 2, 3, 4)], "layer4.0"),
    ],
    ids=["ResNet50", "WideResNet", "torchvision"],
)
def test_blocks_stages_and_the_strong_tap(make, count, ends, strong):
    net = make()
    structure = read_structure(net, torch.randn(2, 3, 32, 32))
    blocks = resolve_taps(net, "blocks", structure)
    assert len(blocks) == count
    assert resolve_taps(net, "stages", structure) == tuple(ends)
    assert first_of_last_stage(structure, blocks) == strong
    assert first_of_last_stage(structure, ends) == ends[-1]


def test_without_stages_the_last_tap_is_strong():
    net = torchvision.models.VisionTransformer(16, 4, 5, 2, 8, 16)
    structure = read_structure(net, IMAGES)
    assert len(structure.blocks) == 5
    assert first_of_last_stage(structure, structure.blocks) == structure.blocks[-1]


def test_taps_of_a_wrapped_network_carry_its_prefix():
    net = T2FNormNet(ResNet18_32x32(width=2), 10)
    blocks = resolve_taps(net, "blocks", read_structure(net, IMAGES))
    assert blocks == tuple(f"backbone.{n}" for n in BLOCKS_OF_RESNET18)


def test_named_taps_and_their_strong_tap(net, structure):
    names = ("layer1", "layer2", "layer4")
    assert resolve_taps(net, list(names), structure) == names
    prefixed = ["module.layer1", "_orig_mod.layer2", "layer4"]
    assert resolve_taps(nn.DataParallel(net), prefixed, structure) == names
    assert first_of_last_stage(structure, names) == "layer4"


@pytest.mark.parametrize(
    ("taps", "named"),
    [
        (["layer4.2"], r"module 'layer4\.2' of .*: choose from .*layer4\.1"),
        (["nowhere"], r"module 'nowhere' of .*: choose from .*layer1\.0"),
        ([], "at least one"),
        (["layer1", "layer1"], "each once"),
        ("everything", "'blocks', 'stages' or a list .* got 'everything'"),
    ],
)
def test_invalid_taps_are_refused(net, structure, taps, named):
    with pytest.raises(TapError, match=named):
        resolve_taps(net, taps, structure)


def test_the_error_for_a_network_without_blocks_points_to_tap_candidates():
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 2))
    with pytest.raises(TapError, match="tap_candidates"):
        resolve_taps(net, "blocks", read_structure(net, IMAGES))


def test_candidates_have_names_classes_and_shapes(net):
    net.train()
    before = state_of(net)
    candidates = {c.name: c for c in tap_candidates(net, IMAGES)}
    assert_undisturbed(net, before)
    assert candidates["layer3.0"] == ("layer3.0", "BasicBlock", (2, 16, 4, 4))
    assert "fc" not in candidates
    assert set(BLOCKS_OF_RESNET18) < set(candidates)


def hooks_on(net, structure, *names, reduce=torch.clone):
    return hooked_layers(net, names, structure, IMAGES.shape, reduce)


def test_hooks_give_the_modules_outputs_and_two_share_a_network(net, structure):
    first, second = hooks_on(net, structure, "layer1", "layer2"), hooks_on(net, structure, "layer1")
    with torch.no_grad(), first as one, second as two:
        net(IMAGES)
    expected = outputs_of(net, ("layer1", "layer2"), IMAGES)
    assert torch.equal(one["layer1"], expected[0])
    assert torch.equal(one["layer2"], expected[1])
    assert torch.equal(two["layer1"], expected[0])


class Odd(nn.Module):
    """A network with modules that must not be tapped."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.unused = nn.Conv2d(3, 3, 3)
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(self.conv(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("tap", "named"),
    [
        ("unused", "'unused' never fired"),
        ("conv", "'conv' fired twice"),
        ("fc", r"'fc' must return a feature map .* got \[2, 2\]"),
    ],
)
def test_taps_that_return_no_single_feature_map_are_refused(tap, named):
    net = Odd()
    before, structure = state_of(net), read_structure(net, IMAGES)
    with pytest.raises(TapError, match=named), hooks_on(net, structure, tap):
        net(IMAGES)
    assert_undisturbed(net, before)
    assert "conv" not in [c.name for c in tap_candidates(net, IMAGES)]
