"""Recognise a network: the names and shapes of its weights, and a hash of their values."""

import hashlib
from typing import Any, NamedTuple

import torch
from torch import nn


class Fingerprint(NamedTuple):
    """What a network is recognised by.

    Attributes:
        kind: class name of the network.
        shapes: type and shape of each parameter and buffer by name, such as `float32 [64, 3]`.
        weights: SHA-256 of all their values, in hexadecimal digits.
    """

    kind: str
    shapes: dict[str, str]
    weights: str

    def differences(self, other: "Fingerprint") -> list[str]:
        """In which weights two networks differ by name, type or shape."""
        names = [*self.shapes, *(name for name in other.shapes if name not in self.shapes)]
        absent = "absent"
        return [
            f"{name} is {self.shapes.get(name, absent)} instead of {other.shapes.get(name, absent)}"
            for name in names
            if self.shapes.get(name) != other.shapes.get(name)
        ]


def fingerprint(net: nn.Module) -> Fingerprint:
    """The fingerprint of a network, without what does not affect its evaluation mode."""
    digest, shapes = hashlib.sha256(), dict[str, str]()
    for name, value in net.state_dict().items():
        if not isinstance(value, torch.Tensor) or name.endswith("num_batches_tracked"):
            continue
        plain: Any = value.detach()
        plain = plain.dequantize() if plain.is_quantized else plain
        plain = plain.cpu().contiguous()
        shapes[name] = f"{str(plain.dtype).removeprefix('torch.')} {list(plain.shape)}"
        digest.update(f"{name} {shapes[name]}\n".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else b"")
    return Fingerprint(type(net).__name__, shapes, digest.hexdigest())
