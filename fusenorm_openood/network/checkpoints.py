"""Load networks from checkpoint files; the keys or a name determine the architecture."""

from pathlib import Path

from torch import nn

from fusenorm_openood.errors import CheckpointError
from fusenorm_openood.network.named import build_network
from fusenorm_openood.network.recognition import ARCHITECTURES, recognise
from fusenorm_openood.network.resnet import T2FNormNet
from fusenorm_openood.network.states import State, aligned, load_state, misfit, without_wrappers

WAY_OUT = "name any other network with --network, or network=... in Python"


def load_network(
    path: str | Path,
    num_classes: int | None = None,
    network: str | None = None,
    image_size: int | None = None,
) -> nn.Module:
    """The network of a checkpoint, in float32 on the CPU and in evaluation mode.

    Without `network`, the keys must be those of one of OpenOOD's networks, plain or T2FNorm's, or
    of a ResNet for CIFAR, whatever they begin with: `module.`, `_orig_mod.`, `model.`, `encoder.`.
    The weights may lie inside a training checkpoint, in any precision, or in a safetensors file.

    Args:
        path: checkpoint file.
        num_classes: expected number of classes; None = as in the checkpoint.
        network: the architecture, `torchvision:NAME`, `timm:NAME` or `package.module:factory`;
            None = recognise it by its keys.
        image_size: for networks that are built for one size; see `build_network`.

    Raises:
        CheckpointError: the file is missing or damaged, holds no known network, does not fit
            `network`, or has another number of classes.
        ConfigError: `network` cannot be built.
    """
    state = load_state(path)
    if network is not None:
        return _load_named(path, state, num_classes, network, image_size)
    try:
        found = recognise(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}: {WAY_OUT}") from None
    if num_classes is not None:
        check_classes(path, found.classes, num_classes)
    net = found.build(found.classes)
    if reason := misfit(net, found.weights):
        raise CheckpointError(
            f"{path} looks like a {type(net).__name__} but does not fit it ({reason}): the known "
            f"networks are {ARCHITECTURES}; {WAY_OUT}"
        )
    net.load_state_dict(found.weights)
    if found.tau is not None:
        net = T2FNormNet(net, found.classes)
        net.tau.copy_(found.tau)
    return net.eval()


def _load_named(
    path: str | Path, state: State, num_classes: int | None, network: str, image_size: int | None
) -> nn.Module:
    """A network that is built from its name, with the weights of a checkpoint."""
    net = build_network(network, num_classes, image_size)
    own = {without_wrappers(key): key for key in net.state_dict()}
    fitting = {own.get(key, key): value for key, value in aligned(state, own).items()}
    classes = _other_classes(net, fitting)
    if classes is not None:
        if num_classes is not None:
            check_classes(path, classes, num_classes)
        net = build_network(network, classes, image_size)
    if reason := misfit(net, fitting):
        raise CheckpointError(
            f"{path} does not fit the network {network} ({reason}): name the network that it was "
            "saved from"
        )
    weights = net.state_dict()  # with the versions of its modules, which some of them check
    weights.update(fitting)
    net.load_state_dict(weights)
    return net


def _other_classes(net: nn.Module, state: State) -> int | None:
    """The number of classes in a state dict, if that is all that it differs from a network in."""
    pairs = [(v, state[key]) for key, v in net.state_dict().items() if key in state]
    differing = [(ours, theirs) for ours, theirs in pairs if ours.shape != theirs.shape]
    rows = {
        len(theirs) if theirs.shape[1:] == ours.shape[1:] and theirs.ndim else None
        for ours, theirs in differing
    }
    return rows.pop() if len(rows) == 1 else None


def load_backbone(net: nn.Module, path: str | Path) -> None:
    """Load a checkpoint's weights into a network; each may be plain or T2FNorm's.

    Raises:
        CheckpointError: the checkpoint is damaged or does not fit the network.
    """
    target = net.backbone if isinstance(net, T2FNormNet) else net
    state = load_state(path)
    try:
        weights = recognise(state).weights
        reason = misfit(target, weights)
    except CheckpointError as error:
        reason = f"it {error}"
    if reason:
        raise CheckpointError(
            f"{path} does not fit a {type(target).__name__} ({reason}): start from a checkpoint of "
            "that network"
        )
    target.load_state_dict(weights)


def check_classes(path: str | Path, classes: int, num_classes: int) -> None:
    """Raise CheckpointError unless a checkpoint has as many classes as the ID data set.

    A single logit is that of two classes.
    """
    if max(classes, 2) != num_classes:
        raise CheckpointError(
            f"{path} must have {num_classes} classes, as the ID data set does, got {classes}: use "
            "a checkpoint and an ID data set that belong together"
        )
