"""The forms in which public checkpoints save a network."""

import re
import tempfile
from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

from fusenorm_openood import load_network
from fusenorm_openood.errors import CheckpointError, DamagedFileError
from fusenorm_openood.network import ResNet18_32x32, ResNet18_224x224, T2FNormNet
from tests.conftest import make_net

PREFIXES = ["module.", "_orig_mod.", "model.", "net.", "network.", "backbone.", "encoder."]


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
    "a state dict": lambda s: s,
    **{f"prefix {prefix}": lambda s, p=prefix: under(p, s) for prefix in PREFIXES},
    "module._orig_mod.": lambda s: under("module._orig_mod.", s),
    "model.module.backbone.": lambda s: under("model.module.backbone.", s),
    "a compiled stage": lambda s: {k.replace("r2.", "r2._orig_mod."): v for k, v in s.items()},
    "another attribute": lambda s: under("classifier_net.", s),
    "encoder and fc": headed("encoder.", "fc."),
    "encoder and head": headed("encoder.", "head."),
    "backbone and linear": headed("backbone.", "linear."),
    "module.encoder and module.classifier": headed("module.encoder.", "module.classifier."),
    "linear": headed("", "linear."),
    "linear under net, with acc": lambda s: {"net": headed("", "linear.")(s), "acc": 9.5},
    **{
        f"under {name}": lambda s, name=name: training({name: s})
        for name in ("state_dict", "model", "net", "network", "model_state_dict", "model_state")
    },
    "state_dict inside model": lambda s: training({"model": {"state_dict": s}}),
    "prefix inside a container": lambda s: training({"state_dict": under("module.", s)}),
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
    "an optimiser first": lambda s: {"optimizer": OPTIMISER, "state_dict": s},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_public_form_loads_as_the_network_that_was_saved(form, tmp_path):
    net = make_net()
    torch.save(FORMS[form](net.state_dict()), tmp_path / "net.pt")
    assert_same(load_network(tmp_path / "net.pt"), net)


def assert_same(loaded, net, counters=False):
    """Equal weights and logits; checkpoints may lack the counters of batch normalisation."""
    assert type(loaded) is type(net)
    assert not loaded.training
    for key, value in net.state_dict().items():
        if counters or not key.endswith("num_batches_tracked"):
            assert torch.equal(loaded.state_dict()[key], value), key
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(images), net(images))


def test_averaged_weights_load_with_their_counter_left_out(tmp_path):
    net = make_net()
    averaged = AveragedModel(net)
    averaged.update_parameters(net)
    assert "n_averaged" in averaged.state_dict()
    torch.save(averaged.state_dict(), tmp_path / "net.pt")
    assert_same(load_network(tmp_path / "net.pt"), net)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("safe", [False, True])
def test_weights_of_any_precision_load_in_float32(dtype, safe, tmp_path):
    net = make_net()
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in net.state_dict().items()}
    (save_file if safe else torch.save)(state, tmp_path / "net.pt")
    net.load_state_dict(state)
    loaded = load_network(tmp_path / "net.pt")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert_same(loaded, net, counters=True)


@pytest.mark.parametrize("name", ["net.safetensors", "net.ckpt"])
@pytest.mark.parametrize("prefix", ["", "model.module."])
def test_safetensors_are_recognised_by_their_content(name, prefix, tmp_path):
    net = make_net()
    save_file(under(prefix, net.state_dict()), tmp_path / name)
    assert_same(load_network(tmp_path / name), net, counters=True)


def test_a_state_dict_with_a_safetensors_name_is_still_read(tmp_path):
    net = make_net()
    torch.save(net.state_dict(), tmp_path / "net.safetensors")
    assert_same(load_network(tmp_path / "net.safetensors"), net)


def test_torchs_legacy_format_loads(tmp_path):
    net = make_net()
    torch.save(net.state_dict(), tmp_path / "n.pth", _use_new_zipfile_serialization=False)
    assert_same(load_network(tmp_path / "n.pth"), net)


