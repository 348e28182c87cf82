"""Blocks are what merges branches on the trunk; the names of classes and modules say nothing."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusenorm_openood import FuseNorm, Settings
from fusenorm_openood.errors import TapError
from fusenorm_openood.network.structure import read_structure
from tests.nets import BLOCKS, Foo, Net, energy_detector, norms_of, some_images

IMAGES = some_images()


class FakeBlock(nn.Sequential):
    """Named like a block, and none."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*(layers or (nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU())))


def blocks_of(net: nn.Module) -> tuple[str, ...]:
    return read_structure(net, IMAGES).blocks


def test_a_residual_block_needs_no_name_of_one():
    net = Net()
    detector = FuseNorm(net).fit([IMAGES])
    assert detector.taps == BLOCKS
    experts = detector.infer([IMAGES]).experts
    torch.testing.assert_close(torch.tensor(experts[:4]), norms_of(net, BLOCKS, IMAGES).double())


def test_stages_and_the_strong_block_come_from_resolutions():
    net = Net()
    assert FuseNorm(net, taps="stages").fit([IMAGES]).taps == ("a.1", "b.1")
    settings = Settings.published(output="energy", react_percentile=None)
    assert FuseNorm(net, settings).fit([IMAGES]).strong == ("b.0", "output")
    settings = settings.replace(taps=("b.1", "b.0", "a.0"))
    assert FuseNorm(net, settings).fit([IMAGES]).strong == ("a.0", "output")


def test_an_averaged_copy_of_the_network_is_not_tapped():
    net = Net()
    net.ema = copy.deepcopy(net)
    net.spare = FakeBlock()
    assert energy_detector(net, IMAGES).taps == BLOCKS


@pytest.mark.parametrize("kind", ["auxiliary", "detached", "inner", "stem"])
def test_a_module_with_the_name_of_a_block_off_the_trunk_is_no_tap(kind):
    class Odd(Net):
        def __init__(self):
            super().__init__()
            self.fake = FakeBlock() if kind != "stem" else FakeBlock(nn.Conv2d(3, 8, 3, 1, 1))
            if kind == "inner":
                self.a[0].conv2 = FakeBlock()
            if kind == "stem":
                self.stem = self.fake

        def forward(self, x):
            x = self.a(self.stem(x))
            if kind == "auxiliary":
                self.seen = self.fake(x)
            if kind == "detached":
                with torch.no_grad():
                    gate = self.fake(x).mean((2, 3), keepdim=True).sigmoid()
                x = x * gate
            return self.fc(self.b(x).mean((2, 3)))

    assert energy_detector(Odd().eval(), IMAGES).taps == BLOCKS


def test_a_stage_is_no_tap_even_if_its_class_is_that_of_a_block():
    class Stage(Foo):
        def __init__(self, channels, stride):
            nn.Module.__init__(self)
            self.one, self.two = Foo(channels, stride), Foo(channels)

        def forward(self, x):
            return self.two(self.one(x))

    net = Net()
    net.a, net.b = Stage(8, 1), Stage(8, 2)
    assert blocks_of(net) == ("a.one", "a.two", "b.one", "b.two")


def test_a_stage_around_merges_of_its_own_is_one_block():
    class Stage(nn.Module):  # adds branches in its own forward
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, 1, 1) for _ in range(3))

        def forward(self, x):
            for conv in self.convs:
                x = x + conv(x).relu()
            return x

    net = Net()
    net.a, net.b = Stage(), nn.Sequential(nn.MaxPool2d(2), Stage())
    assert blocks_of(net) == ("a", "b.1")


class InPlace(Foo):
    def forward(self, x):
        y = self.conv2(self.conv1(x).relu_())
        y += self.skip(x)
        return y.relu_()


class Gated(Foo):
    def forward(self, x):
        y = self.conv2(F.silu(self.conv1(x)))
        y = y * y.mean((2, 3), keepdim=True).sigmoid()
        return torch.lerp(self.skip(x), y, 0.3)


