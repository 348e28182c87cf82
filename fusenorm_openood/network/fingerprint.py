"""Recognise a network: its modules, weights, and the logits of two fixed images."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fusenorm_openood.errors import is_out_of_memory
from fusenorm_openood.kernels.devices import moved
from fusenorm_openood.network import running

# How far logits may be from those on another machine, in units of their range: in float32, and in
# all that rounds more, such as TF32 on a GPU.
EXACT, ROUNDED = 3e-4, 2e-2
# Parts of the configurations of modules that do not matter in eval mode, or not elsewhere.
_INCIDENTAL = re.compile(r"(, )?(inplace=\w+|momentum=[\w.]+|device='?[\w:]+'?| at 0x\w+)")


class Fingerprint(NamedTuple):
    """What a network is recognised by."""

    kind: str  # its class
    shapes: dict[str, str]  # of its parameters and buffers, such as `float32 [64, 3]`
    weights: str  # SHA-256 of all their values, in hexadecimal digits
    modules: dict[str, str]  # such as `Dropout()`
    image: tuple[int, ...] = ()  # shape of two fixed images; empty without logits
    logits: tuple[tuple[float, ...], ...] = ()  # of these images
    rounding: float = 0.0  # share of their range by which they may differ on another machine

    @property
    def digest(self) -> str:
        """SHA-256 of the modules and the weights, the same on every machine."""
        return hashlib.sha256(json.dumps([self.weights, self.modules]).encode()).hexdigest()

    def differences(self, other: "Fingerprint") -> list[str]:
        """In which weights two networks differ by name, type or shape, or else in which modules."""

        def named(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
            pairs = [
                (n, ours.get(n, "absent"), theirs.get(n, "absent")) for n in {**ours, **theirs}
            ]
            return [f"{name} is {a} instead of {b}" for name, a, b in pairs if a != b]

        return named(self.shapes, other.shapes) or named(self.modules, other.modules)

    def agrees(self, other: "Fingerprint") -> bool:
        """Whether two networks give the fixed images the same logits, as far as both have them."""
        if not (self.logits and other.logits) or self.image != other.image:
            return True
        ours, theirs = np.array(self.logits), np.array(other.logits)
        most = max(self.rounding, other.rounding) * np.ptp(theirs) + 1e-6
        return ours.shape == theirs.shape and bool(np.abs(ours - theirs).max() <= most)


def fingerprint(net: nn.Module) -> Fingerprint:
    """The fingerprint of a network without logits, and without what eval mode leaves out.

    Of weights that FSDP2 has sharded, all processes must take it together.
    """
    digest, shapes = hashlib.sha256(), dict[str, str]()
    for name, value in net.state_dict().items():
        if not isinstance(value, Tensor) or name.endswith("num_batches_tracked"):
            continue
        for part, plain in _plain(name, value.detach()):
            shapes[part] = f"{str(plain.dtype).removeprefix('torch.')} {list(plain.shape)}"
            digest.update(f"{part} {shapes[part]}\n".encode())
            if plain.numel():
                digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    modules = {name: _described(module) for name, module in net.named_modules() if name}
    return Fingerprint(_class_of(net), shapes, digest.hexdigest(), modules)


def _plain(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors, on the CPU, that a tensor of any class is made of."""
    if hasattr(value, "full_tensor"):  # of FSDP2
        value = value.full_tensor()
    if is_traceable_wrapper_subclass(value):  # of torchao
        for part in value.__tensor_flatten__()[0]:
            yield from _plain(f"{name}.{part}", getattr(value, part))
        return
    value = value.dequantize() if value.is_quantized else value
    yield name, value.cpu().contiguous()


def _described(module: nn.Module) -> str:
    is_dropout = isinstance(module, nn.modules.dropout._DropoutNd)
    return f"{_class_of(module)}({'' if is_dropout else _INCIDENTAL.sub('', module.extra_repr())})"


def _class_of(module: nn.Module) -> str:
    """The class of a module, without the one that FSDP2 puts in its place."""
    names = (kind.__name__ for kind in type(module).__mro__)
    return next(name for name in names if not name.startswith("FSDP"))


def identify(net: nn.Module, image: Sequence[int], passes: int = 2) -> Fingerprint:
    """The fingerprint of a network, with its logits of two fixed images `[C, H, W]`.

    Networks may have the same modules and weights, and another forward. The logits are left out if
    the network does not take such images, or is random as a second pass shows.
    """
    core = running.unwrapped(net)
    own = fingerprint(core)
    if not image:
        return own
    images = moved(core, fixed_images(image))
    try:
        with (
            running.eval_mode(core),
            running.preserved_randomness(images.device),
            torch.no_grad(),
            running.own_pass(),
        ):
            answers = [_logits(core, images.clone()) for _ in range(passes)]
    except Exception as error:  # its own, which whoever scores images will meet, too
        if is_out_of_memory(error):
            raise
        return own
    wide = all(p.dtype in (torch.float32, torch.float64) for p in core.parameters())
    wide &= not any("uantized" in module for module in own.modules.values())
    is_exact = wide and images.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    found = [
        own._replace(
            image=tuple(image),
            logits=tuple(map(tuple, answer.tolist())),
            rounding=EXACT if is_exact else ROUNDED,
        )
        for answer in answers
        if answer.numel() and answer.isfinite().all()
    ]
    return found[0] if len(found) == passes and found[0].agrees(found[-1]) else own


def is_network(net: nn.Module, expected: Fingerprint) -> bool:
    """Whether a network has this fingerprint, as far as both are complete."""
    given = identify(net, expected.image, passes=1)
    same = given.weights == expected.weights and not given.differences(expected)
    return same and given.agrees(expected)


def fixed_images(image: Sequence[int]) -> Tensor:
    """Two images `[2, C, H, W]` with values in [-4, 4): a fine texture, and a smooth ramp."""
    numbers = torch.arange(prod(image), dtype=torch.int64, device="cpu")
    texture = (numbers * 2654435761 % 2**32).double() / 2**29 - 4  # Knuth's multiplicative hash
    ramp = numbers.double() / len(numbers) * 8 - 4
    return torch.stack([texture, ramp]).float().view(2, *image)


def _logits(core: nn.Module, images: Tensor) -> Tensor:
    """All that a network returns as one row per image `[2, K]`, its logits among it."""
    output = running.scoring_run(core, running.scoring_module(core))(images)
    rows = [t for _, t in running.tensors_in(output) if t.ndim in (1, 2) and len(t) == len(images)]
    return torch.cat([t.detach().cpu().float().view(len(images), -1) for t in rows], dim=1)
