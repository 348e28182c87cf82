"""Load networks from checkpoint files; the keys or a name determine the architecture."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from fusenorm_openood.errors import CheckpointError
from fusenorm_openood.network import named, resnet, states

ARCHITECTURES = (
    "ResNet18_32x32, ResNet18_224x224, ResNet50, WideResNet, CifarResNet, T2FNormNet around one"
)
WAY_OUT = "name any other network with --network, or network=... in Python"
_STEM = re.compile(r"((?:.*\.)?)conv1\.weight")
_TAU = re.compile(r"((?:.*\.)?)tau")
Build = Callable[[int], nn.Module]  # from the number of classes to a network


def load_network(
    path: str | Path,
    num_classes: int | None = None,
    network: str | None = None,
    image_size: int | None = None,
    by_order: bool = False,
) -> nn.Module:
    """The network of a checkpoint, in float32 on the CPU and in eval mode.

    Without `network`, the keys must be those of one of OpenOOD's networks, plain or T2FNorm's, or
    of a ResNet for CIFAR, whatever they begin with: `module.`, `_orig_mod.`, `model.`, `encoder.`.
    The weights may lie inside a training checkpoint, in any precision, or in a safetensors file.

    Args:
        path: checkpoint file.
        num_classes: expected number of classes; None = as in the checkpoint.
        network: the architecture, `torchvision:NAME`, `timm:NAME` or `package.module:factory`;
            None = recognise it by its keys.
        image_size: for networks that are built for one size; see `build_network`.
        by_order: where the keys of `network` are others, take weights by their order, if all agree
            in shape. A warning lists the pairs; only the accuracy shows whether they are right.

    Raises:
        CheckpointError: the file is missing or damaged, holds no known network, does not fit
            `network`, or has another number of classes.
        ConfigError: `network` cannot be built.

    Examples:
        >>> import tempfile, torch
        >>> from fusenorm_openood.network import CifarResNet
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(CifarResNet(20, num_classes=10).state_dict(), f"{folder}/resnet20.th")
        ...     load_network(f"{folder}/resnet20.th").architecture
        'ResNet-20'
    """
    state = states.load_state(path)
    if network is not None:
        return _load_named(path, state, num_classes, network, image_size, by_order)
    try:
        build, weights, tau = _recognise(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}: {WAY_OUT}") from None
    classes = len(weights["fc.weight"])
    check_classes(path, classes, num_classes)
    net = build(classes)
    if reason := states.misfit(net, weights):
        raise CheckpointError(
            f"{path} looks like a {type(net).__name__} but does not fit it ({reason}): the known "
            f"networks are {ARCHITECTURES}; {WAY_OUT}"
        )
    net.load_state_dict(weights)
    if tau is not None:
        net = resnet.T2FNormNet(net, classes)
        net.tau.copy_(tau)
    return net.eval()


def _load_named(
    path: str | Path,
    state: states.State,
    num_classes: int | None,
    network: str,
    image_size: int | None,
    by_order: bool,
) -> nn.Module:
    """A network that is built from its name, with the weights of a checkpoint."""
    net = named.build_network(network, num_classes, image_size)
    own = {states.without_wrappers(key): key for key in net.state_dict()}
    fitting = {own.get(key, key): value for key, value in states.aligned(state, own).items()}
    way_out = "name the network that it was saved from"
    ordered = states.in_order(net, fitting)
    if by_order and ordered:
        listed = (f"\n  {k} <- {v} {list(fitting[v].shape)}" for k, v in ordered.items())
        taken = f"the weights of {path} are taken by order, so check the accuracy:"
        warnings.warn(taken + "".join(listed), stacklevel=3)
        fitting = {ours: fitting[theirs] for ours, theirs in ordered.items()}
    elif by_order:
        way_out += ", its weights do not agree in order either"
    elif ordered:
        way_out += f" or, as all {len(ordered)} shapes agree in order, load it with "
        way_out += "--weights-by-order (by_order=True in Python)"
    pairs = [(v, fitting[key]) for key, v in net.state_dict().items() if key in fitting]
    rows = {  # of all weights of another shape, which may differ in the number of classes only
        len(theirs) if theirs.shape[1:] == ours.shape[1:] and theirs.ndim else None
        for ours, theirs in pairs
        if ours.shape != theirs.shape
    }
    if len(rows) == 1 and (classes := rows.pop()) is not None:
        check_classes(path, classes, num_classes)
        net = named.build_network(network, classes, image_size)
    if reason := states.misfit(net, fitting):
        raise CheckpointError(f"{path} does not fit the network {network} ({reason}): {way_out}")
    weights = net.state_dict()  # with the versions of its modules, which some of them check
    weights.update(fitting)
    net.load_state_dict(weights)
    return net


def load_backbone(net: nn.Module, path: str | Path) -> None:
    """Load a checkpoint's weights into a network; each may be plain or T2FNorm's."""
    target = net.backbone if isinstance(net, resnet.T2FNormNet) else net
    state = states.load_state(path)
    try:
        weights = _recognise(state)[1]
        reason = states.misfit(target, weights)
    except CheckpointError as error:
        reason = f"it {error}"
    if reason:
        raise CheckpointError(
            f"{path} does not fit {type(target).__name__} ({reason}): start from a checkpoint of "
            "that network"
        )
    target.load_state_dict(weights)


def check_classes(path: str | Path, classes: int, num_classes: int | None) -> None:
    """Raise CheckpointError unless a checkpoint has as many classes as the ID data set, if given.

    A single logit is that of two classes.
    """
    if num_classes is not None and max(classes, 2) != num_classes:
        raise CheckpointError(
            f"{path} must have {num_classes} classes, as the ID data set does, got {classes}: use "
            "a checkpoint and an ID data set that belong together"
        )


def _recognise(state: states.State) -> tuple[Build, states.State, Tensor | None]:
    """The one known network in a state dict, whatever its keys begin with.

    A function from the number of classes to the plain network, its state dict with a last layer
    called `fc`, and the temperature of a T2FNorm network: a `tau` beside a `backbone`.
    CheckpointError if there is no such network, or more than one.
    """
    found = dict[str, Build]()
    for place in (match[1] for key in state if (match := _STEM.fullmatch(key))):
        inside = {k.removeprefix(place): v for k, v in state.items() if k.startswith(place)}
        if build := _architecture(inside):
            found[place] = build
    if not found:
        raise CheckpointError(
            f"must hold the state dict of a known network ({ARCHITECTURES}), got the keys "
            f"{', '.join(sorted(state)[:3])}, ..."
        )
    if len(found) > 1:
        raise CheckpointError(
            f"must hold one network, got {len(found)}, under {', '.join(map(repr, found))}"
        )
    ((place, build),) = found.items()
    # The last layer may lie outside the network, as in encoder.conv1.weight and fc.weight.
    parts = place.split(".")[:-1]
    around = ["".join(f"{part}." for part in parts[:length]) for length in range(len(parts) + 1)]
    heads = [f"{level}{name}." for level in around for name in states.HEADS]
    heads = [head for head in heads if f"{head}weight" in state]
    if not heads:
        raise CheckpointError(
            "must hold a classifier, got a network without its last linear layer "
            f"({', '.join(states.HEADS)}), as self-supervised training saves it"
        )
    if len(heads) > 1:
        raise CheckpointError(f"must hold one last layer, got {' and '.join(map(repr, heads))}")
    taus = [(k, match[1]) for k in state if (match := _TAU.fullmatch(k))]
    tau = next((k for k, before in taus if place.startswith(f"{before}backbone.")), None)
    weights: states.State = {}
    for key, value in state.items():
        if key.startswith(heads[0]):
            weights["fc." + key.removeprefix(heads[0])] = value
        elif key.startswith(place):
            weights[key.removeprefix(place)] = value
        elif key != tau:
            raise CheckpointError(f"must hold nothing besides a known network, got {key!r}")
    return build, weights, None if tau is None else state[tau]


def _architecture(state: states.State) -> Build | None:
    """The plain network with these keys, if known."""

    def blocks(pattern: str) -> int:
        return len({match[1] for key in state if (match := re.match(pattern, key))})

    stem = state["conv1.weight"]
    if stem.ndim != 4:
        return None
    width, stages = len(stem), [blocks(rf"layer{s}\.(\d+)\.conv1") for s in range(1, 5)]
    if "block1.layer.0.conv1.weight" in state:
        depth = 6 * blocks(r"block1\.layer\.(\d+)\.") + 4
        widen = len(state["block1.layer.0.conv1.weight"]) // 16
        return lambda classes: resnet.WideResNet(depth, widen, classes)
    if not stages[3] and stages[0] and len(set(stages[:3])) == 1:
        return lambda classes: resnet.CifarResNet(6 * stages[0] + 2, classes, width)
    if "layer1.0.conv3.weight" in state:
        return resnet.ResNet50
    if "layer2.0.downsample.0.weight" in state:
        return resnet.ResNet18_224x224
    if "layer2.0.shortcut.0.weight" in state:
        return lambda classes: resnet.ResNet18_32x32(classes, width)
    return None


class NetworkKind(NamedTuple):
    """Training method under OpenOOD's name, architecture, number of ID classes."""

    training: str
    architecture: str
    classes: int

    def __str__(self) -> str:
        return f"{self.architecture} ({self.training}, {self.classes} classes)"


def network_kind(net: nn.Module, network: str | None = None) -> NetworkKind:
    """The kind of a network returned by `load_network`, with the same `network`.

    A plain network counts as trained with cross-entropy, since nothing in its keys says otherwise.
    """
    training = "T2FNorm" if isinstance(net, resnet.T2FNormNet) else "CrossEntropy"
    plain = net.backbone if isinstance(net, resnet.T2FNormNet) else net
    linear = [module for module in plain.modules() if isinstance(module, nn.Linear)]
    classes = linear[-1].out_features if linear else len(list(plain.parameters())[-1])
    name = getattr(plain, "architecture", type(plain).__name__)
    return NetworkKind(training, network.partition(":")[2] if network else name, classes)
