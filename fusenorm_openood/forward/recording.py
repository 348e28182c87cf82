"""What has to be recorded of a pass, and how a panel's scores come back from it.

Feature norms and ODIN need the network. All other experts are functions of the logits and the
penultimate feature: these are recorded, so that another choice of experts needs no other pass.
"""

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fusenorm_openood.forward.observed import Change, Heard, Listener, Observed
from fusenorm_openood.forward.panel import Fitted, Panel
from fusenorm_openood.forward.react import linear_logits
from fusenorm_openood.method.experts import Output, score_logits
from fusenorm_openood.method.posthoc import Seen
from fusenorm_openood.network.structure import Structure


def recording(
    net: nn.Module, structure: Structure, kept: Panel, fitted: Fitted, features: bool
) -> Listener:
    """A pass that gives a panel's scores, the logits, and perhaps the features.

    Args:
        net: the network; it is not run before the first images are listened to.
        structure: how it is built; see `understand`.
        kept: the panel.
        fitted: thresholds of ReAct.
        features: whether to give features; without any, `[B, 0]`.
    """
    what = {**kept.what(fitted), "features": features, "mixes": structure.batch_dependent}
    if structure.head.feature:
        what["feature"] = [*structure.head.feature, structure.head.is_normalised]

    def listen(images: Tensor) -> Heard:
        rows, done = kept.hear(net, structure, images, fitted)
        kept.seen(net, structure, done)  # fails where an expert lacks what it needs
        feature = done.feature if features and done.feature is not None else done.logits[:, :0]
        return rows, done.pred, Seen(feature, done.logits)

    return Listener(listen, what, taken=partial(_taken, json.loads(json.dumps(what))))


def recording_listener(
    net: nn.Module, structure: Structure, panel: Panel, fitted: Fitted
) -> Listener:
    """A pass that records what a panel needs, and restores what `Panel.listen` would have heard."""
    again = run_again(panel, structure)
    clipped = any(o.react_percentile is not None for o in panel.outputs if o not in again.outputs)
    features = clipped or any(expert.name != "gen" for expert in panel.posthoc)
    listener = recording(net, structure, again, fitted, features)

    def restore(heard: Observed) -> Observed:
        assert heard.seen is not None
        first = len(panel.taps) * len(panel.norms)
        rows = [heard.rows[:first].double()]
        for output in panel.outputs:
            if output in again.outputs:
                rows.append(heard.rows[None, again.output_row(output)])
            else:
                logits = clipped_logits(net, structure, heard.seen, output, fitted)
                rows.append(score_logits(output.output, logits, output.temperature)[None])
        seen = heard.seen if panel.posthoc else None
        if seen is not None and all(expert.name == "gen" for expert in panel.posthoc):
            seen = Seen(seen.logits, seen.logits)
        return heard._replace(rows=torch.cat(rows), seen=seen)

    return listener._replace(restore=restore)


def run_again(panel: Panel, structure: Structure) -> Panel:
    """The experts of a panel that need the network itself, with what the others need of a pass."""
    outputs = tuple(output for output in panel.outputs if runs_network(output, structure))
    return Panel(panel.taps, panel.norms, outputs, panel.posthoc)


def runs_network(output: Output, structure: Structure) -> bool:
    """Whether an output expert runs the network, or its head on more than one feature per image."""
    clips = output.react_percentile is not None
    return output.needs_gradient or (clips and not structure.head.is_linear)


def clipped_logits(
    net: nn.Module, structure: Structure, seen: Seen, output: Output, fitted: Fitted
) -> Tensor:
    """Logits `[B, K]` for an output expert that does not run the network."""
    if output.react_percentile is None:
        return seen.logits
    threshold = fitted.thresholds[output.react_percentile]
    return linear_logits(net, structure, seen.feature.clamp(max=threshold))


def _taken(mine: Mapping[str, Any], other: Mapping[str, Any]) -> Change | None:
    """How the answers of another pass contain those of `recording`; see `Listener.taken`.

    Gradients make a pass take the images in other parts, which may round otherwise.
    """
    if mine.keys() != other.keys() or mine["mixes"] != other["mixes"]:
        return None
    if mine["features"] and not other["features"]:
        return None
    if bool(mine["outputs"]) != bool(other["outputs"]):
        return None
    lists = [(mine[name], other[name]) for name in ("taps", "norms", "outputs")]
    if not all(item in theirs for ours, theirs in lists for item in ours):
        return None
    if not mine["thresholds"].items() <= other["thresholds"].items():
        return None
    taps, norms, outputs = ([theirs.index(item) for item in ours] for ours, theirs in lists)
    width = len(other["taps"])
    rows = [norm * width + tap for norm in norms for tap in taps]
    rows += [width * len(other["norms"]) + output for output in outputs]

    def taken(heard: Observed) -> Observed:
        seen = heard.seen
        if seen is not None and not mine["features"]:
            seen = Seen(seen.feature[:, :0], seen.logits)
        return heard._replace(rows=heard.rows[rows], seen=seen)

    return taken
