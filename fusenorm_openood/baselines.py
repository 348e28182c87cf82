"""Single output experts as postprocessors of their own, under OpenOOD's names and conventions."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import Self

from fusenorm_openood.errors import CheckpointError, ConfigError, NotFittedError
from fusenorm_openood.experts import energy, mls, msp, odin_perturb
from fusenorm_openood.forward import forward_pass, scores_apart
from fusenorm_openood.react import react_logits, react_thresholds
from fusenorm_openood.scoring import Detector
from fusenorm_openood.taps import undisturbed

# Postprocessor -> the arguments that its configuration must name.
BASELINES: dict[str, tuple[str, ...]] = {
    "msp": (),
    "mls": (),
    "ebo": ("temperature",),
    "odin": ("temperature", "noise"),
    "react": ("percentile",),
    "t2fnorm": (),
}


class Baseline(Detector):
    """One output expert, scored in float32 exactly as OpenOOD scores it, ties included.

    Args:
        net: any network that returns logits; T2FNorm's scores by its scoring logits.
        name: ``msp``, ``mls``, ``ebo``, ``odin``, ``react`` or ``t2fnorm``.
        input_std: standard deviations that the images were divided by, for ODIN's step.
        args: the postprocessor's arguments, all of them.

    Raises:
        ConfigError: an unknown postprocessor, or arguments that are not its own.
        CheckpointError: ``t2fnorm`` on a network that is none.
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
        if name == "t2fnorm" and not scores_apart(net):
            raise CheckpointError(
                f"t2fnorm scores a network trained with T2FNorm, found a {type(net).__name__}: "
                "give such a checkpoint, or choose another postprocessor"
            )
        self.name, self.args, self.input_std = name, args, input_std
        self.experts = (name,)
        self.threshold_: float | None = None

    def fit(self, loader: Iterable[Any], progress: bool = False) -> Self:
        """Find ReAct's threshold on ID images; the other experts have nothing to fit."""
        if self.name == "react":
            percentile = self.args["percentile"]
            self.threshold_ = react_thresholds(self.net, loader, [percentile], progress)[percentile]
        return self

    def _check_fitted(self) -> None:
        if self.name == "react" and self.threshold_ is None:
            raise NotFittedError("this ReAct has no threshold: call fit(loader) first")

    def _expert_scores(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with undisturbed(self.net):
            if self.name == "odin":
                temperature, noise = self.args["temperature"], self.args["noise"]
                with torch.inference_mode(False), torch.enable_grad():
                    leaf = images.detach().clone().requires_grad_()
                    first = forward_pass(self.net, leaf)
                    images = odin_perturb(leaf, first.logits, temperature, noise, self.input_std)
                with torch.no_grad():
                    score = msp(forward_pass(self.net, images).logits, temperature)
                return score.unsqueeze(0), first.pred
            with torch.no_grad():
                first = forward_pass(self.net, images)
                logits = react_logits(self.net, first, self.threshold_)
        if self.name == "mls":
            score = mls(logits)
        elif self.name in ("ebo", "react"):
            score = energy(logits, self.args.get("temperature", 1.0))
        else:
            score = msp(logits)
        return score.unsqueeze(0), first.pred

    def confidence(self, experts: NDArray[Any]) -> NDArray[Any]:
        conf: NDArray[Any] = experts[0]
        return conf


def check_baseline(name: str, args: Mapping[str, Any]) -> None:
    """Raise ConfigError unless a postprocessor of that name takes these arguments."""
    if name not in BASELINES:
        raise ConfigError(f"postprocessor {name!r} unknown: choose {', '.join(BASELINES)}")
    if set(args) != set(BASELINES[name]):
        raise ConfigError(
            f"postprocessor {name!r} with the arguments {sorted(args)} found: "
            f"its arguments are {sorted(BASELINES[name])}"
        )
    for key, value in args.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        least, most = (0, 100) if key == "percentile" else (0, math.inf)
        if not number or not least <= value < most or (value == 0 and key != "noise"):
            raise ConfigError(
                f"{key} = {value!r} is no {key} for {name!r}: choose one from {least} to {most}"
            )
