"""What has to be recorded of a pass, and how a panel's scores come back from it.

Feature norms and ODIN need the network. All other experts are functions of the logits and the
penultimate feature: these are recorded, so that another choice of experts needs no other pass.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusenorm_openood.listening.observed import Heard, Listener, Observed
from fusenorm_openood.listening.panel import Fitted, Panel
from fusenorm_openood.listening.react import head_of
from fusenorm_openood.method.experts import Output, score_logits
from fusenorm_openood.method.posthoc import Seen
from fusenorm_openood.structure.reading import Structure


def recording_listener(
    net: nn.Module, structure: Structure, panel: Panel, fitted: Fitted
) -> Listener:
    """A pass that records what a panel needs, and restores what `Panel.listen` would have heard.

    Args:
        net: the network; it is not run before the first images are listened to.
        structure: how it is built; see `understand`.
        panel: the panel.
        fitted: thresholds of ReAct.
    """
    kept = Panel(panel.taps, panel.norms, tuple(o for o in panel.outputs if _runs(o, structure)))
    clipped = any(o.react_percentile is not None for o in panel.outputs if o not in kept.outputs)
    features = clipped or any(expert.name != "gen" for expert in panel.posthoc)

    def listen(images: Tensor) -> Heard:
        rows, done = kept.hear(net, structure, images, fitted)
        panel.seen(net, structure, done)  # fails where an expert lacks what it needs
        feature = done.feature if features and done.feature is not None else done.logits[:, :0]
        return rows, done.pred, Seen(feature, done.logits)

    def restore(heard: Observed) -> Observed:
        assert heard.seen is not None
        first = len(panel.taps) * len(panel.norms)
        rows = [heard.rows[:first].double()]
        for output in panel.outputs:
            if output in kept.outputs:
                rows.append(heard.rows[None, kept.output_row(output)])
            else:
                logits = _logits(net, structure, heard.seen, output, fitted)
                rows.append(score_logits(output.output, logits, output.temperature)[None])
        seen = heard.seen if panel.posthoc else None
        if seen is not None and all(expert.name == "gen" for expert in panel.posthoc):
            seen = Seen(seen.logits, seen.logits)
        return heard._replace(rows=torch.cat(rows), seen=seen)

    what = {**kept.what(fitted), "features": features, "mixes": structure.mixes}
    return Listener(listen, what, restore)


def _runs(output: Output, structure: Structure) -> bool:
    """Whether an output expert runs the network, or its head on more than one feature per image."""
    clips = output.react_percentile is not None
    return output.needs_gradient or (clips and not structure.head.is_linear)


def _logits(
    net: nn.Module, structure: Structure, seen: Seen, output: Output, fitted: Fitted
) -> Tensor:
    if output.react_percentile is None:
        return seen.logits
    weight, bias = (t.cpu().float() for t in head_of(net, structure))
    threshold = fitted.thresholds[output.react_percentile]
    with torch.autocast("cpu", enabled=False):  # in full precision, as in `react_logits`
        return F.linear(seen.feature.clamp(max=threshold).float(), weight, bias)
