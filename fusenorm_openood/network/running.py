"""Run a network, whatever it is wrapped in, in eval mode and with hooks; leave it as it was."""

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from functools import partial
from threading import Lock, RLock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from fusenorm_openood import errors
from fusenorm_openood.network.resnet import has_scoring_logits

Path = tuple[Any, ...]  # the keys, indices and attributes that lead to a tensor
Hook = Callable[..., Any]

_lock = RLock()
_modes: dict[nn.Module, tuple[bool, int]] = {}  # mode before the first of the passes; how many
_changed: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}  # by its `train`: former values
_eager: list[Any] = []  # the stance of torch.compile during the passes, if it was ever used


@contextmanager
def eval_mode(net: nn.Module) -> Iterator[None]:
    """Put a network in eval mode, and restore the mode of every module afterwards.

    A module that overrides `train`, for example to merge weights, changes its mode by it; the
    weights that this changed are bitwise restored. Where passes of several threads overlap, the
    last one restores the modes before the first. Compiled modules run uncompiled, since compiled
    ones ignore hooks.
    """
    modules = list(net.modules())
    with _lock:
        for module in modules:
            mode, passes = _modes.get(module, (module.training, 0))
            _modes[module] = mode, passes + 1
        if "torch._dynamo" in sys.modules and not _eager and hasattr(torch.compiler, "set_stance"):
            _eager.append(torch.compiler.set_stance("force_eager"))
    try:
        with _lock:
            for module in modules:
                if module.training:
                    _evaluate(module)
        yield
    finally:
        with _lock:
            wanted = dict[nn.Module, bool]()
            for module in modules:
                mode, passes = _modes.pop(module)
                if passes > 1:
                    _modes[module] = mode, passes - 1
                wanted[module] = mode and passes == 1
            for module, mode in wanted.items():
                if module.training != mode:
                    _set_mode(module, mode, [other for other in modules if not wanted[other]])
            for module in modules:
                for tensor, former in () if module in _modes else _changed.pop(module, ()):
                    tensor.data.copy_(former)
            if not _modes and _eager:
                _eager.pop().__exit__(None, None, None)


def _evaluate(module: nn.Module) -> None:
    """Put a module in eval mode, and remember what its own `train` changes."""
    if _is_plain(module):
        module.training = False
        return
    former = [(t, t.detach().clone()) for t in (*module.parameters(), *module.buffers())]
    _set_mode(module, False, [inner for inner in module.modules() if not inner.training])
    _changed.setdefault(module, [(t, old) for t, old in former if not torch.equal(t, old)])


def _set_mode(module: nn.Module, mode: bool, others: Sequence[nn.Module]) -> None:
    """Set the mode by what the module itself does for it, without touching others in it."""
    if _is_plain(module):
        module.training = mode
        return
    kept = [(other, other.__dict__.get("train")) for other in others if other is not module]
    try:
        for other, _ in kept:
            other.__dict__["train"] = lambda mode=True, other=other: other
        module.train(mode)
    finally:
        for other, own in kept:
            del other.__dict__["train"]
            if own is not None:
                other.__dict__["train"] = own


def _is_plain(module: nn.Module) -> bool:
    """Whether `train` sets the mode and nothing else."""
    return getattr(module.train, "__func__", None) is nn.Module.train


@contextmanager
def preserved_randomness(device: torch.device) -> Iterator[None]:
    """Restore the random number generators of torch (CPU, one CUDA device), NumPy and Python."""
    of_numpy, of_python = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        np.random.set_state(of_numpy)
        random.setstate(of_python)


@contextmanager
def without_weight_gradients(net: nn.Module) -> Iterator[None]:
    """Turn off `requires_grad` on all weights while other code calls `backward()`.

    This package's own gradients do not need it: `torch.autograd.grad` differentiates with respect
    to the images only, and with `requires_grad` off, autocast would cast the weights in every pass.
    """
    required = [p for p in net.parameters() if p.requires_grad]
    try:
        net.requires_grad_(False)
        yield
    finally:
        for p in required:
            p.requires_grad_()


_current_pass: ContextVar[object] = ContextVar("current_pass", default=None)
_numbering = Lock()  # torch numbers hooks without one, and one might replace another


@contextmanager
def own_pass() -> Iterator[None]:
    """A pass of this thread, in which only its own hooks act."""
    token = _current_pass.set(object())
    try:
        yield
    finally:
        _current_pass.reset(token)


def _in_pass(this: object, hook: Hook, *given: Any) -> Any:
    # Another thread may call a hook without `kwargs` while this one registers or removes it.
    return hook(*given) if _current_pass.get() is this else None


