"""The fingerprint of a network with what it computes: its logits of two fixed images."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from fusenorm_openood.devices import moved
from fusenorm_openood.kernels.guards import is_out_of_memory
from fusenorm_openood.networks.fingerprint import Fingerprint, fingerprint
from fusenorm_openood.structure.hooks import own_pass
from fusenorm_openood.structure.modes import preserved_randomness, undisturbed
from fusenorm_openood.structure.outputs import tensors_in
from fusenorm_openood.structure.wrappers import scoring_module, scoring_run, unwrapped

# How far logits may be from those on another machine, in units of their range: in float32, and in
# all that rounds more, such as TF32 on a GPU.
EXACT, ROUNDED = 3e-4, 2e-2


def identify(net: nn.Module, image: Sequence[int], passes: int = 2) -> Fingerprint:
    """The fingerprint of a network, with its logits of two fixed images.

    They tell a network from another one with the same modules and weights whose forward differs.
    Those of a network that does not take such images, or is random as a second pass shows, are left
    out.

    Args:
        net: any network; it is left unchanged.
        image: shape `[C, H, W]` of the images; without one there are no logits.
        passes: one or two.
    """
    core = unwrapped(net)
    known = fingerprint(core)
    if not image:
        return known
    images = moved(core, fixed_images(image))
    try:
        with undisturbed(core), preserved_randomness(images.device), torch.no_grad(), own_pass():
            answers = [_logits(core, images.clone()) for _ in range(passes)]
    except Exception as error:  # its own, which whoever scores images will meet, too
        if is_out_of_memory(error):
            raise
        return known
    wide = all(p.dtype in (torch.float32, torch.float64) for p in core.parameters())
    wide &= not any("uantized" in module for module in (known.modules or {}).values())
    is_exact = wide and images.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    rounding = EXACT if is_exact else ROUNDED
    found = [
        known._replace(image=tuple(image), logits=tuple(map(tuple, a.tolist())), rounding=rounding)
        for a in answers
        if a.numel() and a.isfinite().all()
    ]
    return found[0] if len(found) == passes and found[0].agrees(found[-1]) else known


def is_network(net: nn.Module, known: Fingerprint) -> bool:
    """Whether a network is the one that is known, as far as that is known."""
    given = identify(net, known.image, passes=1)
    same = given.weights == known.weights and not given.differences(known)
    return same and given.agrees(known)


def fixed_images(image: Sequence[int]) -> Tensor:
    """Two images `[2, C, H, W]` with values in [-4, 4): a fine texture, and a smooth ramp."""
    numbers = torch.arange(prod(image), dtype=torch.int64, device="cpu")
    texture = (numbers * 2654435761 % 2**32).double() / 2**29 - 4  # Knuth's multiplicative hash
    ramp = numbers.double() / len(numbers) * 8 - 4
    return torch.stack([texture, ramp]).float().view(2, *image)


def _logits(core: nn.Module, images: Tensor) -> Tensor:
    """All that a network returns as one row per image `[2, K]`, its logits among it."""
    output = scoring_run(core, scoring_module(core))(images)
    rows = [t for _, t in tensors_in(output) if t.ndim in (1, 2) and len(t) == len(images)]
    return torch.cat([t.detach().cpu().float().view(len(images), -1) for t in rows], dim=1)
