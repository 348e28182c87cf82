import torch
from torch.nn import functional as F

from fusenorm_openood.network.graph import Graph, inputs_of, reachable

WEIGHT = torch.randn(3, 3, 1, 1)


def leaf(channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, 4, 4).requires_grad_()


def kinds(nodes) -> list[str]:
    return [node.name().rstrip("0123456789") for node in nodes]


def test_the_trunk_of_a_chain_is_the_whole_chain():
    images = leaf()
    logits = F.conv2d(images.clone(), WEIGHT).relu().mean((2, 3))
    graph = Graph(logits, images)
    assert kinds(graph.trunk) == [
        "MeanBackward",
        "ReluBackward",
        "ConvolutionBackward",
        "CloneBackward",
        "torch::autograd::AccumulateGrad",
    ]
    assert list(graph.trunk.values()) == [0, 1, 2, 3, 4]
    assert not graph.merges()


def test_branches_are_no_part_of_the_trunk():
    images = leaf()
    x = images.clone()
    logits = (x.relu() + F.conv2d(x.sigmoid(), WEIGHT)).mean((2, 3))
    trunk = kinds(Graph(logits, images).trunk)
    assert trunk == [
        "MeanBackward",
        "AddBackward",
        "CloneBackward",
        "torch::autograd::AccumulateGrad",
    ]


def test_merges_come_in_the_order_of_the_images():
    images = leaf()
    x = images.clone()
    added = x + F.conv2d(x, WEIGHT)
    joined = torch.cat([added, F.conv2d(added, WEIGHT)], 1)
    assert kinds(Graph(joined.mean((2, 3)), images).merges()) == ["AddBackward", "CatBackward"]


def test_an_addition_in_place_is_a_merge():
    images = leaf()
    x = images.clone()
    whole = F.conv2d(x, WEIGHT)
    whole += x
    part = F.conv2d(whole, WEIGHT)
    part[:, :2] += whole[:, :2]
    merges = kinds(Graph(part.mean((2, 3)), images).merges())
    assert merges[0] == "AddBackward"
    assert "CopySlices" in merges[1]


def test_a_sum_without_weights_on_its_branches_is_no_merge():
    images = leaf()
    x = images.clone()
    swish = x.relu() + x.sigmoid()
    assert not Graph(swish.mean((2, 3)), images).merges()
    assert not Graph((swish + 1 + torch.ones(4)).mean((2, 3)), images).merges()


def test_no_path_to_the_images_is_an_empty_trunk():
    images = leaf()
    frozen = images.detach().mul(torch.ones(1, requires_grad=True))
    graph = Graph(frozen.mean((2, 3)), images)
    assert not graph.trunk
    assert not graph.merges()


def test_the_weights_are_no_part_of_the_graph():
    images, weight = leaf(), WEIGHT.clone().requires_grad_()
    scaled = weight * 2
    graph = Graph(F.conv2d(images.clone(), scaled).mean((2, 3)), images)
    assert scaled.grad_fn not in graph.children


def test_the_first_wanted_nodes_on_every_path():
    images = leaf()
    one, two = F.conv2d(images.clone(), WEIGHT), F.conv2d(images.clone(), WEIGHT)
    graph = Graph((one.relu() + two).mean((2, 3)), images)
    wanted = {one.grad_fn, two.grad_fn}
    assert set(graph.first_on_every_path(wanted)) == wanted
    assert graph.first_on_every_path({one.grad_fn}) == []


def test_the_nodes_that_a_value_is_computed_from():
    x = leaf().clone()
    y = x.relu()
    z = y * 2
    assert {x.grad_fn, y.grad_fn} <= reachable([z.grad_fn], inputs_of)
    assert z.grad_fn not in reachable([y.grad_fn], inputs_of)
