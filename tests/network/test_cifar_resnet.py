import pytest
import torch
from torch.nn import functional as F

from fusenorm_openood import load_network
from fusenorm_openood.errors import CheckpointError, ConfigError
from fusenorm_openood.forward.hooks import first_of_last_stage
from fusenorm_openood.network import CifarResNet
from fusenorm_openood.network.checkpoints import network_kind
from fusenorm_openood.network.resnet import PaddingBlock
from fusenorm_openood.network.structure import read_structure


def saved(tmp_path, depth=20, classes=10, prefix="module.", change=lambda state: state, width=16):
    """A checkpoint as in the public repository: a head called `linear`, under `state_dict`."""
    torch.manual_seed(0)
    net = CifarResNet(depth, classes, width).eval()
    state = {prefix + k.replace("fc.", "linear."): v for k, v in net.state_dict().items()}
    torch.save({"state_dict": change(state), "best_prec1": 91.7}, tmp_path / "net.th")
    return net, tmp_path / "net.th"


def without_counters(state):
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("change", [lambda s: s, without_counters])
@pytest.mark.parametrize(("depth", "classes", "width"), [(20, 10, 16), (32, 100, 16), (56, 7, 4)])
def test_public_checkpoints_are_recognised(tmp_path, depth, classes, width, prefix, change):
    net, path = saved(tmp_path, depth, classes, prefix, change, width)
    loaded = load_network(path)
    assert str(network_kind(loaded)) == f"ResNet-{depth} (CrossEntropy, {classes} classes)"
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(loaded(images), net(images))
    structure = read_structure(loaded, images)
    assert len(structure.blocks) == (depth - 2) // 2
    assert first_of_last_stage(structure, structure.blocks) == "layer3.0"


def test_an_incomplete_checkpoint_is_an_error(tmp_path):
    _, path = saved(tmp_path, change=lambda s: {k: v for k, v in s.items() if "layer3.2" not in k})
    with pytest.raises(CheckpointError, match="known network"):
        load_network(path)


def test_a_shortcut_skips_pixels_and_adds_channels_of_zeros_on_both_sides():
    torch.manual_seed(0)
    block = PaddingBlock(4, 8, 2).double().eval()
    with torch.no_grad():
        block.bn2.weight.zero_()  # the residual branch gives 0
        x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
        y = block(x)
    expected = torch.zeros(2, 8, 3, 3, dtype=torch.float64)
    for channel in range(4):
        for row in range(3):
            for column in range(3):
                expected[:, 2 + channel, row, column] = x[:, channel, 2 * row, 2 * column]
    torch.testing.assert_close(y, F.relu(expected))


def test_a_depth_that_is_not_6n_plus_2_is_an_error():
    with pytest.raises(ConfigError, match="depth must be 6n"):
        CifarResNet(18)
