"""Hooks that act in one pass of one thread only, though those of several hang on one network."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any

from torch import nn

_current_pass: ContextVar[object] = ContextVar("current_pass", default=None)
_numbering = Lock()  # torch numbers hooks without one, and one might replace another

Hook = Callable[..., Any]


@contextmanager
def own_pass() -> Iterator[None]:
    """A pass of this thread, in which only its own hooks act."""
    token = _current_pass.set(object())
    try:
        yield
    finally:
        _current_pass.reset(token)


@contextmanager
def hooked(
    before: Iterable[tuple[nn.Module, Hook]] = (), after: Iterable[tuple[nn.Module, Hook]] = ()
) -> Iterator[None]:
    """Call `before(module, args, kwargs)` and `after(module, args, output)` in the current pass.

    They are removed on exit, also after an exception.
    """
    this, handles = _current_pass.get(), []

    def own(hook: Hook) -> Hook:
        # Another thread may call a hook without `kwargs` while this one registers or removes it.
        return lambda *given: hook(*given) if _current_pass.get() is this else None

    try:
        with _numbering:
            for module, hook in before:
                handles.append(module.register_forward_pre_hook(own(hook), with_kwargs=True))
            for module, hook in after:
                handles.append(module.register_forward_hook(own(hook)))
        yield
    finally:
        for handle in handles:
            handle.remove()
