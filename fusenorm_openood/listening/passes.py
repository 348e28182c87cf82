"""One forward pass over a network that belongs to somebody else."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusenorm_openood.errors import TapError
from fusenorm_openood.listening.taps import listening
from fusenorm_openood.networks.t2fnorm import classification_feature, scores_apart

PIXELS = 2**14  # of the images that one thread of a CPU takes at a time


class Pass(NamedTuple):
    """What one forward pass over ``B`` images gives.

    norms: feature norms ``[L, B]``, one row a tap.
    feature: input of the last linear layer ``[B, D]``, None for a network without one.
    logits: what OOD scores are computed from ``[B, K]``, float32 at least: a last linear
        layer is applied in full precision where autocast or the network's own weights are half.
    pred: predicted classes ``[B]``.
    """

    norms: Tensor
    feature: Tensor | None
    logits: Tensor
    pred: Tensor


def forward_pass(
    net: nn.Module,
    images: Tensor,
    taps: Sequence[str] = (),
    reduce: Callable[[Tensor], Tensor] = torch.clone,
) -> Pass:
    """Run a network once and listen to its taps, its penultimate feature and its logits.

    A network that scores by other logits than it classifies by says so with a method
    ``forward_ood_inference``, as T2FNorm's does; that method gives the logits here.

    Raises:
        TapError: a tap as in :func:`listening`, or logits that are not ``[B, K]``.
    """
    head = final_linear(net)
    features: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        features.append(args[0])
        outputs.append(output)

    run = net.forward_ood_inference if scores_apart(net) else net
    handle = head.register_forward_hook(keep) if head is not None else None
    try:
        with listening(net, taps, reduce) as heard:
            logits = run(images)  # type: ignore[operator]
    finally:
        if handle is not None:
            handle.remove()
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise TapError(
            f"{type(net).__name__} returns {found}, no logits [B, K] of at least two classes: "
            "wrap it so that its forward returns them"
        )
    if head is not None and outputs and logits is outputs[-1]:
        logits = _in_full(head, features[-1], logits)
    norms = (
        torch.stack([heard[name] for name in taps]) if taps else logits.new_empty(0, len(images))
    )
    feature = features[-1] if features and features[-1].ndim == 2 else None
    classified = logits
    if scores_apart(net):
        with torch.no_grad():
            classified = _classify(net, images, head, feature)
    return Pass(norms, feature, logits, classified.detach().argmax(dim=1))


def joined(passes: Sequence[Pass]) -> Pass:
    """One pass from those of the parts of a batch, without their graphs."""
    norms, features, logits, preds = zip(*passes, strict=True)
    known = [feature.detach() for feature in features if feature is not None]
    return Pass(
        torch.cat(norms, dim=-1),
        torch.cat(known) if known else None,
        torch.cat([part.detach() for part in logits]),
        torch.cat(preds),
    )


def parts(images: Tensor, with_graph: bool = False) -> tuple[Tensor, ...]:
    """Images ``[B, C, H, W]``, as many at a time as a network takes without paying for it.

    A CPU's caches hold the feature maps of few, half as many with a graph for gradients, and the
    allocator hands those of many to the operating system and back with every layer; with too few
    the weights are what is read all the time. A device takes all.
    """
    if images.device.type != "cpu":
        return (images,)
    of_a_thread = max(PIXELS // max(images.shape[2:].numel(), 1), 4)
    return torch.split(images, torch.get_num_threads() * of_a_thread // (1 + with_graph))


def _classify(
    net: nn.Module, images: Tensor, head: nn.Linear | None, feature: Tensor | None
) -> Tensor:
    """Logits that a network classifies by where it scores by others."""
    normalised = None if feature is None else classification_feature(net, feature)
    if head is None or normalised is None:
        logits: Tensor = net(images)
        return logits
    return apply_head(head, normalised)


def apply_head(head: nn.Linear, feature: Tensor) -> Tensor:
    """Logits ``[B, K]`` of features ``[B, D]``, in float32 at least; see :class:`Pass`."""
    return _in_full(head, feature, head(feature))


def _in_full(head: nn.Linear, feature: Tensor, logits: Tensor) -> Tensor:
    if logits.dtype not in (torch.float16, torch.bfloat16):
        return logits
    bias = None if head.bias is None else head.bias.float()
    with torch.autocast(logits.device.type, enabled=False):
        return F.linear(feature.float(), head.weight.float(), bias)


def final_linear(net: nn.Module) -> nn.Linear | None:
    """The last linear layer of a network in the order of its modules, if it has one."""
    linear = [module for module in net.modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear else None
