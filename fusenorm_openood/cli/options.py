"""The options of all subcommands: each is declared once, and chosen by name."""

from argparse import ArgumentTypeError, _ActionsContainer
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from fusenorm_openood.errors import ConfigError


def _digits(text: str) -> int:
    return int(text) if text.isdecimal() else -1


def reader(text: str, read: Callable[[str], Any], holds: Callable[[Any], bool]) -> Any:
    """What reads a value for argparse, which must be what the text says."""

    def parse(given: str) -> Any:
        with suppress(ValueError):
            if holds(value := read(given)):
                return value
        raise ArgumentTypeError(f"must be {text}, got {given!r}")

    return parse


whole = reader("an integer >= 0", _digits, lambda value: value >= 0)
positive = reader("an integer >= 1", _digits, lambda value: value >= 1)
fraction = reader("a number in (0, 1)", float, lambda value: 0 < value < 1)


def numbers(kind: Callable[[str], float] = float) -> Any:
    """What reads numbers with commas between them, for argparse."""
    return reader("numbers such as 0,1", lambda text: tuple(map(kind, text.split(","))), bool)


def normalization(text: str, channels: int | None = 3) -> Any:
    """Channel means and standard deviations, for argparse."""
    from fusenorm_openood.data.preprocessing import parse_normalization  # imports torch

    try:
        return parse_normalization(text, channels)
    except ConfigError as error:
        raise ArgumentTypeError(str(error)) from None


FLAG = {"action": "store_true"}
OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "--root": (
        {"required": True},
        "folder of training runs s0, s1, ... with best.ckpt, or one checkpoint file",
    ),
    "--postprocessor": (
        {},
        "fusenorm (default), fusenorm_published, fusenorm_deviation, t2fnorm, msp, mls, ebo, odin, "
        "react, knn, nci, gen, logitgap, fdbd, scale, ash, ras, vim, mds, mds++, rmds, rmds++, "
        "mahavar, head_mds, she; with OpenOOD, also any of OpenOOD's",
    ),
    "--fsood": (FLAG, "full-spectrum: covariate-shifted images count as ID"),
    "--output-dir": (
        {},
        "folder for results (default: the root, or a checkpoint file's name without suffix)",
    ),
    "--config": ({"metavar": "NAME"}, "YAML file of the postprocessor, or this package's name"),
    "--set": (
        {"action": "append", "default": [], "metavar": "KEY=VALUE"},
        "set one of its arguments",
    ),
    "--network": (
        {"metavar": "SPEC"},
        "architecture of the checkpoints: torchvision:NAME, timm:NAME or package.module:factory "
        "(default: recognised by their keys)",
    ),
    "--weights-by-order": (
        FLAG,
        "take weights with other keys than the network's by their order, if all shapes agree",
    ),
    "--weights": ({"metavar": "FILE"}, "checkpoint (default: where `fit` found it)"),
    "--detector": ({"required": True, "metavar": "FILE"}, "what `fusenorm fit` has saved"),
    "--acceptance": ({"type": fraction, "default": 0.95}, "share of ID images to accept (0.95)"),
    "--calibrate-by": (
        {"choices": ["predicted"]},
        "predicted: compare images with calibration images of their predicted class",
    ),
    "--least": (
        {"type": positive, "default": 19, "metavar": "N"},
        "images with which a class has scores of its own; others are pooled (19, for 95 %%)",
    ),
    "--id-data": (
        {"default": "cifar10"},
        "cifar10, cifar100, imagenet200, imagenet, digits (default: cifar10)",
    ),
    "--data-root": ({"default": "data"}, "images and lists in OpenOOD's layout (default: data)"),
    "--normalization": (
        {"type": normalization},
        "channel statistics that the networks were trained with: cifar10, cifar100, imagenet, "
        "digits, or mean and standard deviation as M,M,M,S,S,S (default: OpenOOD's for the data)",
    ),
    "--bits": (
        {"type": whole},
        "bits per pixel of 16-bit images that do not say it themselves, 12 for example",
    ),
    "--pages": (
        {"choices": ("first", "all"), "default": "first"},
        "which pages or frames of a file are images (default: first)",
    ),
    "--batch-size": ({"type": positive, "default": 200}, "images per batch (default: 200)"),
    "--amp": ({"choices": ["bf16"]}, "run the network in bfloat16 where that is safe"),
    "--channels-last": (FLAG, "use the channels-last memory format"),
    "--device": ({"default": "auto"}, "auto, cpu, cuda, cuda:1, mps (default: auto)"),
    "--num-workers": ({"type": whole, "default": 2}, "processes that load images (default: 2)"),
    "--no-progress": (FLAG, "show no progress bars"),
    "--seed": ({"type": whole, "default": 0}, "random seed (default: 0)"),
    "--store": (
        {"default": "results/store", "metavar": "DIR"},
        "store the scores of each image in this folder, so that no image is scored twice; none = "
        "store nothing (default: results/store)",
    ),
    "--report": ({"metavar": "FILE"}, "also write an HTML page with figures and images"),
}
COMPUTING = ("--device", "--num-workers", "--no-progress")
DETECTOR = ("--detector", "--network", "--bits", "--weights", "--weights-by-order")


def add(parser: _ActionsContainer, *names: str, **changes: Any) -> None:
    """Add options by name; `changes` of their declaration are for this command."""
    for name in names:
        declared, text = OPTIONS[name]
        parser.add_argument(name, **{**declared, "help": text, **changes})
