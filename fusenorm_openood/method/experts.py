"""Output experts: scores computed from the logits, larger = more in-distribution."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from fusenorm_openood.errors import ConfigError
from fusenorm_openood.kernels.devices import with_double

OutputExpert = Literal["msp", "mls", "energy", "odin"]
OUTPUT_EXPERTS: tuple[str, ...] = get_args(OutputExpert)
PROBABILITY = "probability"  # MSP as in OpenOOD, with saturation and ties; not for fusion
DEFAULT_TEMPERATURE: dict[str, float] = {"msp": 1.0, "mls": 1.0, "energy": 1.0, "odin": 1000.0}


class Output(NamedTuple):
    """Settings of one output expert, named as in `Settings`."""

    output: str
    temperature: float
    noise: float = 0.0
    input_std: tuple[float, ...] | None = None
    react_percentile: float | None = None

    @property
    def label(self) -> str:
        """Name in tables, for example `energy+react`."""
        return self.output if self.react_percentile is None else f"{self.output}+react"

    @property
    def needs_gradient(self) -> bool:
        """Whether the expert differentiates the logits with respect to the image."""
        return self.output == "odin" and self.noise > 0


def msp(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Maximum softmax probability of logits `[B, K]` -> `[B]` in (1/K, 1]; saturates at 1."""
    return (logits / temperature).softmax(dim=1).amax(dim=1)


def log_odds(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log(p / (1 - p)) of the maximum softmax probability p: the same ranking, no saturation."""
    top, rest = _top_and_rest(logits / temperature)
    return top - rest.logsumexp(dim=1)


def mls(logits: Tensor) -> Tensor:
    """Maximum logit of `[B, K]` -> `[B]`."""
    return logits.amax(dim=1)


def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Negative free energy T logsumexp(logits / T) of `[B, K]` -> `[B]`."""
    return temperature * (logits / temperature).logsumexp(dim=1)


def odin_perturb(
    images: Tensor,
    logits: Tensor,
    temperature: float = 1000.0,
    noise: float = 0.01,
    input_std: Sequence[float] | None = None,
) -> Tensor:
    """Perturb images towards their predicted class, as ODIN does before scoring them.

    Args:
        images: `[B, C, H, W]`, the leaf from which `logits` were computed, requiring gradients.
        logits: `[B, K]` with their graph, which is freed.
        temperature: temperature of the softmax.
        noise: step size per pixel, in units of the normalised image.
        input_std: standard deviations `[C]` by which the images were divided; `noise` is then in
            units of the unnormalised image, OpenOOD's convention. None = not divided.

    Returns:
        Perturbed images, detached.

    Source: Liang et al., ICLR 2018.
    """
    direction = odin_direction(images, logits, temperature)
    return odin_step(images, direction, noise, input_std)


def odin_direction(
    images: Tensor, logits: Tensor, temperature: float, keep_graph: bool = False
) -> Tensor:
    """Whether increasing a pixel increases the loss of the predicted class: `[B, C, H, W]`."""
    target = logits.detach().argmax(dim=1)
    loss = F.cross_entropy(logits.float() / temperature, target, reduction="sum")
    # Only the sign matters: a power of two close to T avoids underflow in half precision.
    scaled = loss * 2.0 ** round(math.log2(temperature))
    (gradient,) = torch.autograd.grad(scaled, images, retain_graph=keep_graph)
    return gradient >= 0


def odin_step(
    images: Tensor, direction: Tensor, noise: float, input_std: Sequence[float] | None
) -> Tensor:
    """Images `[B, C, H, W]` after ODIN's step against a direction; see `odin_perturb`."""
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


def score_logits(name: str, logits: Tensor, temperature: float) -> Tensor:
    """Score `[B]` of an output expert for the fusion, in float64 where the device supports it.

    MSP and ODIN are returned as log-odds: these rank images as the probability does, but keep a
    wide range where it saturates, and are linear in it near 1/K.
    """
    logits = with_double(logits.detach())
    if name == PROBABILITY:
        return msp(logits, temperature).double()
    logits = logits.double()
    if name in ("msp", "odin"):
        return log_odds(logits, temperature)
    return energy(logits, temperature) if name == "energy" else mls(logits)


def check_output_expert(name: str) -> None:
    """Raise ConfigError unless `name` is an output expert."""
    if name not in OUTPUT_EXPERTS:
        raise ConfigError(
            f"unknown output expert {name!r}: choose from {', '.join(OUTPUT_EXPERTS)}"
        )


def _top_and_rest(logits: Tensor) -> tuple[Tensor, Tensor]:
    top, index = logits.max(dim=1)
    return top, logits.scatter(1, index.unsqueeze(1), float("-inf"))
