"""The networks of this package, and the forms in which public checkpoints save them."""

import re
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from fusenorm_openood import load_network
from fusenorm_openood.errors import CheckpointError, ConfigError, DamagedFileError
from fusenorm_openood.network import (
    CifarResNet,
    ResNet18_32x32,
    ResNet18_224x224,
    ResNet50,
    T2FNormNet,
    WideResNet,
)
from fusenorm_openood.network.checkpoints import network_kind
from fusenorm_openood.network.resnet import PaddingBlock
from fusenorm_openood.network.states import in_order
from tests.conftest import make_net, make_t2fnorm

NET = make_net()
PREFIXES = ["module.", "_orig_mod.", "model.", "net.", "network.", "backbone.", "encoder."]


def save(state, path):
    torch.save(state, path)
    return path


def assert_same(loaded, net, counters=False):
    """Equal weights and logits; checkpoints may lack the counters of batch normalisation."""
    assert type(loaded) is type(net)
    assert not loaded.training
    for key, value in net.state_dict().items():
        if counters or not key.endswith("num_batches_tracked"):
            assert torch.equal(loaded.state_dict()[key], value), key
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(images), net(images))


NETWORKS = {
    "ResNet18_32x32 of width 8 (CrossEntropy, 5 classes)": lambda: ResNet18_32x32(5, width=8),
    "ResNet18_32x32 (CrossEntropy, 3 classes)": lambda: ResNet18_32x32(3),
    "WRN-16-2 (CrossEntropy, 5 classes)": lambda: WideResNet(16, 2, 5),
    "ResNet-20 (CrossEntropy, 5 classes)": lambda: CifarResNet(20, 5, width=8),
    "ResNet18_32x32 of width 4 (T2FNorm, 5 classes)": lambda: make_t2fnorm(5),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_checkpoint_loads_as_the_network_that_was_saved(kind, tmp_path):
    torch.manual_seed(0)
    net = NETWORKS[kind]().eval()
    loaded = load_network(save(net.state_dict(), tmp_path / "best.ckpt"))
    assert_same(loaded, net, counters=True)
    assert str(network_kind(loaded)) == kind
    if not isinstance(net, T2FNormNet):
        with torch.no_grad():
            logits, feature = net(torch.randn(2, 3, 32, 32), return_feature=True)
            assert torch.equal(net.get_fc_layer()(feature), logits)
        assert feature.shape == (2, net.feature_size)


@pytest.mark.parametrize(
    ("ours", "theirs", "prefix"),
    [(ResNet18_224x224, "resnet18", "model.encoder."), (ResNet50, "resnet50", "")],
)
def test_torchvisions_weights_load_as_openoods_network(ours, theirs, prefix, tmp_path):
    torch.manual_seed(0)
    reference = getattr(torchvision.models, theirs)(num_classes=5).eval()
    loaded = load_network(save(under(prefix, reference.state_dict()), tmp_path / "net.pth"))
    loaded.projector = torch.nn.Linear(3, 4)  # of a user, and no part of the forward pass
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(images), reference(images))
    assert type(loaded) is ours


