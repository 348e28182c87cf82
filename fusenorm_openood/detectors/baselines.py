"""Single output experts as postprocessors, with OpenOOD's names and conventions."""

from collections.abc import Iterable, Mapping
from math import inf
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import Self

from fusenorm_openood.detectors.atomic import atomic
from fusenorm_openood.detectors.base import check_energy
from fusenorm_openood.detectors.decisions import DecidingDetector
from fusenorm_openood.detectors.enough import known_count, needed, warn_if_few
from fusenorm_openood.errors import CheckpointError, ConfigError, NotFittedError, number
from fusenorm_openood.forward.gradient import gradients_of_images
from fusenorm_openood.forward.observed import Heard, Listener, Observed
from fusenorm_openood.forward.panel import Fitted, Panel
from fusenorm_openood.forward.passes import Pass, forward_pass
from fusenorm_openood.forward.react import react_logits
from fusenorm_openood.forward.recording import clipped_logits, recording, runs_network
from fusenorm_openood.forward.thresholds import react_thresholds
from fusenorm_openood.method.experts import (
    PROBABILITY,
    Output,
    energy,
    mls,
    msp,
    odin_perturb,
)
from fusenorm_openood.method.posthoc import POSTHOC
from fusenorm_openood.network.running import eval_mode, scoring_module, unwrapped
from fusenorm_openood.network.structure import Structure
from fusenorm_openood.storage.configs import config_root, lookup, read_config


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
        random: whether the network may be random, `refuse` or `allow`; see `Settings`.
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
        random: str = "refuse",
        **args: float,
    ) -> None:
        super().__init__(net)
        self._random = random
        args = checked_baseline(name, args)
        if name == "t2fnorm" and scoring_module(net) is None:
            raise CheckpointError(
                "postprocessor 't2fnorm' needs a network trained with T2FNorm, got a "
                f"{type(unwrapped(net)).__name__}: use such a checkpoint, or another postprocessor"
            )
        self.experts = (name,)
        self.output = output_of(name, args, input_std)
        self._fitted = Fitted()

    @atomic
    def fit(self, loader: Iterable[Any], progress: bool = False) -> Self:
        """Fit ReAct's threshold on ID images; the other experts have nothing to fit."""
        panel = Panel((), (), (self.output,))
        if panel.percentiles:
            readings = self._begin(loader)
            warn_if_few(known_count(readings), needed(self.net, self._known(), panel))
            thresholds = react_thresholds(self.net, self._known(), readings, panel, progress)
            self._fitted = Fitted(thresholds)
        return self

    def _check_structure(self, structure: Structure) -> None:
        super()._check_structure(structure)
        check_energy(self.net, structure, [self.output])

    def _try(self, images: Tensor) -> None:
        structure = self.structure(images)
        with eval_mode(unwrapped(self.net)), torch.no_grad():
            done = forward_pass(self.net, images, structure)
            react_logits(self.net, structure, images, done, float("inf"))

    @property
    def threshold_(self) -> float | None:
        """ReAct's clipping threshold, None before `fit`."""
        return next(iter(self._fitted.thresholds.values()), None)

    def _check_fitted(self) -> None:
        if self.output.react_percentile is not None and self.threshold_ is None:
            raise NotFittedError("this ReAct has no threshold: call fit(loader) first")

    def _listener(self, recorded: bool = False) -> Listener:
        if recorded:
            return self._pass(self._known())

        def listen(images: Tensor) -> Heard:
            return self._pass(self.structure(images)).listen(images)

        return Listener(listen, {})

    def _pass(self, structure: Structure) -> Listener:
        """A pass that gives scores if they take more of the network, else logits and features."""
        if runs_network(self.output, structure):
            what = {"output": list(self.output), "threshold": self.threshold_}
            what["mixes"] = structure.batch_dependent
            return Listener(self._listen, what)
        clips = self.output.react_percentile is not None
        return recording(self.net, structure, Panel((), ()), Fitted(), features=clips)

    def _listen(self, images: Tensor) -> Heard:
        net, structure = self.net, self.structure(images)
        name, temperature, noise, input_std, _ = self.output
        with eval_mode(unwrapped(net)):
            if name == "odin":

                def perturb(leaf: Tensor) -> tuple[Pass, Tensor]:
                    done = forward_pass(net, leaf, structure)
                    moved = odin_perturb(leaf, done.logits, temperature, noise, input_std)
                    return done, moved

                first, images = gradients_of_images(net, images, perturb)
                with torch.no_grad():
                    logits = forward_pass(net, images, structure).logits
            else:
                with torch.no_grad():
                    first = forward_pass(net, images, structure)
                    logits = react_logits(net, structure, images, first, self.threshold_)
        return self._scored(logits), first.pred, None

    def _expert_scores(self, observed: Observed) -> Tensor:
        if observed.seen is None:
            return observed.rows
        seen, structure = observed.seen, self._known()
        return self._scored(clipped_logits(self.net, structure, seen, self.output, self._fitted))

    def _scored(self, logits: Tensor) -> Tensor:
        """Scores `[1, B]` of logits, in their precision."""
        name, temperature, *_ = self.output
        if name == "mls":
            return mls(logits).unsqueeze(0)
        return (energy if name == "energy" else msp)(logits, temperature).unsqueeze(0)

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


def checked_baseline(name: str, args: Mapping[str, Any]) -> dict[str, float]:
    """The arguments as Python's numbers; ConfigError unless they and the name are valid."""
    if name not in BASELINES:
        raise ConfigError(f"unknown postprocessor {name!r}: choose from {', '.join(BASELINES)}")
    arguments = BASELINES[name].arguments
    if set(args) != set(arguments):
        raise ConfigError(
            f"postprocessor {name!r} takes the arguments {sorted(arguments)}, got {sorted(args)}"
        )
    found = {}
    for key, given in args.items():
        value, most = number(given), 100 if key == "percentile" else inf
        if value is None or not 0 <= value < most or (value == 0 and key != "noise"):
            bracket = "[" if key == "noise" else "("
            raise ConfigError(
                f"{key} of {name!r} must be a number in {bracket}0, {most}), got {given!r}"
            )
        found[key] = value
    return found
