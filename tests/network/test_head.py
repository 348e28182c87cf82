"""The logits are a function of a feature, whatever layers or expressions they are made by."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fusenorm_openood import FuseNorm
from fusenorm_openood.detectors.single import SingleScore
from fusenorm_openood.errors import CheckpointError, DetectorFileError, TapError
from fusenorm_openood.forward.passes import forward_pass, head_of
from fusenorm_openood.network.checkpoints import check_classes
from fusenorm_openood.network.structure import Structure
from fusenorm_openood.network.understanding import understand
from tests.nets import CLASSES, Custom, Net, some_images

IMAGES = some_images(40)
PERCENTILE = 80.0
EXPERTS = ("output", "fdbd", "nci", "vim", "scale", "she")


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(math.prod(shape)))


class Made(Custom):
    """A head that is a function of the network and its feature, or of its feature map."""

    def __init__(self, run, classes=CLASSES, on_map=False, **parts):
        super().__init__(run, classes, **parts)
        self.on_map = on_map

    def forward(self, x):
        return self.run(self, self.b(self.a(self.stem(x))) if self.on_map else self.feature(x))


# Heads whose layers give the logits, as they are or summed


class Layered(Made):
    """Layers that are given `read(net, feature)`, and make the logits by `head`; then `end`."""

    def __init__(
        self,
        head=lambda s, x: s.fc(x),
        read=lambda s, f: f,
        end=lambda z: z,
        on_map=False,
        **parts,
    ):
        super().__init__(lambda s, f: end(head(s, read(s, f))), on_map=on_map, **parts)
        self.head, self.read = head, read

    def inputs(self, x):
        return self.read(self, self.b(self.a(self.stem(x))) if self.on_map else self.feature(x))

    def logits(self, x, c=None):
        return self.head(self, self.inputs(x).clamp(max=c))


LAYERS = {
    "plain": lambda: Layered(),
    "later": lambda: Layered(  # another order of registration
        read=lambda s, f: s.before(f), projection=nn.Linear(CLASSES, CLASSES),
        unused=nn.Linear(8, CLASSES), before=nn.Linear(8, 8),
    ),
    "temperature": lambda: Layered(lambda s, x: s.fc(x) / 0.3),
    "nested": lambda: Layered(
        fc=nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Linear(8, CLASSES), nn.Identity()))
    ),
    "two heads": lambda: Layered(  # as DeiT, averaged
        lambda s, x: (s.fc(x[:, :8]) + s.other(x[:, 8:])) / 2,
        lambda s, f: torch.cat([f, f.tanh()], 1), other=nn.Linear(8, CLASSES),
    ),
    "log_softmax": lambda: Layered(end=lambda z: z.log_softmax(1)),
    "softmax": lambda: Layered(end=lambda z: z.softmax(1)),
    "cosine": lambda: Layered(  # no linear function of what the layer is given
        lambda s, x: s.fc(x) / 0.1, lambda s, f: F.normalize(f), fc=nn.Linear(8, CLASSES, False)
    ),
    "normalised after": lambda: Layered(lambda s, x: F.layer_norm(s.fc(x), (CLASSES,))),
    "convolution": lambda: Layered(  # as SqueezeNet: a convolution, then pooling
        lambda s, x: s.fc(x).mean((2, 3)), on_map=True, fc=nn.Conv2d(8, CLASSES, 1)
    ),
    "tokens": lambda: Layered(
        lambda s, x: s.fc(x).mean(1), lambda s, f: f.flatten(2).mT, on_map=True
    ),
    "convolution on one pixel": lambda: Layered(  # as EfficientFormer and timm's ConvNets
        lambda s, x: s.fc(x).flatten(1), lambda s, f: f.mean((2, 3), keepdim=True), on_map=True,
        fc=nn.Conv2d(8, CLASSES, 1),
    ),
    "convolution with a kernel as large as its input": lambda: Layered(
        lambda s, x: s.fc(x).mean((2, 3)), on_map=True, fc=nn.Conv2d(8, CLASSES, 6)
    ),
}  # fmt: skip


def threshold_of(inputs):
    return float(np.percentile(inputs.detach().numpy(), PERCENTILE))


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_give_the_logits_and_react_clips_what_they_are_given(kind):
    net = LAYERS[kind]()
    baseline = SingleScore(net, "react", percentile=PERCENTILE).fit([IMAGES])
    with torch.no_grad():
        threshold, logits = threshold_of(net.inputs(IMAGES)), net.logits(IMAGES, torch.inf)
        clipped = net.logits(IMAGES, threshold)
    assert baseline.threshold_ == pytest.approx(threshold)
    pred, conf = baseline.predict(IMAGES)
    torch.testing.assert_close(conf.float(), clipped.logsumexp(1), rtol=1e-4, atol=1e-4)
    assert torch.equal(pred, logits.argmax(1))
    structure = understand(net, IMAGES)
    done = forward_pass(net, IMAGES, structure)
    torch.testing.assert_close(done.logits, logits)  # before any softmax
    if kind not in ("cosine", "normalised after"):
        # Those of a mean over pixels are no linear function of what is clipped before it.
        assert structure.head.is_linear == (kind not in ("convolution", "tokens"))
        found = F.linear(done.feature, *head_of(net, structure))
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)


def test_scale_on_two_heads_scales_both_of_their_inputs():
    net = LAYERS["two heads"]()
    net.read = lambda s, f: torch.cat([f.abs(), f.tanh().abs()], 1)  # SCALE's factor is finite
    net.run = lambda s, f: s.head(s, s.read(s, f))
    with torch.no_grad():
        f = net.inputs(IMAGES)
        cut = torch.sort(f, 1).values[:, int(f.shape[1] * 0.5)].unsqueeze(1)
        factor = (f.sum(1) / f.where(f >= cut, 0).sum(1)).exp().unsqueeze(1)
        logits = net.head(net, factor * f)
    got = SingleScore(net, "scale", percentile=50).score(IMAGES)
    torch.testing.assert_close(got.float(), logits.logsumexp(1), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # torch announces that it will be removed
def test_a_dynamically_quantised_head():
    net = torch.ao.quantization.quantize_dynamic(Layered(), {nn.Linear}, torch.qint8)
    baseline = SingleScore(net, "react", percentile=PERCENTILE).fit([IMAGES])
    with torch.no_grad():
        feature = net.feature(IMAGES)
        clipped = feature.clamp(max=threshold_of(feature))
        exact = F.linear(clipped, net.fc.weight().dequantize(), net.fc.bias())
    assert baseline.threshold_ == pytest.approx(threshold_of(feature))
    conf = baseline.score(IMAGES).float()
    torch.testing.assert_close(conf, exact.logsumexp(1), rtol=0.02, atol=0.02)
    assert torch.isfinite(FuseNorm(net).fit([IMAGES]).score(IMAGES)).all()


HEADLESS = {
    "prototypes": lambda: Made(
        lambda s, f: -torch.cdist(f, s.points), fc=nn.Identity(), points=drawn(CLASSES, 8)
    ),
    "channels": lambda: Made(lambda s, f: f[:, :CLASSES] + 0, fc=nn.Identity()),
}


@pytest.mark.parametrize("kind", HEADLESS)
def test_without_a_head_one_error_says_the_way_out(kind):
    net = HEADLESS[kind]()
    with pytest.raises(TapError, match=r"set strong=\['output'\]"):
        FuseNorm(net).fit([IMAGES])
    with pytest.raises(TapError, match="set react_percentile=None"):
        FuseNorm(net, strong=["output"], react_percentile=90.0).fit([IMAGES])
    with pytest.raises(TapError, match="ReAct needs the layers"):
        SingleScore(net, "react", percentile=90.0).fit([IMAGES])
    with torch.no_grad():
        expected = net(IMAGES).double().logsumexp(1)
    detector = FuseNorm(net, strong=["output"]).fit([IMAGES])
    torch.testing.assert_close(torch.tensor(detector.infer([IMAGES]).experts[-1]), expected)


def test_a_head_that_is_applied_twice_is_none():
    net = Made(lambda s, f: s.fc(f) + s.fc(f.flip(1)))
    assert understand(net, IMAGES).head.names == ()


def test_a_head_that_is_initialised_to_zero():
    net = Net()
    nn.init.zeros_(net.fc.weight)
    nn.init.zeros_(net.fc.bias)
    structure = understand(net, IMAGES)
    assert structure.head.names == ("fc",)
    assert structure.head.shares == (1.0,)


# Heads whose logits no layer's weights give


class Twin(Net):
    """The same logits from a plain linear layer, perhaps on the normalised feature."""

    def __init__(self, weight, bias=None, normalise=False):
        super().__init__(classes=len(weight))
        self.normalise = normalise
        with torch.no_grad():
            self.fc.weight.copy_(weight)
            self.fc.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)

    def forward(self, x):
        feature = self.feature(x)
        return self.fc(F.normalize(feature) if self.normalise else feature)


class Lora(nn.Linear):
    def __init__(self):
        super().__init__(8, CLASSES)
        self.down, self.up = nn.Parameter(drawn(2, 8)), nn.Parameter(drawn(CLASSES, 2))

    def forward(self, feature):
        return super().forward(feature) + feature @ self.down.T @ self.up.T


class Wrapper(nn.Module):  # as peft's
    def __init__(self):
        super().__init__()
        self.base_layer, self.dropout = nn.Linear(8, CLASSES), nn.Dropout(0.5)
        self.lora_A, self.lora_B = nn.Linear(8, 2, False), nn.Linear(2, CLASSES, False)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, feature):
        return self.base_layer(feature) + 3 * self.lora_B(self.lora_A(self.dropout(feature)))


class Several(nn.Module):  # multi-sample dropout
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, CLASSES)
        self.dropouts = nn.ModuleList(nn.Dropout(0.5) for _ in range(3))

    def forward(self, feature):
        return torch.stack([self.fc(dropout(feature)) for dropout in self.dropouts]).mean(0)


class Cosine(nn.Module):
    def __init__(self, name, bias=0.0):
        super().__init__()
        lengths = torch.tensor([1.0, 10.0, 0.1, 3.0, 1.0])
        self.name, self.bias = name, bias
        setattr(self, name, nn.Parameter(drawn(CLASSES, 8) * lengths[:, None]))

    def forward(self, feature):
        weight = getattr(self, self.name)
        return 16 * F.linear(F.normalize(feature), F.normalize(weight)) + self.bias


class Returning(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.forward = run


W = drawn(CLASSES, 8)


def one(net):
    return torch.cat([torch.zeros(1, 8), net.fc.weight]), F.pad(net.fc.bias, (1, 0))


# A network, and the weight and bias by hand; with True, of the normalised feature.
KINDS = {
    "LoRA inside": (
        lambda: Made(lambda s, f: s.head(f), head=Lora()),
        lambda s: (s.head.weight + s.head.up @ s.head.down, s.head.bias),
    ),
    "LoRA around": (
        lambda: Made(lambda s, f: s.head(f), head=Wrapper()),
        lambda s: (
            s.head.weight + 3 * s.head.lora_B.weight @ s.head.lora_A.weight,
            s.head.base_layer.bias,
        ),
    ),
    "LoRA beside": (
        lambda: Made(lambda s, f: s.fc(f) + s.up(s.down(f)), down=nn.Linear(8, 2),
                     up=nn.Linear(2, CLASSES)),
        lambda s: (s.fc.weight + s.up.weight @ s.down.weight, s.fc.bias + s.up(s.down.bias)),
    ),
    "bias outside": (
        lambda: Made(lambda s, f: s.fc(f) + s.bias, bias=drawn(CLASSES)),
        lambda s: (s.fc.weight, s.fc.bias + s.bias),
    ),
    "some classes, in another order": (
        lambda: Made(lambda s, f: s.fc(f)[:, [6, 0, 3]], classes=7),
        lambda s: (s.fc.weight[[6, 0, 3]], s.fc.bias[[6, 0, 3]]),
    ),
    "several dropouts": (
        lambda: Made(lambda s, f: s.head(f), head=Several()),
        lambda s: (s.head.fc.weight, s.head.fc.bias),
    ),
    "mean of heads": (
        lambda: Made(lambda s, f: (s.fc(f) + s.other(f)) / 2, other=nn.Linear(8, CLASSES)),
        lambda s: ((s.fc.weight + s.other.weight) / 2, (s.fc.bias + s.other.bias) / 2),
    ),
    "parts of the feature": (
        lambda: Made(lambda s, f: sum(fc(x) for fc, x in zip(s.fcs, f.chunk(2, 1), strict=True)),
                     fcs=nn.ModuleList(nn.Linear(4, CLASSES) for _ in range(2))),
        lambda s: (torch.cat([fc.weight for fc in s.fcs], 1), sum(fc.bias for fc in s.fcs)),
    ),
    "a product of thin matrices": (
        lambda: Made(lambda s, f: f @ s.v @ s.u.T + s.bias, v=drawn(8, 2), u=drawn(CLASSES, 2),
                     bias=drawn(CLASSES)),
        lambda s: (s.u @ s.v.T, s.bias),
    ),
    "a module that returns others as well": (
        lambda: Made(lambda s, f: s.head(s.both(f)[0])[0], head=Returning(lambda f: (f @ W.T, f)),
                     both=Returning(lambda f: (2 * f / 2, f))),
        lambda s: (W, None),
    ),
    "classes side by side": (
        lambda: Made(lambda s, f: torch.cat([s.fc(f), s.other(f)], 1), other=nn.Linear(8, 2)),
        lambda s: (
            torch.cat([s.fc.weight, s.other.weight]),
            torch.cat([s.fc.bias, s.other.bias]),
        ),
    ),
    "cat(0, z)": (
        lambda: Made(lambda s, f: F.pad(s.fc(f), (1, 0)), classes=1),
        one,
    ),
    "one logit [B, 1]": (lambda: Made(lambda s, f: s.fc(f), classes=1), one),
    "one logit [B]": (lambda: Made(lambda s, f: s.fc(f)[:, 0], classes=1), one),
    "one logit, squeezed": (lambda: Made(lambda s, f: s.fc(f).squeeze(), classes=1), one),
    "one logit without a module": (
        lambda: Made(lambda s, f: f @ s.w, w=drawn(8)),
        lambda s: (torch.stack([torch.zeros(8), s.w]), None),
    ),
    "one logit of a convolution": (
        lambda: Made(lambda s, f: s.conv(f).mean((2, 3)), on_map=True, conv=nn.Conv2d(8, 1, 1)),
        lambda s: (F.pad(s.conv.weight.flatten(1), (0, 0, 1, 0)), F.pad(s.conv.bias, (1, 0))),
    ),
    "cosine": (
        lambda: Made(lambda s, f: s.head(f), head=Cosine("weight")),
        lambda s: (16 * F.normalize(s.head.weight), None, True),
    ),
    "ArcFace, with a bias": (
        lambda: Made(lambda s, f: s.head(f), head=Cosine("kernel", 2.0)),
        lambda s: (16 * F.normalize(s.head.kernel), torch.full((CLASSES,), 2.0), True),
    ),
    "texts of CLIP": (
        lambda: Made(lambda s, f: s.scale.exp() * F.normalize(f) @ s.text.T,
                     scale=torch.tensor(2.0), text=F.normalize(drawn(CLASSES, 8))),
        lambda s: (s.scale.exp() * s.text, None, True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_are_an_affine_function_of_the_feature(kind):
    make, expected = KINDS[kind]
    net = make()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    weight, bias, is_normalised = (*expected(net), False)[:3]
    structure = understand(net, IMAGES)
    done = forward_pass(net, IMAGES, structure)
    with torch.no_grad():
        feature = net.feature(IMAGES)
        feature = F.normalize(feature) if is_normalised else feature
        logits = F.linear(feature, weight, bias)
    torch.testing.assert_close(done.feature, feature)
    torch.testing.assert_close(done.logits, logits, rtol=1e-4, atol=1e-5)
    found_weight, found_bias = head_of(net, structure)
    torch.testing.assert_close(found_weight, weight.detach(), rtol=2e-3, atol=2e-4)
    expected_bias = torch.zeros(len(weight)) if bias is None else bias.detach()
    torch.testing.assert_close(found_bias, expected_bias, rtol=2e-3, atol=2e-4)
    assert Structure.from_json(structure.to_json()) == structure
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(
    "kind", ["LoRA around", "parts of the feature", "one logit of a convolution", "texts of CLIP"]
)
def test_all_experts_score_as_with_the_merged_layer(kind):
    make, expected = KINDS[kind]
    net = make()
    twin = Twin(*(v.detach() if isinstance(v, torch.Tensor) else v for v in expected(net)))
    settings = {"strong": EXPERTS, "react_percentile": PERCENTILE, "output": "energy"}
    got = FuseNorm(net, **settings).fit([IMAGES]).infer([IMAGES[:9]])
    wanted = FuseNorm(twin, **settings).fit([IMAGES]).infer([IMAGES[:9]])
    np.testing.assert_allclose(got.experts, wanted.experts, rtol=2e-3, atol=2e-4)
    assert got.pred.tolist() == wanted.pred.tolist()


REFUSED = {
    "ReLU": lambda s, f: s.fc(f).relu(),
    "layer norm": lambda s, f: F.layer_norm(s.fc(f), (CLASSES,)),
    "clamp": lambda s, f: s.fc(f).clamp(-0.5, 0.5),
    "tanh": lambda s, f: 3 * s.fc(f).tanh(),
    "scaled by the feature": lambda s, f: s.fc(f) * f.norm(dim=1, keepdim=True),
    "hidden layer": lambda s, f: (f @ s.first).relu() @ s.second,
    "distances": lambda s, f: -torch.cdist(f, s.first.T[:CLASSES]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_logits_that_are_no_affine_function_are_refused_by_whoever_reads_weights(kind):
    net = Made(REFUSED[kind], first=drawn(8, 8), second=drawn(8, CLASSES))
    with pytest.raises(TapError, match="set strong=") as caught:
        FuseNorm(net).fit([IMAGES[:2]])
    assert "\n" not in str(caught.value)
    with pytest.raises(TapError, match="no linear function"):
        head_of(net, understand(net, IMAGES))


@pytest.mark.parametrize("expert", ["fdbd", "nci", "vim", "ash", "scale"])
def test_the_error_names_the_expert_that_reads_weights(expert):
    with pytest.raises(TapError, match=expert):
        FuseNorm(Made(REFUSED["ReLU"]), strong=("output", expert)).fit([IMAGES[:2]])


def test_experts_that_read_no_weights_do_with_any_head():
    net = Made(REFUSED["layer norm"])
    scored = FuseNorm(net, strong=("output", "mds++", "knn", "she", "gen")).fit([IMAGES])
    assert np.isfinite(scored.infer([IMAGES]).experts).all()


class Packed(torch.Tensor):
    """Integers and a scale, of which hardly any operation is known, as torchao's."""

    @staticmethod
    def of(weight):
        packed = torch.Tensor._make_wrapper_subclass(Packed, weight.shape, dtype=weight.dtype)
        packed.scale = weight.abs().max() / 127
        packed.integers = (weight / packed.scale).round()
        return packed

    def dequantize(self):
        return self.integers * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} of {cls.__name__}")


class PackedLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = Packed.of(drawn(CLASSES, 8)), nn.Parameter(drawn(CLASSES))

    def forward(self, feature):
        return F.linear(feature, self.weight.dequantize(), self.bias)


def test_weights_that_are_integers_and_scales():
    net = Made(lambda s, f: s.head(f), head=PackedLinear())
    twin = Twin(net.head.weight.dequantize(), net.head.bias.detach())
    got, wanted = (
        FuseNorm(n, strong=("output", "fdbd", "nci")).fit([IMAGES]).infer([IMAGES[:5]]).experts
        for n in (net, twin)
    )
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "parts of the feature"])
def test_a_saved_detector_finds_the_head_again(kind, tmp_path):
    net = KINDS[kind][0]()
    detector = FuseNorm(net, strong=("output", "nci", "fdbd")).fit([IMAGES])
    detector.save(tmp_path / "d.safetensors")
    again = FuseNorm.load(tmp_path / "d.safetensors", net)
    torch.testing.assert_close(again.score(IMAGES[:1]), detector.score(IMAGES[:1]))
    with pytest.raises(DetectorFileError):
        FuseNorm.load(tmp_path / "d.safetensors", KINDS["LoRA inside"][0]())


@pytest.mark.parametrize("shape", ["[B, 1]", "[B]"])
def test_the_classes_of_one_logit_are_0_and_1(shape):
    net = KINDS[f"one logit {shape}"][0]()
    with torch.no_grad():
        net.fc.bias -= net(IMAGES).median()
        z = net(IMAGES).reshape(-1).double()
    detector = FuseNorm(net, output="energy").fit([IMAGES])
    for count in (1, 2, 3):
        pred, _ = detector.predict(IMAGES[:count])
        assert pred.tolist() == (z[:count] > 0).long().tolist()
    energy = detector.infer([IMAGES]).experts[4]
    np.testing.assert_allclose(energy, F.softplus(z), rtol=1e-5)

    def run(s, f):
        z = s.fc(f).reshape(net(IMAGES[: len(f)]).shape)
        return {"probability": z.sigmoid(), "score": z}

    beside = Made(run, classes=1)  # its probability
    beside.load_state_dict(net.state_dict())
    got = FuseNorm(beside, output="energy").fit([IMAGES]).infer([IMAGES]).experts
    np.testing.assert_allclose(got, detector.infer([IMAGES]).experts, rtol=1e-5)


