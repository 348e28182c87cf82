"""Feature maps with channels last, tokens, tuples and mappings are read as what they are."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fusenorm_openood import FuseNorm, atf
from fusenorm_openood.network.layouts import as_maps, pixels, token_grid
from fusenorm_openood.network.structure import read_structure
from tests.nets import BLOCKS, CLASSES, Foo, Net, energy_detector, outputs_of, some_images


@pytest.mark.parametrize(
    ("tokens", "image", "prefix"),
    [
        (197, (224, 224), 1),  # ViT
        (198, (224, 224), 2),  # DeiT with a distillation token
        (201, (224, 224), 5),  # DINOv2 with registers
        (196, (224, 224), 0),
        (24, (64, 96), 0),
        (25, (64, 96), 1),
        (65, (32, 128), 1),
        (45, (16, 40), 5),  # not 1, which would leave a grid of 4 x 11
        (77, (64, 96), 0),  # 7 x 11, from overlapping patches
        (9, (96, 96), 0),
    ],
)
def test_prefix_tokens_leave_a_grid_of_the_images_aspect(tokens, image, prefix):
    assert token_grid(tokens, image)[0] == prefix


@pytest.mark.parametrize("layout", ["BCHW", "BHWC", "BNC", "NBC"])
def test_every_layout_holds_the_same_maps(layout):
    maps, image = torch.randn(2, 5, 4, 6), (2, 3, 16, 24)
    tokens = torch.cat([torch.full((2, 1, 5), 99.0), maps.flatten(2).mT], 1)
    given = {
        "BCHW": maps,
        "BHWC": maps.permute(0, 2, 3, 1).contiguous(),
        "BNC": tokens,
        "NBC": tokens.transpose(0, 1).contiguous(),
    }[layout]
    assert torch.equal(as_maps(given, layout, image), maps)
    assert pixels(given.shape, layout, image) == 24
    torch.testing.assert_close(atf(as_maps(given, layout, image)), atf(maps))


class Last(nn.Module):
    """A block `[B, H, W, C]`, as Swin's and ConvNeXt's."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(channels), nn.Linear(channels, channels)

    def forward(self, x):
        return x + F.gelu(self.fc(self.norm(x)))


