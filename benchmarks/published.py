"""ATF and ODIN as published, written from their formulas, as a reference for timings."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def atf_loop(
    x: Tensor, k_min: float = 0.1, k_max: float = 0.25, alpha: float = 0.0, eps: float = 1e-8
) -> Tensor:
    """ATF of feature maps `[B, C, H, W]`, one sample at a time, since each has its own k."""
    e = x.flatten(2).square()
    _, channels, pixels = e.shape
    p = e / (e.sum(-1, keepdim=True) + eps)
    h = -(p * (p + eps).log()).sum(-1) / math.log(pixels)
    w = (1 - h) / ((1 - h).sum(-1, keepdim=True) + eps)
    w = (1 - alpha) * w + alpha / channels
    w = w / (w.sum(-1, keepdim=True) + eps)
    k = ((k_min + (k_max - k_min) * h.mean(-1)) * pixels).clamp(min=1)
    norms = []
    for i in range(len(e)):
        top = e[i].topk(int(k[i]), dim=-1).values
        norms.append((w[i] * top.mean(-1).sqrt()).sum())
    return torch.stack(norms)


def odin_react(
    net: nn.Module, images: Tensor, blocks: list[str], threshold: float, noise: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Norms `[L, B]` from one pass, and ODIN's score `[B]` with ReAct from two more passes.

    The gradient is computed with `backward`, which computes those of the weights as well.
    """
    maps: list[Tensor] = []
    hooks = [net.get_submodule(n).register_forward_hook(lambda m, i, o: maps.append(o))
             for n in blocks]  # fmt: skip
    with torch.no_grad():
        net(images)
    for hook in hooks:
        hook.remove()
    norms = torch.stack([atf_loop(x) for x in maps])
    maps.clear()

    def logits(x: Tensor) -> Tensor:
        return net.fc(net.features(x).clamp(max=threshold)) / 1000

    leaf = images.clone().requires_grad_()
    out = logits(leaf)
    F.cross_entropy(out, out.argmax(1)).backward()
    moved = images - noise * torch.where(leaf.grad >= 0, 1.0, -1.0)
    net.zero_grad()
    with torch.no_grad():
        return norms, logits(moved).softmax(1).amax(1)


def forward(net: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """The plain forward pass, to which everything is compared."""

    def run() -> Tensor:
        with torch.no_grad():
            out: Tensor = net(images)
            return out

    return run
