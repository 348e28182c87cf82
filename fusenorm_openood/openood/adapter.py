"""OpenOOD's postprocessors, each shown a network as it is to be scored."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fusenorm_openood.configs import lookup
from fusenorm_openood.errors import CheckpointError, ConfigError
from fusenorm_openood.listening.modes import undisturbed, without_weight_gradients
from fusenorm_openood.listening.passes import final_linear, forward_pass
from fusenorm_openood.networks.t2fnorm import scores_apart
from fusenorm_openood.openood.bridge import base_postprocessor, openood_module
from fusenorm_openood.openood.postprocessor import FuseNormPostprocessor

# The network that OpenOOD wraps around the one to be scored, by postprocessor.
WRAPPERS = {
    "react": ("react_net", "ReactNet"),
    "ash": ("ash_net", "ASHNet"),
    "scale": ("scale_net", "ScaleNet"),
    "adascale_a": ("adascale_net", "AdaScaleANet"),
    "adascale_l": ("adascale_net", "AdaScaleLNet"),
}
# They differentiate with respect to the images, and predict from perturbed ones.
PERTURBING = ("odin", "iodin")


class ScoringView(nn.Module):
    """A T2FNorm network as a plain classifier by the logits that it scores by.

    Args:
        net: network with a method ``forward_ood_inference`` and a linear layer at its end.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, return_feature: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Scoring logits ``[B, K]``, with the feature ``[B, D]`` that they are linear in."""
        done = forward_pass(self.net, x)
        if not return_feature:
            return done.logits
        if done.feature is None:
            raise CheckpointError(f"{type(self.net).__name__} has no linear layer for a feature")
        return done.logits, done.feature

    @property
    def fc(self) -> nn.Linear:
        fc = final_linear(self.net)
        if fc is None:
            raise CheckpointError(f"{type(self.net).__name__} has no linear layer for its logits")
        return fc

    def get_fc_layer(self) -> nn.Linear:
        return self.fc

    def get_fc(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Weight ``[K, D]`` and bias ``[K]`` of the linear layer."""
        fc = self.fc
        return fc.weight.detach().cpu().numpy(), fc.bias.detach().cpu().numpy()


class AdaptedPostprocessor(base_postprocessor()):  # type: ignore[misc]
    """One of OpenOOD's postprocessors, which scores by what the network is made to score by.

    A T2FNorm network is shown as :class:`ScoringView`, for ReAct, ASH and SCALE inside OpenOOD's
    network of that name. Predicted classes stay the network's own. All else, the parameters to
    search for one, is the inner postprocessor's.

    Args:
        inner: OpenOOD's postprocessor.
        name: its name in OpenOOD.
    """

    def __init__(self, inner: Any, name: str) -> None:
        super().__init__(inner.config)
        self.inner, self.name = inner, name

    def setup(self, net: Any, id_loader_dict: Any, ood_loader_dict: Any) -> None:
        """Let the inner postprocessor set itself up.

        Raises:
            CheckpointError: ``t2fnorm`` on a network that is none.
        """
        self.inner.setup(self._shown(self._core(net)), id_loader_dict, ood_loader_dict)

    def postprocess(self, net: Any, data: Tensor) -> tuple[Tensor, Tensor]:
        """The network's predictions ``[B]``, and the inner postprocessor's confidences ``[B]``."""
        core = self._core(net)
        shown = self._shown(core)
        perturbs = self.name in PERTURBING
        with ExitStack() as stack:
            if perturbs:
                stack.enter_context(undisturbed(core))
                stack.enter_context(without_weight_gradients(core))
            pred, conf = self.inner.postprocess(shown, data)
        if perturbs or shown is not core or scores_apart(core):
            with torch.no_grad():
                pred = core(data).argmax(1)
        return pred, conf

    def _core(self, net: Any) -> Any:
        """The network inside a wrapper of OpenOOD's that is there already."""
        wrapper = self._wrapper()
        return net.backbone if wrapper is not None and isinstance(net, wrapper) else net

    def _shown(self, core: Any) -> Any:
        """The network as the inner postprocessor is to see it."""
        if self.name == "t2fnorm":
            if not scores_apart(core):
                raise CheckpointError(
                    f"t2fnorm scores a network trained with T2FNorm, found a {type(core).__name__}:"
                    " give such a checkpoint, or choose another postprocessor"
                )
            return core
        wrapper = self._wrapper()
        scored = ScoringView(core) if scores_apart(core) else core
        return scored if wrapper is None else wrapper(scored)

    def _wrapper(self) -> Any:
        if self.name not in WRAPPERS:
            return None
        module, wrapper = WRAPPERS[self.name]
        return getattr(openood_module(f"networks.{module}"), wrapper)

    def __getattr__(self, name: str) -> Any:
        if name == "inner" or name.startswith("__"):  # asked for while unpickling
            raise AttributeError(name)
        return getattr(self.inner, name)


def adapted(postprocessor: Any, name: str) -> Any:
    """A postprocessor adapted to T2FNorm networks, unless it runs inference by itself.

    FuseNorm's does, and knows such networks.
    """
    own = type(postprocessor).inference is not base_postprocessor().inference
    return postprocessor if own else AdaptedPostprocessor(postprocessor, name)


def make_postprocessor(name: str, config: Mapping[str, Any], id_name: str) -> Any:
    """The postprocessor of that name in OpenOOD, or FuseNorm's, for OpenOOD's evaluator.

    Args:
        name: any name that OpenOOD's evaluation API knows, or ``fusenorm``.
        config: configuration with the section ``postprocessor``.
        id_name: ID data set.

    Raises:
        ConfigError: an unknown name, or a configuration that lacks something.
        OpenOODError: OpenOOD is absent or broken.
    """
    if name == "fusenorm":
        return FuseNormPostprocessor(config)
    known = openood_module("evaluation_api.postprocessor").postprocessors
    if name not in known:
        names = ", ".join(sorted({*known, "fusenorm"}))
        raise ConfigError(f"postprocessor {name!r} unknown: choose among {names}")
    aps_mode = bool(lookup(config, "postprocessor").get("APS_mode"))
    openood_config = openood_module("utils").Config(dict(config), dataset={"name": id_name})
    try:
        inner = known[name](openood_config)
    except (AttributeError, KeyError, TypeError) as error:  # OpenOOD checks no configuration
        raise ConfigError(
            f"postprocessor {name!r} cannot be made from its configuration "
            f"({type(error).__name__}: {error}): see OpenOOD's configs/postprocessors"
        ) from error
    inner.APS_mode, inner.hyperparam_search_done = aps_mode, False
    if aps_mode and not hasattr(inner, "args_dict"):
        raise ConfigError(
            f"APS_mode: True found, and {name!r} has no parameters to search: set it to False"
        )
    return adapted(inner, name)
