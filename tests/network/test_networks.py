import pytest
import torch
import torchvision
from torch.nn import functional as F

from fusenorm_openood import load_network
from fusenorm_openood.errors import CheckpointError, ConfigError
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


def t2fnorm(classes=5):
    net = T2FNormNet(ResNet18_32x32(classes, width=4), classes)
    net.set_tau(0.1)
    return net


NETWORKS = {
    "ResNet18_32x32": lambda: ResNet18_32x32(5),
    "narrow": lambda: ResNet18_32x32(5, width=8),
    "ResNet18_224x224": lambda: ResNet18_224x224(5),
    "ResNet50": lambda: ResNet50(5),
    "WideResNet": lambda: WideResNet(16, 2, 5),
    "CifarResNet": lambda: CifarResNet(20, 5, width=8),
    "T2FNorm": t2fnorm,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_checkpoint_loads_as_the_network_that_was_saved(name, tmp_path):
    torch.manual_seed(0)
    net = NETWORKS[name]().eval()
    torch.save(net.state_dict(), tmp_path / "best.ckpt")
    loaded = load_network(tmp_path / "best.ckpt", num_classes=5)
    assert type(loaded) is type(net)
    assert not loaded.training
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), net(images))


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"T2FNorm"}))
def test_networks_return_features_and_their_classifier(name):
    net = NETWORKS[name]().eval()
    with torch.no_grad():
        logits, feature = net(torch.randn(2, 3, 32, 32), return_feature=True)
        assert torch.equal(net.get_fc_layer()(feature), logits)
    assert feature.shape == (2, net.feature_size)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(ResNet18_224x224, "resnet18"), (ResNet50, "resnet50")]
)
def test_large_networks_equal_torchvisions(ours, theirs):
    torch.manual_seed(0)
    reference = getattr(torchvision.models, theirs)(num_classes=5).eval()
    net = ours(5).eval()
    net.load_state_dict(reference.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(net(images), reference(images))


@pytest.mark.parametrize("channels", [8, 7])
def test_a_block_with_a_padding_shortcut_equals_its_formula(channels):
    torch.manual_seed(0)
    block = PaddingBlock(4, channels, 2)
    block(torch.randn(64, 4, 9, 9))  # running statistics other than 0 and 1
    block.double().eval()
    s = {key: value.detach() for key, value in block.state_dict().items()}

    def normalised(x, name):
        mean, var, weight, bias = (
            s[f"{name}.{key}"].view(-1, 1, 1)
            for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    x = torch.randn(3, 4, 9, 9, dtype=torch.float64)
    y = normalised(F.conv2d(x, s["conv1.weight"], stride=2, padding=1), "bn1").clamp(min=0)
    y = normalised(F.conv2d(y, s["conv2.weight"], padding=1), "bn2")
    first = (channels - 4) // 2
    y[:, first : first + 4] += x[:, :, ::2, ::2]
    with torch.no_grad():
        torch.testing.assert_close(block(x), y.clamp(min=0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("depth", "size"), [(20, 269722), (32, 464154), (56, 853018)])
def test_resnets_for_cifar_have_the_papers_size_and_are_recognised(depth, size, tmp_path):
    net = CifarResNet(depth)
    assert sum(p.numel() for p in net.parameters()) == size
    loaded = load_network(save(net.state_dict(), tmp_path / "net.th"))
    assert str(network_kind(loaded)) == f"ResNet-{depth} (CrossEntropy, 10 classes)"


@pytest.mark.parametrize("key", ["layer3.2.bn2.bias", "layer2.1.conv1.weight", "bn1.weight"])
def test_a_resnet_for_cifar_with_a_key_missing_is_rejected(key, tmp_path):
    state = {f"module.{k}": v for k, v in CifarResNet(20).state_dict().items() if k != key}
    with pytest.raises(CheckpointError, match="CifarResNet"):
        load_network(save({"state_dict": state}, tmp_path / "cut.th"))


def test_t2fnorm_forwards_equal_their_formulas():
    torch.manual_seed(0)
    net = t2fnorm().eval()
    images = torch.randn(6, 3, 32, 32)
    with torch.no_grad():
        feature = net.backbone(images, return_feature=True)[1].double()
        w, b = net.backbone.fc.weight.double(), net.backbone.fc.bias.double()
        unit = feature / feature.norm(dim=1, keepdim=True)
        torch.testing.assert_close(net(images).double(), unit / 0.1 @ w.T + b, rtol=1e-5, atol=1e-5)
        scoring = net.forward_ood_inference(images).double()
        torch.testing.assert_close(scoring, feature / 0.1 @ w.T + b, rtol=1e-5, atol=1e-5)


def test_t2fnorm_of_imagenet_scores_without_temperature():
    torch.manual_seed(0)
    net = T2FNormNet(ResNet18_32x32(1000, width=2), 1000).eval()
    net.set_tau(0.05)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(net.forward_ood_inference(images), net.backbone(images))


@pytest.mark.parametrize("change", ["half", "module", "state_dict"])
def test_checkpoints_saved_in_other_ways_load(change, tmp_path):
    net = ResNet18_32x32(5, width=8)
    state = net.state_dict()
    if change == "half":
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    if change == "module":
        state = {f"module.{k}": v for k, v in state.items()}
    torch.save({"state_dict": state} if change == "state_dict" else state, tmp_path / "c.pt")
    loaded = load_network(tmp_path / "c.pt")
    assert next(loaded.parameters()).dtype == torch.float32
    torch.testing.assert_close(loaded.fc.weight, net.fc.weight, rtol=1e-3, atol=1e-4)


def save(state, path):
    torch.save(state, path)
    return path


def test_checkpoints_that_do_not_fit_are_rejected(tmp_path):
    net = ResNet18_32x32(5, width=8)
    good = save(net.state_dict(), tmp_path / "good.ckpt")
    with pytest.raises(CheckpointError, match=r"good\.ckpt must have 10 classes, .* got 5"):
        load_network(good, num_classes=10)
    with pytest.raises(CheckpointError, match=r"none\.ckpt not found"):
        load_network(tmp_path / "none.ckpt")
    cut = tmp_path / "cut.ckpt"
    for size in (0, 100, len(good.read_bytes()) // 2):
        cut.write_bytes(good.read_bytes()[:size])
        with pytest.raises(CheckpointError, match=f"of {size} bytes cannot be read: it is damaged"):
            load_network(cut)
    other = save(torchvision.models.mobilenet_v3_small().state_dict(), tmp_path / "mobile.ckpt")
    with pytest.raises(
        CheckpointError, match=r"must hold the state dict of a known network \(ResNet18_32x32"
    ):
        load_network(other)
    state = {k: v for k, v in net.state_dict().items() if not k.startswith("layer3.1")}
    with pytest.raises(CheckpointError, match="looks like a ResNet18_32x32 but does not fit it"):
        load_network(save(state, tmp_path / "partial.ckpt"))
    with pytest.raises(
        CheckpointError, match="must hold a non-empty state dict of tensors, got a list"
    ):
        load_network(save([1, 2], tmp_path / "list.ckpt"))


class Evil:
    def __reduce__(self):
        return (open, ("/dev/null",))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        load_network(save({"x": Evil()}, tmp_path / "evil.ckpt"))


def test_a_program_is_no_checkpoint(tmp_path):
    layer, image = torch.nn.Linear(2, 2), torch.zeros(1, 2)
    torch.jit.trace(layer, image).save(tmp_path / "script.pt")
    torch.export.save(torch.export.export(layer, (image,)), tmp_path / "program.pt2")
    for name in ("script.pt", "program.pt2"):
        with pytest.raises(CheckpointError, match="holds a program and not weights"):
            load_network(tmp_path / name)


def test_depth_of_a_wide_resnet_is_checked():
    with pytest.raises(ConfigError, match=r"depth must be 6n \+ 4.*got 17"):
        WideResNet(17)
