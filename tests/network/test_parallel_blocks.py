"""Blocks that take several tensors, and networks with parallel trunks."""

import torch
from torch import nn

from fusenorm_openood.network.structure import read_structure

IMAGES = torch.randn(2, 3, 8, 8)


class Block(nn.Module):
    """A residual block that takes and returns a list, and may use the second tensor in it."""

    def __init__(self, uses_second):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.uses_second = uses_second

    def forward(self, given):
        x, second = given
        out = x + self.conv(x)
        return [out + second if self.uses_second else out, x]


class Net(nn.Module):
    def __init__(self, uses_second):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2)
        self.blocks = nn.ModuleList(Block(uses_second) for _ in range(3))
        self.second = nn.Parameter(torch.ones(4, 8, 8))

    def forward(self, x):
        x = self.stem(x)
        x, earlier = self.blocks[0]([x, self.second])
        x, earlier = self.blocks[1]([x, earlier])
        x, _ = self.blocks[2]([x, 2 * self.second])
        return self.fc(x.mean((2, 3)))


def test_blocks_may_be_given_earlier_tensors_and_what_comes_from_weights_only():
    structure = read_structure(Net(uses_second=False), IMAGES)
    assert structure.blocks == ("blocks.0", "blocks.1", "blocks.2")


def test_a_block_that_another_one_bypasses_is_not_on_the_trunk():
    structure = read_structure(Net(uses_second=True), IMAGES)
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
    assert read_structure(net, IMAGES).blocks == ("1", "2")


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
    structure = read_structure(Parallel(), IMAGES)
    assert structure.blocks == ()
    assert structure.rule.endswith("parallel trunks")