@pytest.mark.parametrize("channels", [8, 7])
def test_a_block_with_a_padding_shortcut_equals_its_formula(channels):
    torch.manual_seed(0)
    block = PaddingBlock(4, channels, 2)
    block(torch.randn(64, 4, 9, 9))  # running statistics other than 0 and 1
    block.double().eval()
    s = {key: value.detach() for key, value in block.state_dict().items()}

    def normalised(x, name):
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, var, weight, bias = (s[f"{name}.{key}"].view(-1, 1, 1) for key in keys)
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    x = torch.randn(3, 4, 9, 9, dtype=torch.float64)
    y = normalised(F.conv2d(x, s["conv1.weight"], stride=2, padding=1), "bn1").clamp(min=0)
    y = normalised(F.conv2d(y, s["conv2.weight"], padding=1), "bn2")
    first = (channels - 4) // 2
    y[:, first : first + 4] += x[:, :, ::2, ::2]
    with torch.no_grad():
        torch.testing.assert_close(block(x), y.clamp(min=0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("depth", "size"), [(20, 269722), (56, 853018)])
def test_resnets_for_cifar_have_the_papers_size(depth, size):
    assert sum(p.numel() for p in CifarResNet(depth).parameters()) == size


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_public_checkpoints_of_cifar_resnets_are_recognised(tmp_path, prefix):
    net = CifarResNet(32, 7, 4).eval()  # whose head is called `linear`, without counters
    state = {prefix + k.replace("fc.", "linear."): v for k, v in net.state_dict().items()}
    state = {key: value for key, value in state.items() if "num_batches" not in key}
    path = save({"state_dict": state, "best_prec1": 91.7}, tmp_path / "net.th")
    assert_same(load_network(path), net)
    incomplete = {key: value for key, value in state.items() if "layer3.2" not in key}
    with pytest.raises(CheckpointError, match="known network"):
        load_network(save({"state_dict": incomplete}, path))
    del state[f"{prefix}layer3.2.bn2.bias"]
    with pytest.raises(CheckpointError, match="CifarResNet"):
        load_network(save({"state_dict": state}, path))


def test_depths_are_checked():
    with pytest.raises(ConfigError, match=r"depth must be 6n \+ 4.*got 17"):
        WideResNet(17)
    with pytest.raises(ConfigError, match=r"depth must be 6n \+ 2.*got 18"):
        CifarResNet(18)


def test_t2fnorm_forwards_equal_their_formulas():
    torch.manual_seed(0)
    net, images = make_t2fnorm(), torch.randn(6, 3, 16, 16)
    with torch.no_grad():
        feature = net.backbone(images, return_feature=True)[1].double()
        w, b = net.backbone.fc.weight.double(), net.backbone.fc.bias.double()
        unit = feature / feature.norm(dim=1, keepdim=True)
        torch.testing.assert_close(net(images).double(), unit / 0.1 @ w.T + b, rtol=1e-5, atol=1e-5)
        scoring = net.forward_ood_inference(images).double()
        torch.testing.assert_close(scoring, feature / 0.1 @ w.T + b, rtol=1e-5, atol=1e-5)
        net = T2FNormNet(ResNet18_32x32(1000, width=2), 1000).eval()  # ImageNet: no temperature
        net.set_tau(0.05)
        assert torch.equal(net.forward_ood_inference(images), net.backbone(images))


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def headed(body, head):
    """Prefixes for the network and for its last layer."""
    return lambda s: {
        head + k.removeprefix("fc.") if k.startswith("fc.") else body + k: v for k, v in s.items()
    }


def optimiser_state():
    """State of an optimiser that has made a step."""
    net = torch.nn.Linear(2, 2)
    optimiser = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    return optimiser.state_dict()


OPTIMISER = optimiser_state()


def training(state):
    """What training scripts save next to the weights."""
    rest = {"best_acc1": torch.tensor(76.1), "args": {"lr": 0.1}, "optimizer": OPTIMISER}
    return {"epoch": 90, "arch": "resnet18", **rest, **state}


def zeros(state):
    return {key: torch.zeros_like(value) for key, value in state.items()}


FORMS = {
    "model.module.backbone.": lambda s: under("model.module.backbone.", s),
    "a compiled stage": lambda s: {k.replace("r2.", "r2._orig_mod."): v for k, v in s.items()},
    "another attribute": lambda s: under("classifier_net.", s),
    "encoder and fc": headed("encoder.", "fc."),
    "backbone and linear": headed("backbone.", "linear."),
    "module.encoder and module.classifier": headed("module.encoder.", "module.classifier."),
    "linear under net, with acc": lambda s: {"net": headed("", "linear.")(s), "acc": 9.5},
    **{
        f"under {name}": lambda s, name=name: training({name: s})
        for name in ("state_dict", "model", "net", "network", "model_state_dict", "model_state")
    },
    "state_dict inside model": lambda s: training({"model": {"state_dict": s}}),
    "Lightning": lambda s: {
        "state_dict": {**under("model.", s), "criterion.weight": torch.ones(4)},
        "pytorch-lightning_version": "2.0",
        "optimizer_states": [],
        "loops": {"state_dict": {}},
    },
    **{
        f"averaged weights under {name}": lambda s, name=name: training({name: under("module.", s)})
        for name in ("state_dict_ema", "model_ema", "ema")
    },
    "plain and averaged weights": lambda s: {"model_ema": zeros(s), "ema": zeros(s), "model": s},
    "num_updates": lambda s: {**s, "num_updates": torch.tensor(7)},
    "n_averaged inside a prefix": lambda s: under("model.", {**s, "n_averaged": torch.tensor(7)}),
    "no num_batches_tracked": lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
    "numbers between the tensors": lambda s: {**s, "epoch": 3, "lr": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_public_form_loads_as_the_network_that_was_saved(form, tmp_path):
    assert_same(load_network(save(FORMS[form](NET.state_dict()), tmp_path / "net.pt")), NET)


@pytest.mark.parametrize(
    ("dtype", "safe"), [(torch.float16, False), (torch.bfloat16, True), (torch.float64, False)]
)
def test_weights_of_any_precision_load_in_float32(dtype, safe, tmp_path):
    net, state = make_net(), NET.state_dict()
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    (save_file if safe else torch.save)(state, tmp_path / "net.pt")
    net.load_state_dict(state)
    loaded = load_network(tmp_path / "net.pt")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert_same(loaded, net, counters=True)


def test_the_content_of_a_file_decides_how_it_is_read(tmp_path):
    state = NET.state_dict()
    save_file(under("model.module.", state), tmp_path / "net.ckpt")
    assert_same(load_network(tmp_path / "net.ckpt"), NET, counters=True)
    assert_same(load_network(save(state, tmp_path / "net.safetensors")), NET)
    torch.save(state, tmp_path / "n.pth", _use_new_zipfile_serialization=False)
    assert_same(load_network(tmp_path / "n.pth"), NET)


@settings(max_examples=10, deadline=None)
@given(
    prefixes=st.lists(st.sampled_from(PREFIXES), max_size=5),
    inner=st.sampled_from(["", "module.", "_orig_mod.", "model."]),
    kind=st.sampled_from(["plain", "T2FNorm", "separate"]),
)
def test_any_nesting_of_prefixes_gives_the_same_network(prefixes, inner, kind):
    net, state = NET, under(inner, NET.state_dict())
    if kind == "T2FNorm":
        net = T2FNormNet(NET, 4).eval()
        net.set_tau(0.1)
        state = {"tau": net.tau, **under("backbone.", state)}
    elif kind == "separate":
        state = headed("encoder.", "fc.")(net.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        path = save(under("".join(prefixes), state), Path(folder) / "net.pt")
        assert_same(load_network(path, num_classes=4), net, counters=True)


def without_head(state):
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def mlp_head(state):
    """SupCon's form: an encoder with a projection head."""
    body = under("encoder.", without_head(state))
    return {"model": {**body, "head.0.weight": torch.ones(32, 32)}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_head, "without its last linear layer"),
        (mlp_head, "without its last linear layer"),
        (
            lambda s: {**s, "fc.weight": s["fc.weight"][:, :-1]},
            "'fc.weight' must be [4, 32], got [4, 31]",
        ),
        (lambda s: {**s, "head.weight": s["fc.weight"]}, "one last layer, got 'fc.' and 'head.'"),
        (lambda s: {**under("a.", s), **under("b.", s)}, "one network, got 2, under 'a.', 'b.'"),
        (
            lambda s: {**under("model.", s), "normalize.mean": torch.zeros(3)},
            "nothing besides a known network, got 'normalize.mean'",
        ),
        (lambda s: {**s, "extra.weight": torch.ones(2)}, "key 'extra.weight' is unexpected"),
        (lambda s: {"features.weight": s["fc.weight"]}, "known network (ResNet18_32x32"),
        (lambda s: {**s, "tau": torch.tensor(0.1)}, "key 'tau' is unexpected"),
        (
            lambda s: {k: v for k, v in s.items() if not k.startswith("layer3.1")},
            "looks like a ResNet18_32x32 but does not fit it",
        ),
    ],
)  # fmt: skip
def test_what_the_keys_do_not_say_clearly_is_an_error_with_the_way_out(change, message, tmp_path):
    path = save(change(NET.state_dict()), tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        load_network(path)
    assert str(error.value).startswith(str(path))
    assert "with --network, or network=" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [{}, [1], OPTIMISER, {"model": {}, "epoch": 3}])
def test_a_file_without_weights_is_an_error(content, tmp_path):
    with pytest.raises(CheckpointError, match="non-empty state dict of tensors, got "):
        load_network(save(content, tmp_path / "net.pt"))


def test_checkpoints_of_other_classes_and_missing_files_are_rejected(tmp_path):
    with pytest.raises(CheckpointError, match=r"good\.ckpt must have 10 classes, .* got 4"):
        load_network(save(NET.state_dict(), tmp_path / "good.ckpt"), num_classes=10)
    with pytest.raises(CheckpointError, match=r"none\.ckpt not found"):
        load_network(tmp_path / "none.ckpt")


def test_a_damaged_file_is_an_error(tmp_path):
    save(NET.state_dict(), tmp_path / "net.pt")
    save_file(NET.state_dict(), tmp_path / "net.safetensors")
    for path in (tmp_path / "net.pt", tmp_path / "net.safetensors"):
        whole = path.read_bytes()
        for size in (0, 5, 9, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(DamagedFileError, match=f"{size} bytes cannot be read: it is dam"):
                load_network(path)
        path.write_bytes(whole[:20] + b"\xff" * 20 + whole[40:])
        with pytest.raises(DamagedFileError, match="cannot be read: it is damaged"):
            load_network(path)


class Evil:
    def __reduce__(self):
        return (open, ("/dev/null",))


def test_code_and_programs_in_a_file_are_not_run(tmp_path):
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        load_network(save({"x": Evil()}, tmp_path / "evil.ckpt"))
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "program.pt2", "w") as archive:  # as of torch.export
        archive.writestr("program/version", "3\n")
        archive.writestr("program/models/model.json", "{}")
    for name in ("script.pt", "program.pt2"):
        with pytest.raises(CheckpointError, match="holds a program and not weights"):
            load_network(tmp_path / name)


def other_names(state):
    """The keys that another implementation of the same network has, in the same order."""
    modules = list(dict.fromkeys(key.rpartition(".")[0] for key in state))
    parts = [(key.rpartition("."), value) for key, value in state.items()]
    return {
        f"part{modules.index(module):03}.{leaf}": value
        for (module, _, leaf), value in parts
        if leaf != "num_batches_tracked"
    }


def swapped(state):
    """One pair of a batch norm's equally large weights the other way round."""
    keys = list(state)
    keys[1], keys[2] = keys[2], keys[1]
    return {key: state[key] for key in keys}


SPEC = "torchvision:resnet18"


@pytest.mark.parametrize("classes", [1000, 7])
def test_weights_with_other_keys_load_by_order_on_request_alone(classes, tmp_path):
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=classes).eval()
    path = save({"model": other_names(net.state_dict())}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"all 102 shapes agree .* --weights-by-order"):
        load_network(path, network=SPEC)
    with pytest.warns(UserWarning, match=r"by order.*\n  conv1.weight <- part000.weight \[64"):
        loaded = load_network(path, network=SPEC, by_order=True)
    assert_same(loaded, net)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "change",
    [
        lambda s: dict(list(s.items())[:-1]),
        swapped,
        lambda s: {**s, "part000.weight": s["part000.weight"][:, :2]},
        lambda s: {**s, "part000.weight": s["part000.weight"][:9]},
    ],
)
def test_weights_that_disagree_in_number_kind_or_shape_load_by_no_order(change, tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torchvision.models.resnet18(num_classes=7))
    state = {key.removeprefix("1."): value for key, value in net[1].state_dict().items()}
    save(change(other_names(state)), tmp_path / "net.pth")
    for by_order in (False, True):
        with pytest.raises(CheckpointError, match="does not fit") as error:
            load_network(tmp_path / "net.pth", network=SPEC, by_order=by_order)
        assert "--weights-by-order" not in str(error.value)
    assert "do not agree in order either" in str(error.value)


def test_sorted_keys_are_in_no_order(tmp_path):
    """As of TensorFlow in safetensors: gamma is the weight, but comes after beta."""
    net, names = torch.nn.BatchNorm2d(3), ("gamma", "beta", "mean", "variance")
    state = dict(zip((f"bn.{n}" for n in names), net.state_dict().values(), strict=False))
    assert in_order(net, state)["weight"] == "bn.gamma"
    save_file(state, tmp_path / "net.safetensors")
    assert in_order(net, load_file(tmp_path / "net.safetensors")) == {}
