"""A panel of experts: all scores that one pass over the images can provide."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fusenorm_openood.errors import TapError
from fusenorm_openood.forward.gradient import gradients_of_images
from fusenorm_openood.forward.observed import Heard, Observed
from fusenorm_openood.forward.passes import Pass, forward_pass, joined, parts
from fusenorm_openood.forward.react import head_of, react_logits
from fusenorm_openood.kernels.devices import following, with_double
from fusenorm_openood.method.atf import FeatureNorm, atf_each
from fusenorm_openood.method.experts import Output, odin_direction, odin_step, score_logits
from fusenorm_openood.method.posthoc import POSTHOC, Head, Posthoc, Seen, State
from fusenorm_openood.network.running import eval_mode, unwrapped
from fusenorm_openood.network.structure import Structure

REAPPLIED = ("ash", "scale")  # apply the final layer to changed features
READING = ("fdbd", "nci", "vim", *REAPPLIED)  # read its weights


@dataclass
class Fitted:
    """What the experts of a panel fit on ID images.

    Attributes:
        thresholds: ReAct's clipping thresholds by percentile; see `react_thresholds`.
        states: states of the post-hoc experts, on the CPU.
    """

    thresholds: dict[float, float] = field(default_factory=dict)
    states: dict[Posthoc, State] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._moved: dict[tuple[Posthoc, torch.device], State] = {}

    def __reduce__(self) -> tuple[Any, ...]:  # what was moved to a device is not pickled
        return Fitted, (self.thresholds, self.states)

    def state(self, expert: Posthoc, device: torch.device) -> State:
        """The state of an expert on a device, to which it is moved once."""
        if device.type == "cpu":
            return self.states[expert]
        if (expert, device) not in self._moved:
            moved = {name: value.to(device) for name, value in self.states[expert].items()}
            self._moved[expert, device] = moved
        return self._moved[expert, device]


@dataclass(frozen=True)
class Panel:
    """Every feature norm at every tap, and all other experts, each computed once.

    One forward pass serves all of them. Each distinct ODIN noise needs one more forward pass, and
    each distinct pair of temperature and ReAct percentile a gradient.
    """

    taps: tuple[str, ...]
    norms: tuple[FeatureNorm, ...]
    outputs: tuple[Output, ...] = ()
    posthoc: tuple[Posthoc, ...] = ()

    @property
    def percentiles(self) -> list[float]:
        """Percentiles at which ReAct clips for at least one output expert."""
        given = (o.react_percentile for o in self.outputs)
        return list(dict.fromkeys(q for q in given if q is not None))

    def norm_rows(self, taps: Iterable[str], norm: FeatureNorm) -> list[int]:
        """Row indices of one feature norm at each of the taps."""
        first = self.norms.index(norm) * len(self.taps)
        return [first + self.taps.index(tap) for tap in taps]

    def output_row(self, output: Output) -> int:
        """Row index of an output expert."""
        return len(self.norms) * len(self.taps) + self.outputs.index(output)

    def posthoc_row(self, expert: Posthoc) -> int:
        """Row index of a post-hoc expert."""
        return self.unfitted + self.posthoc.index(expert)

    @property
    def unfitted(self) -> int:
        """Number of rows before those of the post-hoc experts."""
        return len(self.norms) * len(self.taps) + len(self.outputs)

    def completed(
        self, net: nn.Module, structure: Structure, heard: Observed, fitted: Fitted
    ) -> Tensor:
        """Scores `[R, B]`, larger = more in-distribution: of `listen`, and of post-hoc experts."""
        rows, seen = heard.rows, heard.seen
        if seen is None:
            return rows
        head = self.head(net, structure)
        scored = [
            POSTHOC[expert.name].score(
                seen, head, fitted.state(expert, seen.feature.device), dict(expert.arguments)
            )
            for expert in self.posthoc
        ]
        # First the device and then the precision, which the other device may not have.
        return torch.cat([rows, following(torch.stack(scored), rows.device).to(rows)])

    def head(self, net: nn.Module, structure: Structure) -> Head:
        """The network's head for the post-hoc experts, empty if none of them reads it."""
        if not any(expert.name in READING for expert in self.posthoc):
            none = torch.empty(0, dtype=torch.float32, device="cpu")
            return Head(none[:, None], none)
        return head_of(net, structure)

    def what(self, fitted: Fitted) -> dict[str, Any]:
        """All that `listen` depends on besides the network and the images; see `Listener`."""
        return {
            "taps": self.taps,
            "norms": self.norms,
            "outputs": self.outputs,
            "thresholds": {str(q): fitted.thresholds[q] for q in self.percentiles},
        }

    def listen(self, net: nn.Module, structure: Structure, images: Tensor, fitted: Fitted) -> Heard:
        """Scores `[R, B]` without post-hoc experts, predicted classes `[B]`, and what these see.

        Args:
            net: a network; it is left unchanged.
            structure: how it is built; see `understand`.
            images: `[B, C, H, W]` on its device.
            fitted: what `fit_panel` has fitted.

        Raises:
            TapError: the network lacks what an expert needs: a tap, a gradient with respect to the
                images, or for post-hoc experts a final linear layer.
        """
        rows, done = self.hear(net, structure, images, fitted)
        return rows, done.pred, self.seen(net, structure, done)

    def hear(
        self, net: nn.Module, structure: Structure, images: Tensor, fitted: Fitted
    ) -> tuple[Tensor, Pass]:
        """As `listen`, but with all of the pass; see there."""
        with eval_mode(unwrapped(net)):
            listened = [
                self.listen_whole(net, structure, part, fitted)
                for part in parts(images, structure.batch_dependent)
            ]
        rows, passes = zip(*listened, strict=True)
        return torch.cat(rows, dim=1), joined(passes)

    def seen(self, net: nn.Module, structure: Structure, done: Pass) -> Seen | None:
        """What the post-hoc experts see of a pass, None without such experts.

        Raises:
            TapError: see `listen`.
        """
        if not self.posthoc:
            return None
        names = [expert.name for expert in self.posthoc if expert.name != "gen"]
        if not names:
            return Seen(done.logits, done.logits)  # GEN reads the logits alone
        head = structure.head
        without = [
            name
            for name in names
            if not (head.is_linear if name in REAPPLIED else head.is_affine or name not in READING)
        ]
        if done.feature is None or without:
            raise TapError(
                f"experts {', '.join(without or names)} need logits that are a linear function of "
                f"one feature, as those of {type(net).__name__} are not: set strong=['output'], or "
                "to experts that read no weights, such as ['output', 'mds']"
            )
        return Seen(done.feature, done.logits)

    def listen_whole(
        self, net: nn.Module, structure: Structure, images: Tensor, fitted: Fitted
    ) -> tuple[Tensor, Pass]:
        """As `listen`, for a network in evaluation mode, in one part, with the whole pass."""

        def clipped(seen: Tensor, done: Pass, output: Output) -> Tensor:
            q = output.react_percentile
            threshold = None if q is None else fitted.thresholds[q]
            return react_logits(net, structure, seen, done, threshold)

        moved: dict[Output, Tensor] = {}
        if any(output.needs_gradient for output in self.outputs):
            begun = [
                self._with_graph(net, structure, part, clipped)
                for part in parts(images, structure.batch_dependent, True)
            ]
            first = joined([done for done, _ in begun])
            moved = {o: torch.cat([images_of[o] for _, images_of in begun]) for o in begun[0][1]}
        else:
            with torch.no_grad():
                first = forward_pass(net, images, structure, self.taps, self._reduce)
        with torch.no_grad():
            scored = [
                score_logits(
                    output.output,
                    clipped(
                        moved.get(output, images),
                        forward_pass(net, moved[output], structure) if output in moved else first,
                        output,
                    ),
                    output.temperature,
                )
                for output in self.outputs
            ]
        norms = first.norms  # [0, B] without taps, else [L, S, B] -> [S * L, B]
        norms = with_double(norms.transpose(0, 1).flatten(0, 1) if self.taps else norms)
        if not scored:
            return norms.double(), first
        return torch.cat([norms.to(scored[0]), torch.stack(scored)]), first

    def _reduce(self, feature_map: Tensor) -> Tensor:
        return atf_each(feature_map, self.norms)

    def _with_graph(
        self,
        net: nn.Module,
        structure: Structure,
        images: Tensor,
        clipped: Callable[[Tensor, Pass, Output], Tensor],
    ) -> tuple[Pass, dict[Output, Tensor]]:
        """One pass for the taps and the gradients with respect to the images; ODIN's images."""

        def differentiate(leaf: Tensor) -> tuple[Pass, dict[Output, Tensor]]:
            first = forward_pass(net, leaf, structure, self.taps, self._reduce)
            return first, self._perturbed(leaf, lambda output: clipped(leaf, first, output))

        return gradients_of_images(net, images, differentiate)

    def _perturbed(
        self, leaf: Tensor, logits_of: Callable[[Output], Tensor]
    ) -> dict[Output, Tensor]:
        """ODIN's perturbed images for each expert that needs them; gradients are shared."""
        moving = [output for output in self.outputs if output.needs_gradient]
        alike: dict[tuple[float, float | None], list[Output]] = {}
        for output in moving:
            alike.setdefault((output.temperature, output.react_percentile), []).append(output)
        moved = {}
        for number, outputs in enumerate(alike.values(), start=1):
            logits, temperature = logits_of(outputs[0]), outputs[0].temperature
            direction = odin_direction(leaf, logits, temperature, number < len(alike))
            for output in outputs:
                moved[output] = odin_step(leaf, direction, output.noise, output.input_std)
        return moved
