"""Choose the layers of a network that are tapped, and name the strong experts."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from fusenorm_openood.errors import ConfigError, TapError, unknown, warn
from fusenorm_openood.method.scores import OUTPUTS, POSTHOC
from fusenorm_openood.method.settings import Settings
from fusenorm_openood.network import graph, running
from fusenorm_openood.network.structure import Structure, read_structure

NO_LAYERS = ("output", *POSTHOC)  # experts that are not feature norms of a layer
Names = tuple[tuple[str, ...], tuple[str, ...]]  # of the layers, and of the strong experts


class TapCandidate(NamedTuple):
    """A module that returns a feature map: its name, class, and output shape."""

    name: str
    kind: str
    shape: tuple[int, ...]


def check_taps(net: nn.Module, taps: str | Sequence[str]) -> tuple[str, ...]:
    """The modules that `taps` names, none if it is `"blocks"` or `"stages"`.

    TapError if it is neither, or names a module that the network lacks, or one twice.
    """
    if isinstance(taps, str):
        if taps not in ("blocks", "stages"):
            raise TapError(
                f"taps must be 'blocks', 'stages' or a list of module names, got {taps!r}"
            )
        return ()
    modules = {name for name, _ in running.unwrapped(net).named_modules() if name}
    names = tuple(re.sub(r"^((module|_orig_mod)\.)+", "", tap) for tap in taps)  # torch's wrappers
    for name in (name.removesuffix(graph.INPUT) for name in names):
        if name not in modules:
            near = [n for n in sorted(modules) if n.split(".")[0] == name.split(".")[0]]
            of = f" of {type(net).__name__}"
            raise TapError(unknown("module", name, near or sorted(modules), of))
    if len(set(names)) != len(names) or not names:
        raise TapError(f"taps must name at least one module, each once, got {list(taps)}")
    return names


def resolve_taps(
    net: nn.Module, taps: str | Sequence[str], structure: Structure
) -> tuple[str, ...]:
    """Names of the modules to tap; TapError without blocks, or for a name unknown or given twice.

    Args:
        taps: `"blocks"` (every block), `"stages"` (the last block of each stage), or the names of
            modules that return feature maps. After the name of a module, `:input` stands for what
            it is given.
    """
    names = check_taps(net, taps)
    if names:
        for name in (name for name in names if name not in structure.layouts):
            raise unusable_tap(
                net, name, structure.runs.get(name, 0), structure.shapes.get(name, ())
            )
        return names
    if not structure.blocks:
        raise TapError(
            f"{type(net).__name__} has no blocks on one trunk: name the modules to tap, "
            f"tap_candidates(net, images) lists them (looked for in {structure.rule})"
        )
    if taps == "blocks":
        return structure.blocks
    return tuple(stage[-1] for stage in structure.stages(structure.blocks))


def names_of(net: nn.Module, settings: Settings, structure: Structure | None) -> Names | None:
    """The names under some settings; None where the network's structure would have to be known.

    TapError for taps that do not fit the network, ConfigError for a strong expert that is unknown,
    or named twice.
    """
    taps, strong = check_taps(net, settings.taps), settings.strong
    if structure is not None:
        taps = resolve_taps(net, settings.taps, structure)
        if isinstance(strong, str):
            return taps, (first_of_last_stage(structure, taps), "output")
    if isinstance(strong, str):
        return None
    if taps:
        return taps, strong_names(settings, strong, taps)
    modules = dict(running.unwrapped(net).named_modules())  # any may turn out to be a layer to tap
    strong_names(settings, [n for n in strong if isinstance(n, str) and n not in modules], ())
    return None


def strong_names(
    settings: Settings, experts: Sequence[str | int], taps: Sequence[str]
) -> tuple[str, ...]:
    """Names of strong experts that settings name or number; ConfigError as `names_of`."""
    strong = []
    for expert in experts:
        number = expert if isinstance(expert, int) else None
        if number is not None and not 0 <= number < len(taps):
            raise ConfigError(
                f"strong expert {number} is out of range: there are {len(taps)} taps, "
                f"numbered from 0: {', '.join(taps)}"
            )
        name = expert if isinstance(expert, str) else taps[expert]
        name = "output" if name == settings.output else name
        if name not in (*taps, *NO_LAYERS):
            of = f" with output={settings.output!r}"
            known = (*(taps or ["the taps"]), *NO_LAYERS)
            more = f", or set output={name!r}" if name in OUTPUTS else ""
            raise ConfigError(unknown("strong expert", name, known, of, more))
        strong.append(name)
    if len(set(strong)) != len(strong):
        raise ConfigError(f"strong must name each expert once, got {', '.join(strong)}")
    return tuple(strong)


def warn_of_left_out(net: nn.Module, taps: str | Sequence[str], structure: Structure) -> None:
    """Warn of what the blocks of a network leave out, unless the taps are named."""
    for note in structure.notes if isinstance(taps, str) else ():
        warn(
            f"{type(running.unwrapped(net)).__name__}: {note}; name others with taps=[...], "
            "tap_candidates(net, images) lists them"
        )


def first_of_last_stage(structure: Structure, taps: Sequence[str]) -> str:
    """The tap that is a strong expert by default: the first one in the last stage.

    If all taps are in one stage, it is the last tap.
    """
    stages = structure.stages(taps)
    return stages[-1][0] if len(stages) > 1 else taps[-1]


def tap_candidates(net: nn.Module, images: Tensor) -> list[TapCandidate]:
    """All modules that run once and return a feature map, in the order in which they end.

    Args:
        net: any network; it is left unchanged.
        images: a batch that the network accepts, on its device.

    Examples:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> tap_candidates(resnet18(), torch.rand(2, 3, 64, 64))[0]
        TapCandidate(name='conv1', kind='Conv2d', shape=(2, 64, 32, 32))
    """
    core, structure = running.unwrapped(net), read_structure(net, images)
    return [
        TapCandidate(name, kind_of(core, name), (len(images), *structure.shapes[name][1:]))
        for name in structure.layouts
    ]


def kind_of(core: nn.Module, tap: str) -> str:
    """Class of the module that a tap names."""
    return type(core.get_submodule(tap.removesuffix(graph.INPUT))).__name__


def unusable_tap(net: nn.Module, name: str, runs: int, shape: Sequence[int]) -> TapError:
    """The error for a tap that gives no feature map, runs twice or never."""
    if runs == 0:
        why = f"never fired: the forward pass of {type(net).__name__} does not call it"
    elif runs > 1:
        why = "fired twice in one forward pass"
    else:
        why = (
            f"must return a feature map [B, C, H, W], [B, H, W, C] or [B, N, C], got {list(shape)}"
        )
    return TapError(
        f"tap {name!r} {why}; tap another module, tap_candidates(net, images) lists them"
    )
