"""Single output experts as postprocessors, with OpenOOD's names and conventions."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import Self

from fusenorm_openood.configs import config_root, lookup, read_config
from fusenorm_openood.detectors.decisions import DecidingDetector
from fusenorm_openood.errors import CheckpointError, ConfigError, NotFittedError
from fusenorm_openood.listening.gradient import gradients_of_images
from fusenorm_openood.listening.observed import Heard, Listener
from fusenorm_openood.listening.passes import Pass, forward_pass
from fusenorm_openood.listening.react import react_logits, react_thresholds
from fusenorm_openood.method.experts import (
    PROBABILITY,
    Output,
    energy,
    mls,
    msp,
    odin_perturb,
)
from fusenorm_openood.method.posthoc import POSTHOC
from fusenorm_openood.structure.modes import undisturbed
from fusenorm_openood.structure.wrappers import scoring_module, unwrapped


class Kind(NamedTuple):
    """A single expert as a postprocessor: its title in tables and its required arguments."""

    title: str
    arguments: tuple[str, ...] = ()


BASELINES = {
    "msp": Kind("MSP"),
    "mls": Kind("MLS"),
    "ebo": Kind("Energy", ("temperature",)),
    "odin": Kind("ODIN", ("temperature", "noise")),
    "react": Kind("ReAct", ("percentile",)),
    "t2fnorm": Kind("T2FNorm"),
}
SINGLE = (*BASELINES, *POSTHOC)  # single experts as postprocessors


class Baseline(DecidingDetector):
    """One output expert, scored in float32 exactly as in OpenOOD, including ties.

    Args:
        net: any network that returns logits; a T2FNorm network is scored by its scoring logits.
        name: `msp`, `mls`, `ebo`, `odin`, `react` or `t2fnorm`.
        input_std: standard deviations by which the images were divided, for ODIN's step.
        args: all of the postprocessor's arguments.

    Raises:
        ConfigError: an unknown postprocessor, or invalid arguments.
        CheckpointError: `t2fnorm` with a network that was not trained with T2FNorm.
    """

    def __init__(
        self,
        net: nn.Module,
        name: str,
        input_std: tuple[float, ...] | None = None,
        **args: float,
    ) -> None:
        super().__init__(net)
        check_baseline(name, args)
        if name == "t2fnorm" and scoring_module(net) is None:
            raise CheckpointError(
                "postprocessor 't2fnorm' needs a network trained with T2FNorm, got a "
                f"{type(unwrapped(net)).__name__}: use such a checkpoint, or another postprocessor"
            )
        self.experts = (name,)
        self.output = output_of(name, args, input_std)
        self._thresholds: dict[float, float] = {}

    def fit(self, loader: Iterable[Any], progress: bool = False) -> Self:
        """Fit ReAct's threshold on ID images; the other experts have nothing to fit."""
        percentiles = [q for q in (self.output.react_percentile,) if q is not None]
        if percentiles:
            readings = self._begin(loader)
            assert self._structure is not None  # since the readings began
            self._thresholds = react_thresholds(
                self.net, self._structure, readings, percentiles, progress
            )
        return self

    def _try(self, images: Tensor) -> None:
        structure = self.structure(images)
        with undisturbed(unwrapped(self.net)), torch.no_grad():
            done = forward_pass(self.net, images, structure)
            react_logits(self.net, structure, images, done, float("inf"))

    @property
    def threshold_(self) -> float | None:
        """ReAct's clipping threshold, None before `fit`."""
        return next(iter(self._thresholds.values()), None)

    def _check_fitted(self) -> None:
        if self.output.react_percentile is not None and self.threshold_ is None:
            raise NotFittedError("this ReAct has no threshold: call fit(loader) first")

    def _listener(self, recorded: bool = False) -> Listener:
        return Listener(self._listen, {"output": list(self.output), "threshold": self.threshold_})

    def _listen(self, images: Tensor) -> Heard:
        name, temperature, noise, input_std, _ = self.output
        net, structure = self.net, self.structure(images)
        with undisturbed(unwrapped(net)):
            if name == "odin":

                def perturb(leaf: Tensor) -> tuple[Pass, Tensor]:
                    done = forward_pass(net, leaf, structure)
                    moved = odin_perturb(leaf, done.logits, temperature, noise, input_std)
                    return done, moved

                first, images = gradients_of_images(net, images, perturb)
                with torch.no_grad():
                    score = msp(forward_pass(net, images, structure).logits, temperature)
                return score.unsqueeze(0), first.pred, None
            with torch.no_grad():
                first = forward_pass(net, images, structure)
                logits = react_logits(net, structure, images, first, self.threshold_)
        if name == "mls":
            score = mls(logits)
        else:
            score = (energy if name == "energy" else msp)(logits, temperature)
        return score.unsqueeze(0), first.pred, None

    def confidence(self, experts: NDArray[Any]) -> NDArray[Any]:
        conf: NDArray[Any] = experts[0]
        return conf


def output_of(
    name: str, args: Mapping[str, float], input_std: tuple[float, ...] | None = None
) -> Output:
    """The output expert of a baseline with the given arguments."""
    if name in ("msp", "t2fnorm"):
        return Output(PROBABILITY, 1.0)
    if name == "react":
        return Output("energy", 1.0, react_percentile=args["percentile"])
    if name == "odin":
        return Output("odin", args["temperature"], args["noise"], input_std)
    return Output("mls", 1.0) if name == "mls" else Output("energy", args["temperature"])


def default_args(name: str) -> dict[str, float]:
    """A baseline's arguments in `configs/postprocessors`, which are OpenOOD's."""
    config = read_config(config_root() / "postprocessors" / f"{name}.yml")
    return lookup(config, "postprocessor").get("postprocessor_args") or {}


def check_baseline(name: str, args: Mapping[str, Any]) -> None:
    """Raise ConfigError unless the name and the arguments are valid."""
    if name not in BASELINES:
        raise ConfigError(f"unknown postprocessor {name!r}: choose from {', '.join(BASELINES)}")
    arguments = BASELINES[name].arguments
    if set(args) != set(arguments):
        raise ConfigError(
            f"postprocessor {name!r} takes the arguments {sorted(arguments)}, got {sorted(args)}"
        )
    for key, value in args.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        most = 100 if key == "percentile" else math.inf
        if not number or not 0 <= value < most or (value == 0 and key != "noise"):
            bracket = "[" if key == "noise" else "("
            raise ConfigError(
                f"{key} of {name!r} must be a number in {bracket}0, {most}), got {value!r}"
            )
