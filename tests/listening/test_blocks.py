import torch
from torch import nn

from fusenorm_openood.listening.structure import read_structure

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
