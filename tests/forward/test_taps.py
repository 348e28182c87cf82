import pytest
import torch
import torchvision
from torch import nn

from fusenorm_openood import tap_candidates
from fusenorm_openood.errors import TapError
from fusenorm_openood.forward.hooks import (
    first_of_last_stage,
    listening,
    resolve_taps,
)
from fusenorm_openood.network import (
    ResNet18_32x32,
    ResNet18_224x224,
    ResNet50,
    T2FNormNet,
    WideResNet,
)
from fusenorm_openood.network.structure import read_structure
from tests.conftest import assert_undisturbed, make_net, state_of

IMAGES = torch.randn(2, 3, 16, 16)
BLOCKS_OF_RESNET18 = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]


@pytest.mark.parametrize(
    ("net", "count", "ends", "strong"),
    [
        (ResNet18_32x32(width=2), 8, ["layer1.1", "layer2.1", "layer3.1", "layer4.1"], "layer4.0"),
        (ResNet18_224x224(), 8, ["layer1.1", "layer2.1", "layer3.1", "layer4.1"], "layer4.0"),
        (ResNet50(), 16, ["layer1.2", "layer2.3", "layer3.5", "layer4.2"], "layer4.0"),
        (
            WideResNet(16, 1),
            6,
            ["block1.layer.1", "block2.layer.1", "block3.layer.1"],
            "block3.layer.0",
        ),
        (torchvision.models.resnet18(), 8, [f"layer{s}.1" for s in (1, 2, 3, 4)], "layer4.0"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_blocks_stages_and_the_strong_tap(net, count, ends, strong):
    for size in (32, 64):
        structure = read_structure(net, torch.randn(2, 3, size, size))
        blocks = resolve_taps(net, "blocks", structure)
        assert len(blocks) == count
        assert resolve_taps(net, "stages", structure) == tuple(ends)
        assert first_of_last_stage(structure, blocks) == strong
        assert first_of_last_stage(structure, ends) == ends[-1]


def test_without_stages_the_last_tap_is_strong():
    net = torchvision.models.vit_b_16(image_size=32)
    structure = read_structure(net, torch.randn(2, 3, 32, 32))
    assert len(structure.blocks) == 12
    assert first_of_last_stage(structure, structure.blocks) == structure.blocks[-1]


def test_taps_of_a_wrapped_network_carry_its_prefix():
    net = T2FNormNet(ResNet18_32x32(width=2), 10)
    structure = read_structure(net, IMAGES)
    assert resolve_taps(net, "blocks", structure) == tuple(
        f"backbone.{n}" for n in BLOCKS_OF_RESNET18
    )


def test_wrappers_of_torch_leave_the_names_as_they_are(net):
    for wrapped in (nn.DataParallel(net), torch.compile(net)):
        structure = read_structure(wrapped, IMAGES)
        assert list(structure.blocks) == BLOCKS_OF_RESNET18
        for prefix in ("module.", "_orig_mod."):
            assert resolve_taps(wrapped, [f"{prefix}layer1.0"], structure) == ("layer1.0",)


def test_named_taps_and_their_strong_tap(net):
    names, structure = ["layer1", "layer2", "layer4"], read_structure(net, IMAGES)
    assert resolve_taps(net, names, structure) == tuple(names)
    assert first_of_last_stage(structure, names) == "layer4"


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        (["layer4.2"], r"no module 'layer4\.2': choose from .*layer4\.1"),
        (["nowhere"], r"no module 'nowhere': choose from .*layer1\.0"),
        ([], "at least one"),
        (["layer1", "layer1"], "each once"),
        (
            "everything",
            "taps must be 'blocks', 'stages' or a list of module names, got 'everything'",
        ),
    ],
)
def test_invalid_taps_are_rejected(net, taps, message):
    with pytest.raises(TapError, match=message):
        resolve_taps(net, taps, read_structure(net, IMAGES))


def test_the_error_for_a_network_without_blocks_points_to_tap_candidates():
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 2))
    with pytest.raises(TapError, match="tap_candidates"):
        resolve_taps(net, "blocks", read_structure(net, IMAGES))


def test_candidates_have_names_classes_and_shapes(net):
    net.train()
    before = state_of(net)
    candidates = {c.name: c for c in tap_candidates(net, torch.randn(2, 3, 16, 16))}
    assert_undisturbed(net, before)
    assert candidates["layer3.0"] == ("layer3.0", "BasicBlock", (2, 16, 4, 4))
    assert "fc" not in candidates
    assert set(BLOCKS_OF_RESNET18) < set(candidates)


def test_listening_yields_the_modules_outputs(net):
    images = torch.randn(2, 3, 16, 16)
    with (
        torch.no_grad(),
        listening(
            net, ["layer1", "layer2"], read_structure(net, IMAGES), IMAGES.shape, torch.clone
        ) as heard,
    ):
        net(images)
    with torch.no_grad():
        first = net.layer1(torch.relu(net.bn1(net.conv1(images))))
        torch.testing.assert_close(heard["layer1"], first)
        torch.testing.assert_close(heard["layer2"], net.layer2(first))


def test_hooks_are_removed_after_an_exception_in_the_pass(net):
    before = state_of(net)
    with (
        pytest.raises(RuntimeError),
        listening(net, ["layer1"], read_structure(net, IMAGES), IMAGES.shape, torch.clone),
    ):
        net(torch.randn(2, 4, 16, 16))
    assert_undisturbed(net, before)


def test_hooks_are_removed_after_an_exception_in_the_reduction(net):
    def fail(x):
        raise KeyError("reduction")

    before = state_of(net)
    with (
        pytest.raises(KeyError),
        listening(net, ["layer1"], read_structure(net, IMAGES), IMAGES.shape, fail),
    ):
        net(torch.randn(2, 3, 16, 16))
    assert_undisturbed(net, before)


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
    ("tap", "message"),
    [
        ("unused", "'unused' never fired"),
        ("conv", "'conv' fired twice"),
        ("fc", r"'fc' must return a feature map .* got \[2, 2\]"),
    ],
)
def test_taps_that_return_no_single_feature_map_are_rejected(tap, message):
    net = Odd()
    before = state_of(net)
    with (
        pytest.raises(TapError, match=message),
        listening(net, [tap], read_structure(net, IMAGES), IMAGES.shape, torch.clone),
    ):
        net(torch.randn(2, 3, 8, 8))
    assert_undisturbed(net, before)
    assert "conv" not in [c.name for c in tap_candidates(net, torch.randn(1, 3, 8, 8))]


def test_two_listeners_share_a_network():
    net = make_net()
    images = torch.randn(2, 3, 16, 16)
    with (
        listening(net, ["layer1"], read_structure(net, IMAGES), IMAGES.shape, torch.clone) as one,
        listening(net, ["layer1"], read_structure(net, IMAGES), IMAGES.shape, torch.clone) as two,
    ):
        net(images)
    assert torch.equal(one["layer1"], two["layer1"])
