"""OpenOOD's postprocessors, applied to the scoring logits of T2FNorm networks."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fusenorm_openood.errors import CheckpointError, ConfigError, unknown
from fusenorm_openood.forward.passes import forward_pass
from fusenorm_openood.method.settings import METHODS
from fusenorm_openood.network import resnet, running, understanding
from fusenorm_openood.network.fingerprint import Fingerprint, fingerprint
from fusenorm_openood.network.structure import Structure
from fusenorm_openood.openood.bridge import base_postprocessor, openood_module
from fusenorm_openood.openood.postprocessor import FuseNormPostprocessor
from fusenorm_openood.storage.configs import lookup

# The class in which OpenOOD wraps the network, by postprocessor.
WRAPPERS = {
    "react": ("react_net", "ReactNet"),
    "ash": ("ash_net", "ASHNet"),
    "scale": ("scale_net", "ScaleNet"),
    "adascale_a": ("adascale_net", "AdaScaleANet"),
    "adascale_l": ("adascale_net", "AdaScaleLNet"),
}
# Postprocessors that differentiate with respect to the images and predict from perturbed ones.
PERTURBING = ("odin", "iodin")


class ScoringView(resnet.FeatureClassifier):
    """A network with the interface of OpenOOD's plain classifiers, by its scoring logits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self._structure: Structure | None = None

    def forward(self, x: Tensor, return_feature: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Scoring logits `[B, K]`, optionally with the feature `[B, D]` that `fc` takes."""
        self._structure = self._structure or understanding.understand(self.net, x)
        done = forward_pass(self.net, x, self._structure)
        if not return_feature:
            return done.logits
        if done.feature is None:
            raise self._no_head()
        return done.logits, done.feature

    @property
    def fc(self) -> nn.Linear:  # type: ignore[override]
        if self._structure is not None and self._structure.affine is not None:
            fc, (weight, bias) = nn.Linear(0, 0), self._structure.affine
            fc.weight, fc.bias = nn.Parameter(weight), nn.Parameter(bias)
            return fc
        linear = [m for m in self.net.modules() if isinstance(m, nn.Linear)]
        if not linear:
            raise self._no_head()
        return linear[-1]

    def _no_head(self) -> CheckpointError:
        return CheckpointError(
            f"{type(self.net).__name__} has no final linear layer: choose a postprocessor that "
            "needs only logits, for example msp"
        )


def openood_view(net: nn.Module) -> nn.Module:
    """The network as OpenOOD's postprocessors expect it: wrapped, unless it has their interface."""
    # `AdaptedPostprocessor` wraps networks with scoring logits.
    return net if hasattr(net, "get_fc") or resnet.has_scoring_logits(net) else ScoringView(net)


class AdaptedPostprocessor(base_postprocessor()):  # type: ignore[misc]
    """One of OpenOOD's postprocessors, adapted to score T2FNorm networks by their scoring logits.

    The inner postprocessor gets a T2FNorm network as a `ScoringView`, which for ReAct, ASH and
    SCALE is wrapped in OpenOOD's class of that name. The predicted classes are the network's, all
    other attributes, such as the parameters to search, the inner postprocessor's.
    """

    def __init__(self, inner: Any, name: str) -> None:
        super().__init__(inner.config)
        self.inner, self.name = inner, name
        self._network: Fingerprint | None = None  # that it was set up with

    def setup(self, net: Any, id_loader_dict: Any, ood_loader_dict: Any) -> None:
        """Set up the inner postprocessor, again for another network or other weights."""
        core = self._core(net)
        found = fingerprint(core)
        if self._network is not None and self._network.digest != found.digest:
            self.inner.setup_flag = False
        self._network = found
        self.inner.setup(self._view(core), id_loader_dict, ood_loader_dict)

    def postprocess(self, net: Any, data: Tensor) -> tuple[Tensor, Tensor]:
        """The network's predictions `[B]`, and the inner postprocessor's confidences `[B]`."""
        core = self._core(net)
        view, perturbs = self._view(core), self.name in PERTURBING
        contexts = (running.eval_mode, running.without_weight_gradients) if perturbs else ()
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context(core))
            pred, conf = self.inner.postprocess(view, data)
        if perturbs or view is not core or resnet.has_scoring_logits(core):
            with torch.no_grad():
                pred = core(data).argmax(1)
        return pred, conf

    def _core(self, net: Any) -> Any:
        """The network itself, without the wrapper that OpenOOD may already have put around it."""
        wrapper = self._wrapper()
        return net.backbone if wrapper and isinstance(net, wrapper) else net

    def _view(self, core: Any) -> Any:
        """The network as the inner postprocessor gets it."""
        if self.name == "t2fnorm":
            if not resnet.has_scoring_logits(core):
                raise CheckpointError(
                    "postprocessor 't2fnorm' needs a network trained with T2FNorm, got a "
                    f"{type(core).__name__}: use such a checkpoint, or another postprocessor"
                )
            return core
        wrapper = self._wrapper()
        scored = ScoringView(core) if resnet.has_scoring_logits(core) else core
        return wrapper(scored) if wrapper else scored

    def _wrapper(self) -> Any:
        module, wrapper = WRAPPERS.get(self.name, ("", ""))
        return getattr(openood_module(f"networks.{module}"), wrapper) if module else None

    def __getattr__(self, name: str) -> Any:
        if name == "inner" or name.startswith("__"):  # looked up during unpickling
            raise AttributeError(name)
        return getattr(self.inner, name)


def adapted(postprocessor: Any, name: str) -> Any:
    """A postprocessor adapted to T2FNorm networks; FuseNorm's handles such networks itself."""
    own = type(postprocessor).inference is not base_postprocessor().inference
    return postprocessor if own else AdaptedPostprocessor(postprocessor, name)


def make_postprocessor(name: str, config: Mapping[str, Any], id_name: str) -> Any:
    """FuseNorm's or one of OpenOOD's postprocessors, for OpenOOD's evaluator on an ID data set.

    ConfigError for an unknown name or an incomplete configuration, OpenOODError if OpenOOD is
    absent or broken.
    """
    if name in METHODS:
        return FuseNormPostprocessor(config)
    theirs = openood_module("evaluation_api.postprocessor").postprocessors
    if name not in theirs:
        raise ConfigError(unknown("postprocessor", name, sorted({*theirs, *METHODS})))
    aps_mode = bool(lookup(config, "postprocessor").get("APS_mode"))
    openood_config = openood_module("utils").Config(dict(config), dataset={"name": id_name})
    try:
        inner = theirs[name](openood_config)
    except (AttributeError, KeyError, TypeError) as error:  # OpenOOD does not validate it
        raise ConfigError(
            f"postprocessor {name!r} cannot be built from its configuration "
            f"({type(error).__name__}: {error}): see OpenOOD's configs/postprocessors"
        ) from error
    inner.APS_mode, inner.hyperparam_search_done = aps_mode, False
    if aps_mode and not hasattr(inner, "args_dict"):
        raise ConfigError(
            f"postprocessor {name!r} has no parameters to search: set APS_mode to False"
        )
    return adapted(inner, name)