def test_what_is_one_logit_and_what_is_not():
    for run in (
        lambda s, f: s.fc(f).mean(0)[:2],  # [2], whatever the batch
        lambda s, f: s.fc(f).sum(),
    ):
        with pytest.raises(TapError, match="must return logits"):
            understand(Made(run), IMAGES[:2])
    net = Made(lambda s, f: (f[:, 0], s.fc(f), f[:, :1]))
    assert understand(net, IMAGES[:2]).classes == CLASSES
    check_classes("a.ckpt", 1, 2)
    with pytest.raises(CheckpointError):
        check_classes("a.ckpt", 1, 3)


@pytest.mark.parametrize("half", [torch.bfloat16, "autocast"])
def test_logits_are_computed_in_full_precision_where_the_network_is_half(half):
    net, images = Net(), IMAGES
    full = net(images)
    if half != "autocast":
        net, images = net.to(half), images.to(half)
    with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"), torch.no_grad():
        done = forward_pass(net, images, understand(net, images))
    exact = done.feature.float() @ net.fc.weight.float().T + net.fc.bias.float()
    assert done.feature.dtype == torch.bfloat16
    assert done.logits.dtype == torch.float32
    torch.testing.assert_close(done.logits, exact)
    torch.testing.assert_close(done.logits, full, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("make", [KINDS["LoRA inside"][0], LAYERS["convolution"]])
def test_in_half_precision_the_logits_of_any_head_are_in_float32(make):
    net, images = make().bfloat16(), IMAGES.bfloat16()
    done = forward_pass(net, images, understand(net, images))
    assert done.logits.dtype == torch.float32
    torch.testing.assert_close(done.logits, net(images).float(), rtol=0.05, atol=0.05)
