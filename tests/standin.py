"""A device that this machine lacks: its tensors say that they are there, and compute on the CPU."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten


class There(Tensor):
    """A tensor on the device that is stood in for; `inner` is on the CPU."""

    inner: Tensor
    where: torch.device

    @staticmethod
    def __new__(cls, inner: Tensor, where: torch.device) -> "There":
        self = Tensor._make_wrapper_subclass(  # of C++, every device but the CPU is alike
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
        )
        self.inner, self.where = inner, where
        return self

    @property
    def device(self) -> torch.device:
        return self.where

    def __repr__(self, **kwargs: Any) -> str:
        return f"There({self.inner}, {self.where})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} outside of the stand-in's context")


class _Named(TorchFunctionMode):
    """Calls a device `meta` where C++, which lacks it, would look for it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def named(item: Any) -> Any:
            is_it = isinstance(item, str | torch.device) and str(item) == str(self.device)
            return torch.device("meta") if is_it else item

        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        # What is made from Python's numbers is made on the CPU, which no dispatch sees.
        if func is Tensor.new_tensor and isinstance(args[0], There):
            return torch.tensor(*args[1:], dtype=args[0].dtype).to("meta")
        if func is torch.tensor and "device" in kwargs:
            device = named(kwargs["device"])
            return torch.tensor(*args, **{**kwargs, "device": "cpu"}).to(device)
        return func(*map(named, args), **{k: named(v) for k, v in kwargs.items()})


class StandIn(TorchDispatchMode):
    """Context in which a device exists.

    Tensors of two devices do not meet, numbers aside, and as on Apple's MPS there is no float64.

    Args:
        name: the device, for example `mps`; or `meta`, which then computes.
        has_double: whether it has float64.
    """

    def __init__(self, name: str, has_double: bool = False) -> None:
        super().__init__()
        self.device, self.has_double = torch.device(name), has_double
        self._named = _Named(self.device)

    def __enter__(self) -> "StandIn":
        self._named.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._named.__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        there = {id(t.inner): t for t in tensors if isinstance(t, There)}
        asked = kwargs.get("device")
        moves = func in (aten._to_copy.default, aten.copy_.default)
        if there and not moves and any(type(t) is not There and t.ndim for t in tensors):
            raise RuntimeError(f"{func}: tensors on cpu and on {self.device} meet")
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        inner = tree_map(lambda t: t.inner if isinstance(t, There) else t, (args, kwargs))
        if func is aten._to_copy.default and there and not self.has_double:
            self._check(inner[1].get("dtype"))  # the source converts
        result = func(*inner[0], **inner[1])
        if func is aten.copy_.default:
            return args[0]
        on_cpu = asked is not None and torch.device(asked).type == "cpu"
        if on_cpu or not (there or asked is not None):
            return result
        return tree_map(lambda t: self._put(t, there) if isinstance(t, Tensor) else t, result)

    def _put(self, result: Tensor, there: dict[int, There]) -> There:
        self._check(result.dtype)
        known = there.get(id(result))
        return There(result, self.device) if known is None else known

    def _check(self, dtype: torch.dtype | None) -> None:
        if dtype in (torch.float64, torch.complex128) and not self.has_double:
            raise TypeError(f"{self.device} has no {dtype}")
