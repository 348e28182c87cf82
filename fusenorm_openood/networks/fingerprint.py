"""Recognise a network: its modules, the names and shapes of its weights, a hash of their values."""

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# Parts of what modules say of themselves that do not matter in evaluation mode, or not elsewhere.
_INCIDENTAL = re.compile(r"(, )?(inplace=\w+|momentum=[\w.]+|device='?[\w:]+'?| at 0x\w+)")


class Fingerprint(NamedTuple):
    """What a network is recognised by.

    Attributes:
        kind: class name of the network.
        shapes: type and shape of each parameter and buffer by name, such as `float32 [64, 3]`.
        weights: SHA-256 of all their values, in hexadecimal digits.
        modules: class and configuration of each module inside by name, such as `Dropout()`; None
            in files of format 1.
        image: shape `[C, H, W]` of two fixed images; empty if the logits are not known.
        logits: the network's logits `[2, K]` of them.
        rounding: how far the logits may be from those on another machine, in units of their range.
    """

    kind: str
    shapes: dict[str, str]
    weights: str
    modules: dict[str, str] | None = None
    image: tuple[int, ...] = ()
    logits: tuple[tuple[float, ...], ...] = ()
    rounding: float = 0.0

    @property
    def digest(self) -> str:
        """SHA-256 of the modules and the weights, the same on every machine."""
        return hashlib.sha256(json.dumps([self.weights, self.modules]).encode()).hexdigest()

    def differences(self, other: "Fingerprint") -> list[str]:
        """In which weights two networks differ by name, type or shape, or else in which modules."""
        weights = _differences(self.shapes, other.shapes)
        if weights or self.modules is None or other.modules is None:
            return weights
        return _differences(self.modules, other.modules)

    def agrees(self, other: "Fingerprint") -> bool:
        """Whether two networks give the fixed images the same logits, as far as both are known."""
        if not (self.logits and other.logits) or self.image != other.image:
            return True
        ours, theirs = (
            torch.tensor(f.logits, dtype=torch.float64, device="cpu") for f in (self, other)
        )
        if ours.shape != theirs.shape:
            return False
        most = max(self.rounding, other.rounding) * float(theirs.max() - theirs.min())
        return bool((ours - theirs).abs().max() <= most + 1e-6)


def _differences(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    names = [*ours, *(name for name in theirs if name not in ours)]
    found = [(name, ours.get(name, "absent"), theirs.get(name, "absent")) for name in names]
    return [f"{name} is {a} instead of {b}" for name, a, b in found if a != b]


def fingerprint(net: nn.Module) -> Fingerprint:
    """The fingerprint of a network without logits, and without what evaluation mode leaves out.

    Of weights that FSDP2 has sharded, all processes must take it together.
    """
    digest, shapes = hashlib.sha256(), dict[str, str]()
    for name, value in net.state_dict().items():
        if not isinstance(value, Tensor) or name.endswith("num_batches_tracked"):
            continue
        for part, plain in _plain(name, value.detach()):
            shapes[part] = f"{str(plain.dtype).removeprefix('torch.')} {list(plain.shape)}"
            digest.update(f"{part} {shapes[part]}\n".encode())
            data = plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else b""
            digest.update(data)
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
    said = "" if is_dropout else _INCIDENTAL.sub("", module.extra_repr())
    return f"{_class_of(module)}({said})"


def _class_of(module: nn.Module) -> str:
    """The class of a module, without the one that FSDP2 puts in its place."""
    names = (kind.__name__ for kind in type(module).__mro__)
    return next(name for name in names if not name.startswith("FSDP"))
