"""Networks whose blocks are not the modules on one plain trunk, with the right feature maps."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor

from fusenorm_openood import FuseNorm, atf
from fusenorm_openood.network.structure import read_structure
from tests.nets import BLOCKS, CLASSES, Custom, Foo, Net, energy_detector, norms_of, some_images

IMAGES = some_images(24, (32, 32))


class Depths(Net):
    """A head that reads three depths."""

    def __init__(self, kind):
        super().__init__()
        self.c = nn.Sequential(Foo(8, 2), Foo(8))
        self.kind, self.heads = kind, nn.ModuleList(nn.Linear(8, CLASSES) for _ in range(3))
        self.bilinear = nn.Parameter(torch.randn(CLASSES, 8, 8))
        self.lateral = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(3))
        self.fc = nn.Linear(24 if kind == "pooled" else 8, CLASSES)
        self.eval()

    def forward(self, x):
        maps = [self.stem(x)]
        for stage in (self.a, self.b, self.c):
            maps.append(stage(maps[-1]))
        first, second, third = maps[1:]
        pooled = [x.mean((2, 3)) for x in maps[1:]]
        size = first.shape[2:]
        if self.kind == "gated":
            return self.fc(pooled[2] * pooled[0].sigmoid())
        if self.kind == "bilinear":
            return torch.einsum("bi,bj,kij->bk", pooled[1], pooled[2], self.bilinear)
        if self.kind == "pooled":
            return self.fc(torch.cat(pooled, 1))
        if self.kind == "auxiliary":
            logits = [head(x) for head, x in zip(self.heads, pooled, strict=True)]
            return 0.3 * logits[0] + 0.3 * logits[1] + logits[2]
        if self.kind == "last two":
            return self.heads[0](pooled[2] + pooled[1])
        if self.kind == "weighted":
            return self.heads[0](torch.stack(pooled, 2) @ torch.tensor([0.2, 0.3, 0.5]))
        if self.kind == "low and high":  # as LR-ASPP
            gate = third.mean((2, 3), keepdim=True).sigmoid()
            high = F.interpolate(self.lateral[2](third) * gate, size=size)
            return self.fc((high + self.lateral[0](first)).mean((2, 3)))
        x = self.lateral[2](third)  # a feature pyramid
        for lateral, earlier in ((self.lateral[1], second), (self.lateral[0], first)):
            x = lateral(earlier) + F.interpolate(x, size=earlier.shape[2:])
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize(
    "kind",
    ["pooled", "auxiliary", "last two", "weighted", "low and high", "pyramid", "gated", "bilinear"],
)
def test_a_head_that_reads_several_depths_hides_no_block(kind):
    structure = read_structure(Depths(kind), IMAGES)
    assert structure.blocks == (*BLOCKS, "c.0", "c.1")
    assert not structure.notes


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(channels), nn.Linear(channels, 3 * channels)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return (q @ k.mT).softmax(-1) @ v


class Sums(nn.Module):
    """Residual sums in the forward of the whole encoder, as in vit-pytorch."""

    def __init__(self, depth, channels=8):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    Attention(channels),
                    nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, channels)),
                ]
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(channels)

    def forward(self, x):
        self.seen = []
        for attention, mlp in self.layers:
            self.seen.append(attention(x) + x)
            x = mlp(self.seen[-1]) + self.seen[-1]
            self.seen.append(x)
        return self.norm(x)


class Encoder(nn.Module):
    def __init__(self, depth):
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.token = nn.Conv2d(3, 8, 8, 8), nn.Parameter(torch.randn(1, 1, 8))
        self.encoder, self.fc = Sums(depth), nn.Linear(8, CLASSES)
        self.eval()

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), self.patch(x).flatten(2).mT], 1)
        return self.fc(self.encoder(x)[:, 0])


def test_sums_in_the_forward_of_the_encoder_are_tapped_where_they_are_read():
    depth, net = 3, Encoder(3)
    detector = energy_detector(net, IMAGES)
    assert len(detector.taps) == 2 * depth
    experts = torch.tensor(detector.infer([IMAGES]).experts)
    with torch.no_grad():
        net(IMAGES)
        right = [atf(x[:, 1:].mT.unflatten(2, (4, 4))) for x in net.encoder.seen]
    torch.testing.assert_close(experts[: 2 * depth], torch.stack(right).double())


class Stacked(nn.Module):
    """Residual sums in the network's own forward, as in ResNet9."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.one = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))
        self.eval()

    def forward(self, x):
        x = self.stem(x)
        self.first = self.one(x) + x
        x = self.down(self.first)
        self.second = self.two(x) + x
        return self.head(self.second)


def test_taps_of_inputs_are_saved_and_loaded(tmp_path):
    net = Encoder(2)
    detector = energy_detector(net, IMAGES)
    detector.save(tmp_path / "detector.safetensors")
    again = FuseNorm.load(tmp_path / "detector.safetensors", net)
    assert any(tap.endswith(":input") for tap in again.taps)
    torch.testing.assert_close(again.score(IMAGES), detector.score(IMAGES))


def test_sums_in_the_network_s_own_forward():
    net = Stacked()
    detector = energy_detector(net, IMAGES)
    experts = torch.tensor(detector.infer([IMAGES]).experts)
    with torch.no_grad():
        net(IMAGES)
        right = torch.stack([atf(net.first), atf(net.second)]).double()
    torch.testing.assert_close(experts[:2], right)
    again = FuseNorm(net, taps=detector.taps, strong=["output"]).fit([IMAGES])
    torch.testing.assert_close(again.score(IMAGES), detector.score(IMAGES))


class Extracted(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.backbone = create_feature_extractor(net, {"avgpool": "feature"})
        self.fc = net.fc
        self.eval()

    def forward(self, x):
        return self.fc(self.backbone(x)["feature"].flatten(1))


@pytest.mark.filterwarnings("error::UserWarning:fusenorm_openood")
@pytest.mark.parametrize("trace", [torch.fx.symbolic_trace, Extracted])
def test_a_traced_network_is_tapped_as_the_network_that_it_was_made_from(trace):
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=CLASSES).eval()
    blocks = tuple(f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1))
    images = IMAGES[:8]
    detector = energy_detector(trace(net), images)
    right = norms_of(net, blocks, images).double()
    torch.testing.assert_close(torch.tensor(detector.infer([images]).experts[:8]), right)


def test_what_no_block_holds_is_told(recwarn):
    def parallel(net, x):  # a second backbone beside the blocks
        x = net.b(net.a(net.stem(x)))
        return net.fc((x + net.beside(x)).mean((2, 3)))

    net = Custom(parallel, beside=nn.Sequential(*(nn.Conv2d(8, 8, 3, 1, 1) for _ in range(12))))
    assert FuseNorm(net, strong=["output"]).fit([IMAGES]).taps == BLOCKS
    said = [str(w.message) for w in recwarn if "no block holds" in str(w.message)]
    assert len(said) == 1
    assert "beside" in said[0]
    assert "taps=" in said[0]
    recwarn.clear()
    FuseNorm(net, strong=["output"], taps=["a.0", "beside"]).fit([IMAGES])
    assert not [w for w in recwarn if "no block holds" in str(w.message)]


def test_notes_and_prefixes_survive_json():
    structure = read_structure(Encoder(2), IMAGES)
    assert {tuple(structure.prefixes[tap]) for tap in structure.blocks} == {(1, 0.0)}
    assert "mixes" in structure.to_json()
    assert type(structure).from_json(structure.to_json()) == structure