@contextmanager
def hooked(
    before: Iterable[tuple[nn.Module, Hook]] = (), after: Iterable[tuple[nn.Module, Hook]] = ()
) -> Iterator[None]:
    """Call `before(module, args, kwargs)` and `after(module, args, output)` in the current pass."""
    own, handles = partial(_in_pass, _current_pass.get()), []
    try:
        with _numbering:
            for module, hook in before:
                given = partial(own, hook)
                handles.append(module.register_forward_pre_hook(given, with_kwargs=True))
            for module, hook in after:
                handles.append(module.register_forward_hook(partial(own, hook)))
        yield
    finally:
        for handle in handles:
            handle.remove()


class LazyNetwork(nn.Module):
    """A network that is loaded on first use; `stored` has its structure and head without that."""

    def __init__(self, load: Callable[[], nn.Module], stored: Any = None) -> None:
        super().__init__()
        self._load, self.stored = load, stored
        self._moves: list[tuple[Any, Any]] = []
        self._lock = RLock()

    @property
    def core(self) -> nn.Module:
        """The network itself."""
        with self._lock:
            if "loaded" not in self._modules:
                net = self._load()
                for args, kwargs in self._moves:
                    net.to(*args, **kwargs)
                self.loaded = net
        return self.loaded

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.core(*args, **kwargs)

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        return self.core.parameters(recurse)

    def to(self, *args: Any, **kwargs: Any) -> "LazyNetwork":
        """Move the network, at once or when it is loaded."""
        self._moves.append((args, kwargs))
        return super().to(*args, **kwargs)

    def cpu(self) -> "LazyNetwork":
        return self.to("cpu")


def unwrapped(net: nn.Module) -> nn.Module:
    """The network in a wrapper of torch; TapError if its modules would run no hooks."""
    inner: Any = net
    while inner is not None:
        net = inner
        if isinstance(net, nn.DataParallel | DistributedDataParallel):
            inner = net.module
        else:
            inner = net.core if isinstance(net, LazyNetwork) else getattr(net, "_orig_mod", None)
    if not isinstance(net, nn.Module):
        kind = type(net).__name__
        raise errors.TapError(f"net must be a torch.nn.Module, got {kind}: wrap it in one")
    if isinstance(net, torch.jit.ScriptModule) or hasattr(net, "_guards_fn"):
        raise errors.TapError(
            f"{type(net).__name__} is scripted, traced or exported, so its modules run no hooks: "
            "give the network that it was made from"
        )
    return net


def scoring_module(net: nn.Module) -> str | None:
    """Name of the module with separate scoring logits, `""` for the network itself, or None."""
    if isinstance(net, LazyNetwork) and net.stored is not None:
        found: str | None = net.stored.structure.scoring
        return found
    modules = unwrapped(net).named_modules()
    return next((name for name, module in modules if has_scoring_logits(module)), None)


@contextmanager
def network_errors(net: nn.Module, images: Tensor) -> Iterator[None]:
    """Turn what a network itself raises on images into a NetworkError that shows their shape."""
    try:
        yield
    except errors.FuseNormError:
        raise
    except Exception as error:
        if errors.is_out_of_memory(error) or errors.is_lost_loader(error):
            raise
        why = (str(error).strip().splitlines() or [""])[0]
        raise errors.NetworkError(
            f"{type(unwrapped(net)).__name__} fails on images {list(images.shape)} of "
            f"{images.dtype} ({type(error).__name__}: {why}): give it images as it takes them"
        ) from error


class _Reached(BaseException):  # no `except Exception` on its way stops it
    pass


def scoring_run(net: nn.Module, scoring: str | None) -> Callable[..., Any]:
    """What computes the outputs for OOD scores: the network, or its scoring module's method.

    What a network does before its scoring module still happens, what it does after it does not.
    """
    if not scoring:
        return net if scoring is None else net.forward_ood_inference  # type: ignore[return-value]
    module = net.get_submodule(scoring)

    def reached(module: nn.Module, args: Any, kwargs: Any) -> None:
        raise _Reached(args, kwargs)

    def run(images: Any) -> Any:
        try:
            with hooked(before=[(module, reached)]):
                net(images)
        except _Reached as found:
            args, kwargs = found.args
        else:
            raise errors.TapError(f"{type(net).__name__} does not call its module {scoring!r}")
        return module.forward_ood_inference(*args, **kwargs)  # type: ignore[operator]

    return run


def dequantised(x: Any) -> Any:
    """A tensor in floating point, also a quantised one; what is no tensor as it is."""
    return x.dequantize() if isinstance(x, Tensor) and x.is_quantized else x


def tensors_in(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """The floating-point tensors in nested containers and dataclasses, dequantised, in order."""
    inner: Any = ()
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_quantized:
            yield path, dequantised(value)
    elif isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, tuple | list):
        inner = zip(getattr(value, "_fields", range(len(value))), value, strict=True)
    elif is_dataclass(value) and not isinstance(value, type):
        inner = ((field.name, getattr(value, field.name)) for field in fields(value))
    for key, item in inner:
        yield from tensors_in(item, (*path, key))
