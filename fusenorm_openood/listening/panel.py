"""A panel of experts: all scores that one pass over the images can provide."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusenorm_openood.listening.gradient import ConstantBatchNorm
from fusenorm_openood.listening.modes import undisturbed
from fusenorm_openood.listening.passes import Pass, forward_pass, joined, parts
from fusenorm_openood.listening.react import react_logits
from fusenorm_openood.method.atf import FeatureNorm, atf_each
from fusenorm_openood.method.experts import Output, odin_direction, odin_step, score_logits


@dataclass(frozen=True)
class Panel:
    """Every feature norm at every tap, and the output experts, each computed once.

    One forward pass serves all of them. Each distinct ODIN noise needs one more forward pass, and
    each distinct pair of temperature and ReAct percentile a gradient.
    """

    taps: tuple[str, ...]
    norms: tuple[FeatureNorm, ...]
    outputs: tuple[Output, ...]

    @property
    def percentiles(self) -> list[float]:
        """Percentiles at which ReAct clips for at least one output expert."""
        given = (o.react_percentile for o in self.outputs)
        return list(dict.fromkeys(q for q in given if q is not None))

    def rows(self, taps: Iterable[str], norm: FeatureNorm, output: Output) -> list[int]:
        """Row indices of the scores of one detector: its taps in order, then its output expert."""
        return [*self.norm_rows(taps, norm), self.output_row(output)]

    def norm_rows(self, taps: Iterable[str], norm: FeatureNorm) -> list[int]:
        """Row indices of one feature norm at each of the taps."""
        first = self.norms.index(norm) * len(self.taps)
        return [first + self.taps.index(tap) for tap in taps]

    def output_row(self, output: Output) -> int:
        """Row index of an output expert."""
        return len(self.norms) * len(self.taps) + self.outputs.index(output)

    def scores(
        self, net: nn.Module, images: Tensor, thresholds: Mapping[float, float]
    ) -> tuple[Tensor, Tensor]:
        """Scores `[R, B]`, larger = more in-distribution, and predicted classes `[B]`.

        Args:
            net: a network; it is left unchanged.
            images: `[B, C, H, W]` on its device.
            thresholds: ReAct's clipping thresholds by percentile; see `react_thresholds`.
        """
        with undisturbed(net):
            scored = [self._scores(net, part, thresholds) for part in parts(images)]
        scores, preds = zip(*scored, strict=True)
        return torch.cat(scores, dim=1), torch.cat(preds)

    def _scores(
        self, net: nn.Module, images: Tensor, thresholds: Mapping[float, float]
    ) -> tuple[Tensor, Tensor]:
        def clipped(done: Pass, output: Output) -> Tensor:
            q = output.react_percentile
            return react_logits(net, done, None if q is None else thresholds[q])

        moved: dict[Output, Tensor] = {}
        if any(output.needs_gradient for output in self.outputs):
            begun = [self._with_graph(net, part, clipped) for part in parts(images, True)]
            first = joined([done for done, _ in begun])
            moved = {o: torch.cat([images_of[o] for _, images_of in begun]) for o in begun[0][1]}
        else:
            with torch.no_grad():
                first = forward_pass(net, images, self.taps, self._reduce)
        with torch.no_grad():
            scored = [
                score_logits(
                    output.output,
                    clipped(forward_pass(net, moved[output]), output)
                    if output in moved
                    else clipped(first, output),
                    output.temperature,
                )
                for output in self.outputs
            ]
        norms = first.norms.transpose(0, 1).flatten(0, 1)  # [L, S, B] -> [S * L, B]
        return torch.cat([norms.to(scored[0]), torch.stack(scored)]), first.pred

    def _reduce(self, feature_map: Tensor) -> Tensor:
        return atf_each(feature_map, self.norms)

    def _with_graph(
        self, net: nn.Module, images: Tensor, clipped: Callable[[Pass, Output], Tensor]
    ) -> tuple[Pass, dict[Output, Tensor]]:
        """One pass for the taps and the gradients with respect to the images; ODIN's images."""
        with torch.inference_mode(False), torch.enable_grad(), ConstantBatchNorm():
            leaf = images.detach().clone().requires_grad_()
            first = forward_pass(net, leaf, self.taps, self._reduce)
            return first, self._perturbed(leaf, lambda output: clipped(first, output))

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