@pytest.mark.parametrize("prefix", ["", "module.", "model.encoder."])
def test_torchvisions_weights_load_as_openoods_network(prefix, tmp_path):
    theirs = torchvision.models.resnet18(num_classes=4).eval()
    torch.save(under(prefix, theirs.state_dict()), tmp_path / "net.pth")
    net = ResNet18_224x224(4).eval()
    net.load_state_dict(theirs.state_dict())
    assert_same(load_network(tmp_path / "net.pth"), net)


@settings(max_examples=40, deadline=None)
@given(
    prefixes=st.lists(st.sampled_from(PREFIXES), max_size=5),
    inner=st.sampled_from(["", "module.", "_orig_mod.", "model."]),
    t2fnorm=st.booleans(),
    separate=st.booleans(),
)
def test_any_nesting_of_prefixes_gives_the_same_network(prefixes, inner, t2fnorm, separate):
    net = make_net()
    state = under(inner, net.state_dict())
    if t2fnorm:
        net = T2FNormNet(net, 4)
        net.set_tau(0.1)
        state = {"tau": net.tau, **under("backbone.", state)}
    elif separate:
        state = headed("encoder.", "fc.")(net.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        torch.save(under("".join(prefixes), state), Path(folder) / "net.pt")
        loaded = load_network(Path(folder) / "net.pt", num_classes=4)
    assert_same(loaded, net.eval(), counters=True)


def test_a_backbone_without_tau_is_a_plain_network(tmp_path):
    torch.save(under("backbone.", make_net().state_dict()), tmp_path / "net.pt")
    assert type(load_network(tmp_path / "net.pt")) is ResNet18_32x32


def mlp_head(state):
    """SupCon's form: an encoder with a projection head."""
    body = {k: v for k, v in state.items() if not k.startswith("fc.")}
    return {"model": {**under("encoder.", body), "head.0.weight": torch.ones(32, 32)}}


def without_head(state):
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def narrow_head(state):
    return {**state, "fc.weight": state["fc.weight"][:, :-1]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_head, "must hold a classifier, got a network without its last linear layer"),
        (mlp_head, "must hold a classifier, got a network without its last linear layer"),
        (narrow_head, "'fc.weight' must be [4, 32], got [4, 31]"),
        (lambda s: {**s, "head.weight": s["fc.weight"]}, "one last layer, got 'fc.' and 'head.'"),
        (lambda s: {**under("a.", s), **under("b.", s)}, "one network, got 2, under 'a.', 'b.'"),
        (
            lambda s: {**under("model.", s), "normalize.mean": torch.zeros(3)},
            "must hold nothing besides a known network, got 'normalize.mean'",
        ),
        (lambda s: {**s, "extra.weight": torch.ones(2)}, "key 'extra.weight' is unexpected"),
        (lambda s: {"features.weight": s["fc.weight"]}, "the state dict of a known network"),
        (lambda s: {**s, "tau": torch.tensor(0.1)}, "key 'tau' is unexpected"),
    ],
)  # fmt: skip
def test_what_the_keys_do_not_say_clearly_is_an_error_with_the_way_out(change, message, tmp_path):
    torch.save(change(make_net().state_dict()), tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        load_network(tmp_path / "net.pt")
    assert str(error.value).startswith(str(tmp_path / "net.pt"))
    assert "with --network, or network=" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [{}, [1], {"optimizer": OPTIMISER}, OPTIMISER, {"model": {}, "epoch": 3}],
)
def test_a_file_without_weights_is_an_error(content, tmp_path):
    torch.save(content, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match="must hold a non-empty state dict of tensors, got a"):
        load_network(tmp_path / "net.pt")


def test_a_damaged_safetensors_file_is_an_error(tmp_path):
    path = tmp_path / "net.safetensors"
    save_file(make_net().state_dict(), path)
    whole = path.read_bytes()
    for size in (5, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(
            DamagedFileError, match=f"of {size} bytes cannot be read: it is damaged"
        ):
            load_network(path)
    path.write_bytes(whole[:20] + b"\xff" * 20 + whole[40:])
    with pytest.raises(DamagedFileError, match="cannot be read: it is damaged"):
        load_network(path)
