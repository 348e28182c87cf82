"""Passes in which images leave the batch between the stages of the network."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fusenorm_openood.errors import TapError, first_sentence, is_out_of_memory
from fusenorm_openood.forward.experts import BatchScores, Scoring, joined
from fusenorm_openood.forward.passes import forward_pass, parts
from fusenorm_openood.network.running import eval_mode, preserved_randomness, unwrapped
from fusenorm_openood.network.structure import Structure

AGREES = 1e-3  # largest difference of logits of a thinned batch, relative to the largest logit


class Exit(NamedTuple):
    """After which layer images leave a batch: those whose statistic is below a limit."""

    layers: tuple[str, ...]  # that have run by then, the last of which it is
    # From their norms `[l, B]` to `[B]`, larger = more in-distribution.
    statistic: Callable[[Tensor], Tensor]
    limit: float  # images below it leave


class EarlyScores(NamedTuple):
    """Scores of `B` images, of which some have left the batch."""

    kept: Tensor  # numbers of the images that have not, ascending
    scores: BatchScores | None  # their scores; None if there are none
    statistics: Tensor  # `[B]`, with which the others have left, NaN of those that stayed
    exits: Tensor  # numbers `[B]` of the exits at which they have left, -1 of those that stayed


class _AllLeft(BaseException):  # no `except Exception` on its way stops it
    pass


class _Leaving:
    """The images of a batch that leave it at exits; see `passes.Thinning`."""

    def __init__(self, images: Tensor, exits: Sequence[Exit]) -> None:
        self.kept = torch.arange(len(images), device=images.device)
        nan = torch.nan
        self.statistics = torch.full((len(images),), nan, dtype=torch.float64, device="cpu")
        self.exits = torch.full((len(images),), -1, dtype=torch.int64, device="cpu")
        self._of = {found.layers[-1]: (number, found) for number, found in enumerate(exits)}

    def after(self, name: str, reduced: Mapping[str, Tensor]) -> Tensor | None:
        if name not in self._of:
            return None
        number, (layers, statistic, limit) = self._of[name]
        # On the CPU, where the ID statistics are. NaN stays, and is told where all scores are.
        norms = torch.stack([reduced[layer][:, 0] for layer in layers]).cpu().double()
        found = statistic(norms)
        leaves = found < limit
        if not leaves.any():
            return None
        kept = (~leaves).nonzero()[:, 0].to(self.kept.device)
        gone = self.kept.cpu()[leaves]
        self.statistics[gone], self.exits[gone] = found[leaves], number
        self.kept = self.kept[kept]
        if not len(kept):
            raise _AllLeft
        return kept


def early_scores(scoring: Scoring, images: Tensor, exits: Sequence[Exit]) -> EarlyScores:
    """Scores of images `[B, C, H, W]` on the network's device, of which some leave the batch."""
    done, batches, first = [], list[BatchScores](), 0
    with eval_mode(unwrapped(scoring.net)):
        for part in parts(images):
            leaving = _Leaving(part, exits)
            with suppress(_AllLeft):
                batches.append(scoring.run_part(part, leaving)[0])
            done.append((leaving.kept + first, leaving.statistics, leaving.exits))
            first += len(part)
    kept, statistics, numbers = (torch.cat(of) for of in zip(*done, strict=True))
    return EarlyScores(
        kept, scoring.complete(joined(batches)) if batches else None, statistics, numbers
    )


def stage_ends(
    net: nn.Module, images: Tensor, structure: Structure, taps: Sequence[str]
) -> list[tuple[str, ...]]:
    """The layers that have run by the end of each stage but the last, where a batch can be thinned.

    It can where the rest of the network depends on the last layer's output alone, as in sequential
    and residual networks: a trial shows it, on noise of the size of images `[B, C, H, W]`. TapError
    if it cannot, for example with connections around stages, if images depend on each other, or if
    there is only one stage.
    """
    name, ran = type(unwrapped(net)).__name__, list[str]()
    advice = "judge its images without early"
    if structure.batch_dependent or structure.random or structure.smallest_batch > 1:
        raise TapError(
            f"the logits of {name} depend on the other images of a batch, or on chance: {advice}"
        )
    last = [stage[-1] for stage in structure.stages(taps)[:-1]]
    if not last:
        raise TapError(f"the layers of {name} are one stage, so nothing is saved: {advice}")
    size = len(last) + 2
    shape, generator = (size, *images.shape[1:]), torch.Generator("cpu").manual_seed(0)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    trial = drawn.to(images)

    def norms(x: Tensor) -> Tensor:
        ran.append("")
        return x.flatten(1)[:, :1]

    class Trial:
        kept = torch.arange(size, device=images.device)

        def after(self, layer: str, reduced: Mapping[str, Tensor]) -> Tensor | None:
            ran[-1] = layer
            if layer not in last:
                return None
            self.kept = self.kept[:-1]
            return torch.arange(len(self.kept), device=images.device)

    reason = "what follows also reads what was computed before"
    try:
        with eval_mode(unwrapped(net)), torch.no_grad(), preserved_randomness(images.device):
            whole = forward_pass(net, trial, structure).logits[:2]
            thinned = forward_pass(net, trial, structure, taps, norms, thinning=Trial()).logits
        agrees = thinned.shape == whole.shape
        difference = float((thinned - whole).abs().max()) if agrees else float("inf")
    except Exception as error:
        if is_out_of_memory(error):
            raise
        difference = float("inf")
        reason = f"the rest fails on fewer images ({first_sentence(error)})"
    if not difference <= AGREES * max(structure.largest_logit, 1):
        raise TapError(
            f"images cannot leave a batch of {name} after {', '.join(last)}, because {reason}: "
            f"{advice}"
        )
    return [tuple(ran[: ran.index(layer) + 1]) for layer in last]
