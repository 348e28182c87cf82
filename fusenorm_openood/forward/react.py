"""ReAct: clipping the penultimate feature at a percentile of its ID activations."""

from torch import Tensor, nn
from torch.nn import functional as F

from fusenorm_openood.errors import TapError
from fusenorm_openood.forward.passes import Pass, apply_head, forward_pass
from fusenorm_openood.kernels.devices import following, full_precision
from fusenorm_openood.method.posthoc import Head
from fusenorm_openood.network.head import linear_head
from fusenorm_openood.network.named import LazyNetwork
from fusenorm_openood.network.running import eval_mode, unwrapped
from fusenorm_openood.network.structure import Structure


def react_logits(
    net: nn.Module, structure: Structure, images: Tensor, done: Pass, threshold: float | None
) -> Tensor:
    """Logits of a pass over images, with its penultimate feature clipped at the threshold, if any.

    The layers that make the logits are applied once more, and the whole network where the logits
    are not their sum.
    """
    if threshold is None:
        return done.logits
    if done.feature is None:
        raise no_head(net)
    if not structure.head.is_linear:
        return forward_pass(net, images, structure, threshold=threshold).logits
    core, names = unwrapped(net), structure.head.names
    clipped = done.feature.clamp(max=threshold)
    plain = structure.head.shares == (1.0,) and not structure.head.feature
    if plain and isinstance(core.get_submodule(names[0]), nn.Linear):
        return apply_head(core.get_submodule(names[0]), clipped)
    return linear_logits(net, structure, clipped)


def linear_logits(net: nn.Module, structure: Structure, feature: Tensor) -> Tensor:
    """Logits `[B, K]` of features `[B, D]`, on their device and in float32."""
    weight, bias = (following(t.float(), feature.device) for t in head_of(net, structure))
    with full_precision(feature.device):
        return F.linear(feature.float(), weight, bias)


def head_of(net: nn.Module, structure: Structure) -> Head:
    """Weight and bias of the network's logits as a linear function of its feature.

    Raises:
        TapError: they are none.
    """
    if isinstance(net, LazyNetwork) and net.known is not None and net.known.head is not None:
        head: Head = net.known.head
        return head
    if structure.affine is not None:
        return structure.affine
    layers, found = [unwrapped(net).get_submodule(name) for name in structure.head.names], None
    if structure.head.is_affine:
        with eval_mode(nn.ModuleList(layers)):  # a spectral norm in training changes when read
            found = linear_head(layers, structure.head.shares)
    if found is None:
        raise TapError(
            f"the logits of {type(net).__name__} are no linear function of a feature, whose "
            "weights an expert needs: set strong=['output']"
        )
    return found


def no_head(net: nn.Module) -> TapError:
    return TapError(
        f"ReAct needs the layers that make the logits, and none was found in {type(net).__name__}: "
        "set react_percentile=None"
    )
