"""Networks that `--network` names, and their checkpoints."""

import re
import sys

import pytest
import torch

from fusenorm_openood import load_network
from fusenorm_openood.errors import CheckpointError, ConfigError
from fusenorm_openood.network import build_network
from fusenorm_openood.network.checkpoints import network_kind
from tests.network.factories import Own

OWN = "tests.network.factories"
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SPECS = [
    "torchvision:squeezenet1_1",
    "torchvision:mnasnet0_5",  # checks the versions of its modules
    "timm:resnet10t",
    "timm:vit_tiny_patch16_224",
    f"{OWN}:Own",
    f"{OWN}:convolutional",
]


def skip_without_timm(spec):
    if spec.startswith("timm:"):
        pytest.importorskip("timm")


@pytest.mark.parametrize("spec", SPECS)
def test_a_checkpoint_loads_into_the_network_that_is_named(spec, tmp_path):
    skip_without_timm(spec)
    torch.manual_seed(0)
    net = build_network(spec, 5, image_size=32)
    assert not net.training
    torch.save({"state_dict": net.state_dict(), "epoch": 3}, tmp_path / "net.pt")
    loaded = load_network(tmp_path / "net.pt", 5, network=spec, image_size=32)
    assert network_kind(loaded, spec) == ("CrossEntropy", spec.partition(":")[2], 5)
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), net(IMAGES))
        assert loaded(IMAGES).shape == (2, 5)


@pytest.mark.parametrize("prefix", ["module.", "net.backbone."])
@pytest.mark.parametrize("spec", ["torchvision:squeezenet1_1", f"{OWN}:Own"])
def test_prefixes_of_a_checkpoint_are_removed_only_where_they_do_not_belong(prefix, spec, tmp_path):
    net = build_network(spec, 5)
    state = {prefix + key: value for key, value in net.state_dict().items()}
    torch.save(state, tmp_path / "net.pt")
    loaded = load_network(tmp_path / "net.pt", network=spec)
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), net(IMAGES))


def test_the_number_of_classes_comes_from_the_checkpoint_unless_given(tmp_path):
    net = Own(4)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    loaded = load_network(tmp_path / "net.pt", network=f"{OWN}:Own")
    assert torch.equal(loaded.model.module["out"].weight, net.model.module["out"].weight)
    with pytest.raises(CheckpointError, match=r"net\.pt must have 10 classes, .* got 4"):
        load_network(tmp_path / "net.pt", 10, network=f"{OWN}:Own")


def test_a_network_is_built_with_the_default_number_of_classes_of_its_library():
    assert network_kind(build_network("torchvision:squeezenet1_1")).classes == 1000
    assert network_kind(build_network(f"{OWN}:Own")) == ("CrossEntropy", "Own", 10)


def test_a_factory_without_num_classes_is_called_without_it():
    assert network_kind(build_network(f"{OWN}:with_seven", 10)).classes == 7


def test_a_transformer_is_built_for_the_size_of_the_images():
    with torch.device("meta"):  # without memory for its weights
        assert build_network("torchvision:vit_b_32", 5, image_size=32).image_size == 32


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet18", "network must be torchvision:NAME, timm:NAME or package.module:factory"),
        ("torchvision:", "network must be torchvision:NAME"),
        ("torchvision:resnet19", "resnet19' cannot be built (ValueError: Unknown model"),
        ("timm:resnet19", "network 'timm:resnet19' cannot be built (RuntimeError: Unknown model"),
        ("nowhere.nets:small", "needs the module nowhere.nets, which cannot be imported"),
        (f"{OWN}:nothing", f"'{OWN}:nothing' cannot be built (AttributeError:"),
        (f"{OWN}:broken", f"'{OWN}:broken' cannot be built (RuntimeError: no weights today):"),
        (f"{OWN}:not_a_network", "must be a function that returns a torch.nn.Module, got int"),
    ],
)  # fmt: skip
def test_a_network_that_cannot_be_built_is_an_error(spec, message):
    skip_without_timm(spec)
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        build_network(spec, 5)
    assert "\n" not in str(error.value)


def test_a_missing_timm_is_an_error_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        ConfigError, match=r"'timm:resnet18' needs the module timm.*pip install timm"
    ):
        build_network("timm:resnet18")


def test_a_checkpoint_that_does_not_fit_is_an_error_with_the_first_key(tmp_path):
    state = {**Own(5).state_dict(), "model.module.stem.0.weight": torch.ones(4, 3, 5, 5)}
    torch.save(state, tmp_path / "net.pt")
    message = "'model.module.stem.0.weight' must be [4, 3, 3, 3], got [4, 3, 5, 5]"
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        load_network(tmp_path / "net.pt", 5, network=f"{OWN}:Own")
    assert f"net.pt does not fit the network {OWN}:Own" in str(error.value)
