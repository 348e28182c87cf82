"""Experts read the weights that the logits come from, whatever module or expression holds them."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fusenorm_openood import FuseNorm
from fusenorm_openood.cli.taps import describe_head
from fusenorm_openood.errors import CheckpointError, DetectorFileError, TapError
from fusenorm_openood.forward.panel import Panel
from fusenorm_openood.forward.passes import forward_pass
from fusenorm_openood.forward.react import head_of
from fusenorm_openood.method.posthoc import Posthoc
from fusenorm_openood.network.checkpoints import check_classes
from fusenorm_openood.network.structure import Structure
from fusenorm_openood.network.understanding import understand
from tests.nets import CLASSES, Net, some_images

IMAGES = some_images(40)
EXPERTS = ("output", "fdbd", "nci", "vim", "scale", "she")
READING = ("fdbd", "nci", "vim", "ash", "scale")


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(math.prod(shape)))


class Made(Net):
    """A head that is a function of the network and its feature, or of its feature map."""

    def __init__(self, run, classes=CLASSES, on_map=False, **parts):
        super().__init__(classes=classes)
        self.run, self.on_map = run, on_map
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)
        self.eval()

    def forward(self, x):
        return self.run(self, self.b(self.a(self.stem(x))) if self.on_map else self.feature(x))


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


class Masked(nn.Linear):
    def __init__(self):
        super().__init__(8, CLASSES)
        self.register_buffer("mask", (drawn(CLASSES, 8) > 0).float())

    def forward(self, feature):
        return F.linear(feature, self.weight * self.mask, self.bias)


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
    "mask": (
        lambda: Made(lambda s, f: s.head(f), head=Masked()),
        lambda s: (s.head.weight * s.head.mask, s.head.bias),
    ),
    "bias outside": (
        lambda: Made(lambda s, f: s.fc(f) + s.bias, bias=drawn(CLASSES)),
        lambda s: (s.fc.weight, s.fc.bias + s.bias),
    ),
    "a temperature for each class": (
        lambda: Made(lambda s, f: s.fc(f) / s.t, t=drawn(CLASSES).exp()),
        lambda s: (s.fc.weight / s.t[:, None], s.fc.bias / s.t),
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
    "centred logits": (
        lambda: Made(lambda s, f: s.fc(f) - s.fc(f).mean(1, keepdim=True)),
        lambda s: (s.fc.weight - s.fc.weight.mean(0), s.fc.bias - s.fc.bias.mean()),
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
    "a matrix without a module": (
        lambda: Made(lambda s, f: f @ s.matrix, matrix=drawn(8, CLASSES)),
        lambda s: (s.matrix.T, None),
    ),
    "cat(0, z)": (
        lambda: Made(lambda s, f: F.pad(s.fc(f), (1, 0)), classes=1),
        one,
    ),
    "stack(-z, z)": (
        lambda: Made(lambda s, f: torch.cat([-s.fc(f), s.fc(f)], 1), classes=1),
        lambda s: (
            torch.cat([-s.fc.weight, s.fc.weight]),
            torch.cat([-s.fc.bias, s.fc.bias]),
        ),
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
def test_all_experts_score_as_with_the_merged_layer(kind):
    make, by_hand = KINDS[kind]
    net = make()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    twin = Twin(*(v.detach() if isinstance(v, torch.Tensor) else v for v in by_hand(net)))
    settings = {"strong": EXPERTS, "react_percentile": 80.0, "output": "energy"}
    got = FuseNorm(net, **settings).fit([IMAGES]).infer([IMAGES[:9]])
    wanted = FuseNorm(twin, **settings).fit([IMAGES]).infer([IMAGES[:9]])
    np.testing.assert_allclose(got.experts, wanted.experts, rtol=2e-3, atol=2e-4)
    assert got.pred.tolist() == wanted.pred.tolist()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("kind", ["LoRA around", "texts of CLIP", "one logit [B]"])
def test_the_head_is_that_of_the_feature_live_and_as_text(kind):
    make, by_hand = KINDS[kind]
    net = make()
    structure = understand(net, IMAGES)
    weight, bias = head_of(net, structure)
    torch.testing.assert_close(weight, by_hand(net)[0].detach(), rtol=1e-5, atol=1e-5)
    done = forward_pass(net, IMAGES, structure)
    torch.testing.assert_close(done.feature @ weight.T + bias, done.logits, rtol=1e-4, atol=1e-4)
    assert "linear function" in describe_head(structure)
    assert Structure.from_json(structure.to_json()) == structure


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
    structure = understand(net, IMAGES)
    done = forward_pass(net, IMAGES, structure)
    for expert in READING:
        with pytest.raises(TapError, match=expert):
            Panel((), (), (), (Posthoc.of(expert),)).seen(net, structure, done)
    with pytest.raises(TapError, match="no linear function"):
        head_of(net, structure)


def test_experts_that_read_no_weights_do_with_any_head():
    net = Made(REFUSED["layer norm"])
    scored = FuseNorm(net, strong=("output", "mds", "knn", "she", "gen")).fit([IMAGES])
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


def test_in_half_precision_the_logits_are_those_of_the_whole_head():
    net, images = KINDS["LoRA inside"][0]().bfloat16(), IMAGES.bfloat16()
    done = forward_pass(net, images, understand(net, images))
    assert done.logits.dtype == torch.float32
    torch.testing.assert_close(done.logits, net(images).float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "kind", ["cosine", "one logit [B]", "mean of heads", "parts of the feature"]
)
def test_a_saved_detector_finds_the_head_again(kind, tmp_path):
    net = KINDS[kind][0]()
    detector = FuseNorm(net, strong=("output", "nci", "fdbd")).fit([IMAGES])
    detector.save(tmp_path / "d.safetensors")
    again = FuseNorm.load(tmp_path / "d.safetensors", net)
    torch.testing.assert_close(again.score(IMAGES[:1]), detector.score(IMAGES[:1]))
    with pytest.raises(DetectorFileError):
        FuseNorm.load(tmp_path / "d.safetensors", KINDS["mask"][0]())


@pytest.mark.parametrize("kind", ["cosine", "one logit [B, 1]"])
def test_an_exported_program_has_the_same_head(kind, tmp_path):
    net = KINDS[kind][0]()
    detector = FuseNorm(net, strong=("output", "nci", "fdbd")).fit([IMAGES])
    exported = detector.export(tmp_path / "d.pt2", shape=(3, 12, 12))
    logits, conf = torch.export.load(exported.path).module()(IMAGES[:3])
    np.testing.assert_allclose(conf.detach(), detector.score(IMAGES[:3]), rtol=1e-4, atol=1e-4)
    assert logits.shape == (3, understand(net, IMAGES).classes)


class TestOneLogit:
    @pytest.mark.parametrize("shape", ["[B, 1]", "[B]"])
    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_classes_are_0_and_1(self, shape, count):
        net = KINDS[f"one logit {shape}"][0]()
        with torch.no_grad():
            net.fc.bias -= net(IMAGES).median()
            z = net(IMAGES[:count]).reshape(-1).double()
        detector = FuseNorm(net, output="energy").fit([IMAGES])
        pred, _ = detector.predict(IMAGES[:count])
        assert pred.tolist() == (z > 0).long().tolist()
        energy = detector.infer([IMAGES[:count]]).experts[4]
        np.testing.assert_allclose(energy, F.softplus(z), rtol=1e-5)

    def test_two_images_are_not_two_classes(self):
        for run in (
            lambda s, f: s.fc(f).mean(0)[:2],  # [2], whatever the batch
            lambda s, f: s.fc(f).sum(),
        ):
            with pytest.raises(TapError, match="must return logits"):
                understand(Made(run), IMAGES[:2])

    def test_among_others_the_logits_of_several_classes_are_taken(self):
        net = Made(lambda s, f: (f[:, 0], s.fc(f), f[:, :1]))
        assert understand(net, IMAGES[:2]).classes == CLASSES

    @pytest.mark.parametrize("shape", ["[B, 1]", "[B]"])
    def test_beside_its_probability(self, shape):
        def run(s, f):
            z = s.fc(f) if shape == "[B, 1]" else s.fc(f)[:, 0]
            return {"probability": z.sigmoid(), "score": z}

        net = Made(run, classes=1)
        got, wanted = (
            FuseNorm(n).fit([IMAGES]).infer([IMAGES[:3]]).experts
            for n in (net, KINDS[f"one logit {shape}"][0]())
        )
        np.testing.assert_allclose(got, wanted, rtol=1e-5)

    def test_a_checkpoint_of_one_logit_is_for_two_classes(self):
        check_classes("a.ckpt", 1, 2)
        with pytest.raises(CheckpointError):
            check_classes("a.ckpt", 1, 3)
