"""Choose the modules of a network to tap, and tap them during a forward pass."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusenorm_openood.errors import TapError
from fusenorm_openood.listening.modes import undisturbed

# BasicBlock, Bottleneck, PreActBlock, InvertedResidual, ...
_RESIDUAL_BLOCK = re.compile(r"(Block|Bottleneck|Residual)$")


class TapCandidate(NamedTuple):
    """A module that returns a feature map: its name, class, and output shape `[B, C, H, W]`."""

    name: str
    kind: str
    shape: tuple[int, ...]


def residual_blocks(net: nn.Module) -> list[str]:
    """Names of all residual blocks of a network, in the order of its modules.

    A residual block is a module with a class name such as BasicBlock or Bottleneck that contains no
    other such module.
    """
    named = [n for n, m in net.named_modules() if n and _RESIDUAL_BLOCK.search(type(m).__name__)]
    return [name for name in named if not any(other.startswith(f"{name}.") for other in named)]


def stage_ends(blocks: Sequence[str]) -> list[str]:
    """The last block of each stage; a stage is the residual blocks under one parent module."""
    return list({_parent(name): name for name in blocks}.values())


def resolve_taps(net: nn.Module, taps: str | Sequence[str]) -> tuple[str, ...]:
    """Names of the modules to tap.

    Args:
        net: any network.
        taps: `"blocks"` (every residual block), `"stages"` (the last block of each stage), or
            the names of modules that return feature maps `[B, C, H, W]`.

    Raises:
        TapError: no residual block, or a name that is unknown or given twice.
    """
    if isinstance(taps, str):
        if taps not in ("blocks", "stages"):
            raise TapError(
                f"taps must be 'blocks', 'stages' or a list of module names, got {taps!r}"
            )
        blocks = residual_blocks(net)
        if not blocks:
            raise TapError(
                f"{type(net).__name__} has no residual block: name the modules to tap, "
                "tap_candidates(net, images) lists them"
            )
        return tuple(blocks if taps == "blocks" else stage_ends(blocks))
    known = {name for name, _ in net.named_modules() if name}
    for name in taps:
        if name not in known:
            near = [n for n in sorted(known) if n.split(".")[0] == name.split(".")[0]]
            raise TapError(
                f"{type(net).__name__} has no module {name!r}: "
                f"choose from {', '.join(near or residual_blocks(net) or sorted(known))}"
            )
    if len(set(taps)) != len(taps) or not taps:
        raise TapError(f"taps must name at least one module, each once, got {list(taps)}")
    return tuple(taps)


def first_of_last_stage(net: nn.Module, names: Sequence[str]) -> str:
    """The tap that is a strong expert by default: the first one in the last stage.

    If the network has fewer than two stages, or no tap in the last one, it is the last tap.
    """
    stages = list(dict.fromkeys(_parent(name) for name in residual_blocks(net)))
    in_last = [name for name in names if len(stages) > 1 and _parent(name) == stages[-1]]
    return [*in_last, names[-1]][0]


def tap_candidates(net: nn.Module, images: Tensor) -> list[TapCandidate]:
    """All modules that return exactly one feature map in a forward pass, in execution order.

    Args:
        net: any network; it is left unchanged.
        images: a batch that the network accepts, on its device.
    """
    found: dict[str, list[TapCandidate]] = {}
    handles = []

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                candidate = TapCandidate(name, type(module).__name__, tuple(output.shape))
                found.setdefault(name, []).append(candidate)

        return hook

    try:
        handles = [m.register_forward_hook(note(n)) for n, m in net.named_modules() if n]
        with undisturbed(net), torch.no_grad():
            net(images)
    finally:
        for handle in handles:
            handle.remove()
    return [candidates[0] for candidates in found.values() if len(candidates) == 1]


@contextmanager
def listening(
    net: nn.Module, names: Sequence[str], reduce: Callable[[Tensor], Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Reduce the feature maps of the named modules during one forward pass.

    Yields a dict that the pass fills with `reduce(feature map)` by module name. The reduction runs
    inside the hook, without gradients, so no feature map outlives it. The hooks are removed on
    exit, also after an exception.

    Raises:
        TapError: a tap that returns no feature map, fires twice or never fires.
    """
    heard: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or output.ndim != 4:
                shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise TapError(
                    f"tap {name!r} must return a feature map [B, C, H, W], got {shape}: "
                    "tap another module, tap_candidates(net, images) lists them"
                )
            if name in heard:
                raise TapError(
                    f"tap {name!r} fired twice in one forward pass: tap a module that runs once"
                )
            with torch.no_grad():
                heard[name] = reduce(output.detach())

        return hook

    handles = []
    try:
        for name in names:
            handles.append(net.get_submodule(name).register_forward_hook(listen(name)))
        yield heard
    finally:
        for handle in handles:
            handle.remove()
    silent = [name for name in names if name not in heard]
    if silent:
        raise TapError(
            f"tap {silent[0]!r} never fired: the forward pass of {type(net).__name__} does not "
            "call it; tap another module, tap_candidates(net, images) lists them"
        )


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