class Part(Foo):
    def forward(self, x):
        y = self.conv2(self.conv1(x).relu())
        y[:, :4] += self.skip(x)[:, :4]
        return y


class Minus(Foo):
    def forward(self, x):
        return self.skip(x) - self.conv2(self.conv1(x).relu())


class Concatenating(Foo):  # as Inception and ShuffleNet do
    def forward(self, x):
        return torch.cat([self.skip(x)[:, :4], self.conv2(self.conv1(x).relu())[:, 4:]], 1)


class MergesInside(Foo):  # as Res2Net does: a merge inside one branch
    def forward(self, x):
        y = self.conv1(x).relu()
        y = torch.cat([y[:, :4], (y + self.conv2(y))[:, 4:]], 1)
        return self.skip(x) + y


class ParallelBranches(Foo):  # both branches are convolutions
    def forward(self, x):
        x = self.skip(x)
        return self.conv2(x) + self.conv2(x.flip(-1)).flip(-1)


@pytest.mark.parametrize(
    "block", [InPlace, Gated, Part, Minus, Concatenating, MergesInside, ParallelBranches]
)
def test_every_way_to_merge_branches_makes_a_block(block):
    net = Net()
    net.a, net.b = nn.Sequential(block(8), block(8)), nn.Sequential(block(8), block(8))
    net.b.insert(0, nn.MaxPool2d(2))
    detector = energy_detector(net.eval(), IMAGES)
    assert detector.taps == ("a.0", "a.1", "b.1", "b.2")


def test_without_merges_the_last_module_of_each_resolution_is_tapped():
    net = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 6, 3, 1, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, 1, 1), nn.Tanh()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    ).eval()
    assert energy_detector(net, IMAGES).taps == ("2", "7")


def without_gradient(mode):
    """A linear probe on a frozen backbone."""

    class Probe(Net):
        def forward(self, x):
            if mode == "inference_mode":
                with torch.inference_mode():
                    x = self.feature(x)
                x = x.clone()
            elif mode == "no_grad":
                with torch.no_grad():
                    x = self.feature(x)
            elif mode == "set_grad_enabled":
                with torch.set_grad_enabled(False):
                    x = self.feature(x)
            elif mode == "in the middle":
                x = self.b(self.a(self.stem(x)).detach()).mean((2, 3))
            elif mode == "numpy":
                x = torch.from_numpy(self.feature(x).detach().numpy())
            else:
                x = {"detach": Tensor.detach, "data": lambda x: x.data}[mode](self.feature(x))
            return self.fc(x)

    return Probe().eval()


@pytest.mark.parametrize(
    "mode", ["no_grad", "inference_mode", "set_grad_enabled", "detach", "data", "in the middle"]
)
def test_a_backbone_that_runs_without_gradients_is_read_as_any_other(mode):
    net = without_gradient(mode)
    assert energy_detector(net, IMAGES).taps == BLOCKS
    assert torch.is_grad_enabled()
    with pytest.raises(TapError, match=r"gradient of the logits .* none reaches"):
        FuseNorm(net, strong=["output"], output="odin").fit([IMAGES])


def test_names_of_classes_decide_only_where_no_gradient_can_reach_the_images():
    class BasicBlock(Foo):
        pass

    net = without_gradient("numpy")
    with pytest.raises(TapError, match=r"name the modules to tap.*no gradient reaches"):
        FuseNorm(net).fit([IMAGES])
    net.a, net.b = nn.Sequential(BasicBlock(8), BasicBlock(8)), nn.Sequential(BasicBlock(8))
    structure = read_structure(net.eval(), IMAGES)
    assert structure.blocks == ("a.0", "a.1", "b.0")
    assert "no gradient" in structure.rule
    with pytest.warns(UserWarning, match=r"no gradient reaches .* taps="):
        FuseNorm(net).fit([IMAGES])
