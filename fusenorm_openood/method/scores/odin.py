"""ODIN: Liang et al., "Enhancing the reliability of OOD image detection", ICLR 2018."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fusenorm_openood.errors import ConfigError
from fusenorm_openood.method.scores.msp import MSP
from fusenorm_openood.method.validation import NOT_NEGATIVE, POSITIVE, checked


@dataclass(frozen=True)
class ODIN(MSP):
    """MSP at a high temperature, of images that are perturbed towards their predicted class.

    Attributes:
        noise: size of the step per pixel, in units of the normalised image; 0 = no step.
        input_std: standard deviations `[C]` by which images were divided; `noise` is then in units
            of the unnormalised image, OpenOOD's convention. None = not divided.

    >>> ODIN().needs_gradient, ODIN(noise=0).needs_gradient
    (True, False)
    """

    name = "odin"
    title = "ODIN"
    output = "odin"
    named = ("temperature", "noise")

    temperature: float = checked(1000.0, POSITIVE)
    noise: float = checked(0.0014, NOT_NEGATIVE)
    input_std: tuple[float, ...] | None = None

    @property
    def needs_gradient(self) -> bool:
        return self.noise > 0


def odin_direction(
    images: Tensor, logits: Tensor, temperature: float, keep_graph: bool = False
) -> Tensor:
    """Whether increasing a pixel increases the loss of the predicted class: `[B, C, H, W]`.

    The images are the leaf, requiring gradients, from which the logits `[B, K]` were computed; the
    graph of these is freed unless `keep_graph`.
    """
    target = logits.detach().argmax(dim=1)
    loss = F.cross_entropy(logits.float() / temperature, target, reduction="sum")
    # Only the sign matters: a power of two close to T avoids underflow in half precision.
    scaled = loss * 2.0 ** round(math.log2(temperature))
    (gradient,) = torch.autograd.grad(scaled, images, retain_graph=keep_graph)
    return gradient >= 0


def odin_step(
    images: Tensor, direction: Tensor, noise: float, input_std: Sequence[float] | None = None
) -> Tensor:
    """Images `[B, C, H, W]` after ODIN's step against a direction, detached; see `ODIN`."""
    step = torch.where(direction, -1, 1).to(images.dtype) * noise
    if input_std is not None:
        if len(input_std) != images.shape[1]:
            raise ConfigError(
                f"input_std must have one entry per channel, got {len(input_std)} entries for "
                f"images with {images.shape[1]} channels"
            )
        std = torch.tensor(input_std, dtype=step.dtype, device=step.device)
        step = step / std.view(1, -1, 1, 1)
    return images.detach() + step
