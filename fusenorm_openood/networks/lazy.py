"""A network that is only loaded when it is to run."""

from collections.abc import Callable, Iterator
from threading import RLock
from typing import Any

from torch import nn
from torch.nn import Parameter
from typing_extensions import Self


class LazyNetwork(nn.Module):
    """A network that is loaded on first use; what is known of it needs no loading.

    Args:
        load: loads it.
        known: what is known of it, with the attributes `structure` and `head`.
    """

    def __init__(self, load: Callable[[], nn.Module], known: Any = None) -> None:
        super().__init__()
        self._load, self.known = load, known
        self._moves: list[tuple[Any, Any]] = []
        self._lock = RLock()

    @property
    def is_loaded(self) -> bool:
        return "loaded" in self._modules

    @property
    def core(self) -> nn.Module:
        """The network itself."""
        with self._lock:
            if not self.is_loaded:
                net = self._load()
                for args, kwargs in self._moves:
                    net.to(*args, **kwargs)
                self.loaded = net
        return self.loaded

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.core(*args, **kwargs)

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        return self.core.parameters(recurse)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the network, at once or when it is loaded."""
        self._moves.append((args, kwargs))
        return super().to(*args, **kwargs)

    def cpu(self) -> Self:
        return self.to("cpu")