class Merging(nn.Module):
    """Merges 2x2 pixels `[B, H, W, C]`, as between Swin's stages."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * channels, channels)

    def forward(self, x):
        b, h, w, c = x.shape
        x = (
            x.view(b, h // 2, 2, w // 2, 2, c)
            .permute(0, 1, 3, 2, 4, 5)
            .reshape(b, h // 2, -1, 4 * c)
        )
        return self.reduction(x)


class ChannelsLast(nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, channels, 2, 2)
        self.blocks = nn.Sequential(Last(channels), Last(channels))
        self.merging = Merging(channels)
        self.last = nn.Sequential(Last(channels), Last(channels))
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x):
        x = self.blocks(self.patch(x).permute(0, 2, 3, 1))
        return self.head(self.last(self.merging(x)).mean((1, 2)))


CHANNELS_LAST = ("blocks.0", "blocks.1", "last.0", "last.1")


# Cubes of 8 x 8 x 8, and maps whose height and width are the channels' number and the width.
@pytest.mark.parametrize("size", [(16, 16), (16, 24), (8, 64)])
def test_channels_last(size):
    net, images = ChannelsLast(), some_images(16, size)
    detector = FuseNorm(net, strong=["output"]).fit([images])
    assert detector.taps == CHANNELS_LAST
    expected = [atf(x.permute(0, 3, 1, 2)) for x in outputs_of(net, CHANNELS_LAST, images)]
    got = torch.tensor(detector.infer([images]).experts[:4])
    torch.testing.assert_close(got, torch.stack(expected).double())


@pytest.mark.parametrize("size", [(8, 8), (8, 4)])
def test_channels_first_where_channels_height_and_width_are_alike(size):
    net, images = Net(), some_images(16, size)
    expected = torch.stack([atf(x) for x in outputs_of(net, ("a.0", "a.1", "b.0", "b.1"), images)])
    got = torch.tensor(energy_detector(net, images).infer([images]).experts[:4])
    torch.testing.assert_close(got, expected.double())


def test_the_stages_of_a_channels_last_network():
    structure = read_structure(ChannelsLast(), some_images(2, (32, 16)))
    assert structure.stages(CHANNELS_LAST) == [["blocks.0", "blocks.1"], ["last.0", "last.1"]]
    assert [structure.pixels[name] for name in CHANNELS_LAST] == [128, 128, 32, 32]


class Tokens(nn.Module):
    """A transformer on patches: class tokens anywhere, axes in any order, images that are resized,
    tokens that are dropped or merged."""

    def __init__(
        self, prefix=1, start=0.0, size=None, drop=0, merge=0, patch=(4, 4), batch_first=True
    ):
        super().__init__()
        torch.manual_seed(0)
        self.start, self.size, self.drop, self.merge, self.count = start, size, drop, merge, prefix
        self.patch, self.dim = nn.Conv2d(3, 8, *patch), int(batch_first)  # axis of the tokens
        self.prefix = nn.Parameter(3 * torch.randn(1, prefix, 8))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=batch_first) for _ in range(3)
        )
        self.head = nn.Linear(8, CLASSES)
        self.eval()

    def forward(self, x):
        x = x if self.size is None else F.interpolate(x, size=self.size)
        patches, token = self.patch(x).flatten(2).mT, self.prefix.expand(len(x), -1, -1)
        at = int(self.start * patches.shape[1])
        x, self.seen = torch.cat([patches[:, :at], token, patches[:, at:]], 1), []
        for block in self.blocks:
            x = block(x if self.dim else x.transpose(0, 1))
            x = x if self.dim else x.transpose(0, 1)
            self.seen.append(torch.cat([x[:, :at], x[:, at + self.count :]], 1))
            if self.merge:  # the first patches, in pairs
                one, left = self.count + self.merge, self.count + 2 * self.merge
                pairs = (x[:, self.count : one] + x[:, one:left]) / 2
                x = torch.cat([x[:, : self.count], pairs, x[:, left:]], 1)
            x = x[:, : x.shape[1] - self.drop]
        return self.head(x.mean(1))

    def right(self, images):
        """Feature norms of what the blocks return, without the class tokens."""
        with torch.no_grad():
            self(images)
        return torch.stack([atf(x.mT.unsqueeze(-1)) for x in self.seen]).double()


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"prefix": 0}, (24, 24)),
        ({"batch_first": False}, (16, 40)),
        ({"prefix": 5, "batch_first": False}, (24, 24)),
        ({"start": 1.0}, (24, 24)),
        ({"start": 0.5, "prefix": 2}, (20, 20)),
        ({"start": 0.25, "prefix": 3}, (16, 40)),
        ({"size": (24, 24)}, (16, 40)),
        ({"size": (20, 12), "start": 1.0}, (32, 32)),
        ({"drop": 5}, (56, 56)),
        ({"drop": 5, "prefix": 0}, (56, 56)),
        ({"merge": 7, "prefix": 2}, (24, 40)),
        ({"patch": (16, 10), "prefix": 2}, (128, 98)),  # overlapping, as in AST
    ],
)
def test_tokens_without_those_that_are_no_patches(options, size):
    net, images = Tokens(**options), some_images(16, size)
    detector = energy_detector(net, images)
    assert detector.taps == ("blocks.0", "blocks.1", "blocks.2")
    found = torch.tensor(detector.infer([images]).experts[:3])
    torch.testing.assert_close(found, net.right(images))


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_a_class_token_anywhere_in_images_of_another_size(start):
    net, images = Tokens(start=start), some_images(16, (20, 20))
    detector = energy_detector(net, images)
    for size in ((24, 24), (12, 28)):
        others = some_images(8, size, seed=3)
        found = torch.tensor(detector.infer([others]).experts[:3])
        torch.testing.assert_close(found, net.right(others))


class Rows(nn.Module):
    """A recurrent network over the rows of an image."""

    def __init__(self, kind, batch_first, size):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.batch_first = kind(size, 32, 2, batch_first=batch_first), batch_first
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, x):
        x = x[:, 0] if self.batch_first else x[:, 0].transpose(0, 1)
        x = self.rnn(x)[0]
        return self.fc(x[:, -1] if self.batch_first else x[-1])


@pytest.mark.parametrize(
    ("kind", "batch_first", "size"),
    [(nn.LSTM, True, 28), (nn.LSTM, False, 32), (nn.GRU, False, 28), (nn.RNN, True, 32)],
)
def test_every_row_of_a_recurrent_network_is_a_pixel(kind, batch_first, size):
    net, images = Rows(kind, batch_first, size).eval(), torch.randn(16, 1, size, size)
    detector = energy_detector(net, images)
    assert detector.taps == ("rnn",)
    with torch.no_grad():
        rows = net.rnn(images[:, 0] if batch_first else images[:, 0].transpose(0, 1))[0]
        rows = rows if batch_first else rows.transpose(0, 1)
    right = atf(rows.mT.unsqueeze(-1)).double()
    torch.testing.assert_close(torch.tensor(detector.infer([images]).experts[0]), right)
    assert detector.known_structure.pixels["rnn"] == size


def test_the_batch_size_does_not_decide_the_layout_of_tokens():
    net, images = Tokens(0), some_images(20, (12, 12))  # 9 tokens
    detector = energy_detector(net, images)
    for batch in (1, 2, 9):
        alone = torch.cat([detector.score(part) for part in images.split(batch)])
        torch.testing.assert_close(alone, detector.score(images), rtol=1e-4, atol=1e-4)


class Wrapping(Foo):
    """A block whose feature map is wrapped in something, in which it has a place."""

    def __init__(self, wrap, place, stride):
        super().__init__(8, stride)
        self.wrap, self.place = wrap, place

    def forward(self, x):
        return self.wrap(super().forward(x if isinstance(x, torch.Tensor) else x[self.place]))


def gated(gate):
    """What a block returns that gives its gate, and more, before its gated map."""

    def wrap(y):
        first, *others = gate(y)
        return first, *others, y * (first[..., None, None] if first.ndim == 2 else first)

    return wrap


WRAPS = {
    "tuple": (lambda x: (x, x.mean((2, 3))), 0),
    "one": (lambda x: (x,), 0),
    "list": (lambda x: [x, None], 0),
    "dict": (lambda x: {"hidden_states": x, "attention": None}, "hidden_states"),
    "a gate of pixels": (gated(lambda y: (y.mean(1, keepdim=True).sigmoid(),)), -1),
    "a gate of other dimensions": (gated(lambda y: (y.mean((2, 3)).sigmoid(),)), -1),
    "weights of an attention": (
        gated(lambda y: (y.sigmoid(), y.flatten(2).mT @ y.flatten(2))),
        -1,
    ),
}


@pytest.mark.parametrize("kind", WRAPS)
def test_blocks_that_return_more_than_a_feature_map(kind):
    wrap, place = WRAPS[kind]

    class Wrapped(Net):
        def __init__(self):
            super().__init__()
            self.a, self.b = (
                nn.Sequential(Wrapping(wrap, place, stride), Wrapping(wrap, place, 1))
                for stride in (1, 2)
            )
            self.eval()

        def forward(self, x):
            return self.fc(self.b(self.a(self.stem(x)))[place].mean((2, 3)))

    net, images = Wrapped(), some_images()
    detector = energy_detector(net, images)
    assert detector.taps == BLOCKS
    right = torch.stack([atf(y[place]) for y in outputs_of(net, BLOCKS, images)]).double()
    torch.testing.assert_close(torch.tensor(detector.infer([images]).experts[:4]), right)
