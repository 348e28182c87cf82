"""One forward pass through an arbitrary network."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusenorm_openood.errors import TapError
from fusenorm_openood.listening.taps import listening
from fusenorm_openood.networks.t2fnorm import classification_feature, has_scoring_logits

PIXELS = 2**14  # image pixels that one CPU thread processes at a time


class Pass(NamedTuple):
    """Result of one forward pass over `B` images.

    Attributes:
        norms: feature norms `[L, B]`, one row per tap.
        feature: input `[B, D]` of the last linear layer, None for a network without one.
        logits: logits `[B, K]` that OOD scores are computed from, at least in float32: a final
            linear layer is applied in full precision where autocast or its weights are half.
        pred: predicted classes `[B]`.
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
    """Run a network once and record its taps, its penultimate feature and its logits.

    A network that uses different logits for scoring than for classification, such as T2FNorm's,
    returns them from a method `forward_ood_inference`; they are then the logits of the pass.

    Raises:
        TapError: an unusable tap (see `listening`), or logits that are not `[B, K]`.
    """
    head = final_linear(net)
    features: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        features.append(args[0])
        outputs.append(output)

    run = net.forward_ood_inference if has_scoring_logits(net) else net
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
            f"{type(net).__name__} must return logits [B, K] of at least two classes, got {found}: "
            "wrap it so that its forward returns them"
        )
    if head is not None and outputs and logits is outputs[-1]:
        logits = _in_full(head, features[-1], logits)
    norms = (
        torch.stack([heard[name] for name in taps]) if taps else logits.new_empty(0, len(images))
    )
    feature = features[-1] if features and features[-1].ndim == 2 else None
    classified = logits
    if has_scoring_logits(net):
        with torch.no_grad():
            classified = _classify(net, images, head, feature)
    return Pass(norms, feature, logits, classified.detach().argmax(dim=1))


def joined(passes: Sequence[Pass]) -> Pass:
    """Join the passes over the parts of a batch, without their graphs."""
    norms, features, logits, preds = zip(*passes, strict=True)
    known = [feature.detach() for feature in features if feature is not None]
    return Pass(
        torch.cat(norms, dim=-1),
        torch.cat(known) if known else None,
        torch.cat([part.detach() for part in logits]),
        torch.cat(preds),
    )


def parts(images: Tensor, with_graph: bool = False) -> tuple[Tensor, ...]:
    """Split images `[B, C, H, W]` into parts of a size that is fast on their device.

    On a CPU, the feature maps of a large part do not fit into the caches, all the less with a graph
    for gradients, and the allocator returns their memory to the operating system at every layer; a
    small part spends its time reading weights. On any other device the batch stays whole.
    """
    if images.device.type != "cpu":
        return (images,)
    of_a_thread = max(PIXELS // max(images.shape[2:].numel(), 1), 4)
    return torch.split(images, torch.get_num_threads() * of_a_thread // (1 + with_graph))


def _classify(
    net: nn.Module, images: Tensor, head: nn.Linear | None, feature: Tensor | None
) -> Tensor:
    """Logits for classification of a network that uses other logits for scoring."""
    normalised = None if feature is None else classification_feature(net, feature)
    if head is None or normalised is None:
        logits: Tensor = net(images)
        return logits
    return apply_head(head, normalised)


def apply_head(head: nn.Linear, feature: Tensor) -> Tensor:
    """Logits `[B, K]` of features `[B, D]`, at least in float32; see `Pass`."""
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
