"""Blocks are what merges branches on the trunk; the names of classes and modules say nothing."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusenorm_openood import FuseNorm, Settings
from fusenorm_openood.errors import TapError
from fusenorm_openood.network.graph import Graph
from fusenorm_openood.network.structure import read_structure
from tests.nets import BLOCKS, Custom, Foo, Net, energy_detector, norms_of, some_images, within

IMAGES, SMALL = some_images(), some_images(2, (8, 8))


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


def frozen(context):
    """A linear probe on a backbone that runs in a context."""
    feature = within(context, Net.feature)
    return lambda net, x: net.fc(feature(net, x).clone())


FROZEN = {
    "no_grad": frozen(torch.no_grad),
    "inference_mode": frozen(torch.inference_mode),
    "set_grad_enabled": frozen(lambda: torch.set_grad_enabled(False)),
    "detach": lambda net, x: net.fc(net.feature(x).detach()),
    "data": lambda net, x: net.fc(net.feature(x).data),
    "in the middle": lambda net, x: net.fc(net.b(net.a(net.stem(x)).detach()).mean((2, 3))),
}


@pytest.mark.parametrize("mode", FROZEN)
def test_a_backbone_that_runs_without_gradients_is_read_as_any_other(mode):
    net = Custom(FROZEN[mode])
    assert energy_detector(net, IMAGES).taps == BLOCKS
    assert torch.is_grad_enabled()
    with pytest.raises(TapError, match=r"gradient of the logits .* none reaches"):
        FuseNorm(net, strong=["output"], output="odin").fit([IMAGES])


def test_names_of_classes_decide_only_where_no_gradient_can_reach_the_images():
    class BasicBlock(Foo):
        pass

    net = Custom(lambda net, x: net.fc(torch.from_numpy(net.feature(x).detach().numpy())))
    with pytest.raises(TapError, match=r"name the modules to tap.*no gradient reaches"):
        FuseNorm(net).fit([IMAGES])
    net.a, net.b = nn.Sequential(BasicBlock(8), BasicBlock(8)), nn.Sequential(BasicBlock(8))
    structure = read_structure(net.eval(), IMAGES)
    assert structure.blocks == ("a.0", "a.1", "b.0")
    assert "no gradient" in structure.rule
    with pytest.warns(UserWarning, match=r"no gradient reaches .* taps="):
        FuseNorm(net).fit([IMAGES])


class ListBlock(nn.Module):
    """A residual block that takes and returns a list, and may use the second tensor in it."""

    def __init__(self, uses_second):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.uses_second = uses_second

    def forward(self, given):
        x, second = given
        out = x + self.conv(x)
        return [out + second if self.uses_second else out, x]


class ListNet(nn.Module):
    def __init__(self, uses_second):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2)
        self.blocks = nn.ModuleList(ListBlock(uses_second) for _ in range(3))
        self.second = nn.Parameter(torch.ones(4, 8, 8))

    def forward(self, x):
        x = self.stem(x)
        x, earlier = self.blocks[0]([x, self.second])
        x, earlier = self.blocks[1]([x, earlier])
        x, _ = self.blocks[2]([x, 2 * self.second])
        return self.fc(x.mean((2, 3)))


def test_blocks_may_be_given_earlier_tensors_and_what_comes_from_weights_only():
    structure = read_structure(ListNet(uses_second=False), SMALL)
    assert structure.blocks == ("blocks.0", "blocks.1", "blocks.2")


def test_a_block_that_another_one_bypasses_is_not_on_the_trunk():
    structure = read_structure(ListNet(uses_second=True), SMALL)
    assert structure.blocks == ("blocks.2",)


class Concatenation(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.left, self.right = (nn.Conv2d(4, 2, 2, stride) for _ in range(2))

    def forward(self, x):
        return torch.cat([self.left(x), self.right(x)], dim=1)


class Mixed(nn.Module):
    """A residual block, or two concatenations at different resolutions without a shortcut."""

    def __init__(self, stride):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        if stride > 1:
            self.conv = nn.Sequential(Concatenation(1), Concatenation(stride))
        self.has_shortcut = stride == 1

    def forward(self, x):
        return x + self.conv(x) if self.has_shortcut else self.conv(x)


def test_a_block_may_merge_at_several_resolutions_if_others_of_its_class_do_not():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), Mixed(1), Mixed(2), nn.Flatten(), nn.Linear(36, 2))
    assert read_structure(net, SMALL).blocks == ("1", "2")


class Parallel(nn.Module):
    """Two trunks that meet in the logits, between a stem and a last module."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.trunks = nn.ModuleList(
            nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(3))) for _ in range(2)
        )
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        x = self.trunks[0](x) * self.trunks[1](x)
        return self.fc(self.norm(x).mean((2, 3)))


def test_the_ends_of_parallel_trunks_are_no_taps():
    structure = read_structure(Parallel(), SMALL)
    assert structure.blocks == ()
    assert structure.rule.endswith("parallel trunks")


class Fork(nn.Module):
    """Branches whose mean are the logits, behind some layers."""

    def __init__(self, before: nn.Module, *branches: nn.Module) -> None:
        super().__init__()
        self.before, self.branches = before, nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return torch.stack([branch(x) for branch in self.branches]).mean(0)


def two_convolutions() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 16, 3), nn.ReLU())


def pooled(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


HEADS = {
    "linear": pooled,
    "MLP": lambda: nn.Sequential(pooled(), nn.ReLU(), nn.Linear(5, 5)),
    "1x1": lambda: nn.Sequential(nn.Conv2d(16, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "depthwise": lambda: pooled(nn.Conv2d(16, 16, 3, groups=16)),
}


@pytest.mark.parametrize("head", HEADS)
def test_several_heads_on_one_feature_are_no_parallel_trunks(head):
    net = Fork(two_convolutions(), *(HEADS[head]() for _ in range(3)))
    assert read_structure(net, SMALL).blocks == ("before.1", "before.3")


def test_parallel_trunks_without_convolutions_are_no_heads():
    def trunk() -> nn.Sequential:
        return nn.Sequential(*(nn.Linear(192, 192) for _ in range(3)), nn.Linear(192, 5))

    flat = nn.Sequential(nn.Flatten(), nn.Identity())
    assert read_structure(Fork(flat, trunk(), trunk()), SMALL).blocks == ()
    deep = (pooled(*(nn.Conv2d(16, 16, 1) for _ in range(3))) for _ in range(2))
    assert read_structure(Fork(two_convolutions(), *deep), SMALL).blocks == ()


def leaf() -> Tensor:
    return torch.randn(2, 3, 4, 4).requires_grad_()


def test_a_sum_without_weights_on_its_branches_is_no_merge():
    images = leaf()
    x = images.clone()
    swish = x.relu() + x.sigmoid()
    assert not Graph(swish.mean((2, 3)), images).merges()
    assert not Graph((swish + 1 + torch.ones(4)).mean((2, 3)), images).merges()


def test_the_first_wanted_nodes_on_every_path():
    images, weight = leaf(), torch.randn(3, 3, 1, 1)
    one, two = (F.conv2d(images.clone(), weight) for _ in range(2))
    graph = Graph((one.relu() + two).mean((2, 3)), images)
    wanted = {one.grad_fn, two.grad_fn}
    assert set(graph.first_on_every_path(wanted)) == wanted
    assert graph.first_on_every_path({one.grad_fn}) == []
