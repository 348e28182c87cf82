"""The whole way from pixels to a verdict as one module, which can be traced."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.errors import ConfigError, ExportError
from fusenorm_openood.forward.experts import Expert, Fitted, Scoring
from fusenorm_openood.method.conformal import EQUAL
from fusenorm_openood.method.fusion import Fusion
from fusenorm_openood.method.joint import sum_of_rows
from fusenorm_openood.network.running import unwrapped

Dtype = Literal["uint8", "float32"]
EXAMPLES = 4


class Inputs(NamedTuple):
    """What an exported program is given.

    Attributes:
        shape: of one image, `[C, H, W]`.
        dtype: of the images.
        normalization: mean and standard deviation of the channels, of values in [0, 1]; None =
            the images are normalised already.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None

    @classmethod
    def of(
        cls, preprocessing: Preprocessing | None, dtype: str, shape: Sequence[int] | None
    ) -> "Inputs":
        """The inputs of a detector.

        Raises:
            ConfigError: an unknown dtype; a shape that is missing, or differs from that of the
                preprocessing.
        """
        if dtype not in get_args(Dtype):
            raise ConfigError(f"dtype must be uint8 or float32, got {dtype!r}")
        if preprocessing is None:
            if shape is None or len(shape) != 3:
                raise ConfigError(
                    f"this detector has no preprocessing, and shape is {shape!r}: set "
                    "detector.preprocessing, or give shape=(C, H, W)"
                )
            return cls(tuple(shape), torch.float32, None)
        known = (3, *preprocessing.crop)
        if shape is not None and tuple(shape) != known:
            raise ConfigError(f"shape must be that of the preprocessing, {known}, got {shape!r}")
        normalization = preprocessing.mean, preprocessing.std
        return cls(known, getattr(torch, dtype), normalization)

    def examples(self) -> Tensor:
        """Images of noise `[N, C, H, W]`, always the same."""
        generator, size = torch.Generator().manual_seed(0), (EXAMPLES, *self.shape)
        if self.normalization is None:
            return torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")
        drawn = torch.randint(0, 256, size, generator=generator, device="cpu")
        return drawn.to(self.dtype)

    def normalised(self, image: Tensor) -> Tensor:
        """What the network takes."""
        if self.normalization is None:
            return image
        unit = image.float() / 255
        mean, std = (
            torch.tensor(values, dtype=unit.dtype, device=unit.device).view(-1, 1, 1)
            for values in self.normalization
        )
        return (unit - mean) / std


class Judge(nn.Module):
    """Logits, confidences, p-values and verdicts of a batch of images.

    Args:
        scoring: the experts of a network in eval mode, on the CPU, in float32.
        rows: the experts in the order of the fusion.
        fusion: from their scores to contributions.
        inputs: what images it is given.
        calibration: confidences `[n]` of the calibration images, None without.
    """

    def __init__(
        self,
        scoring: Scoring,
        rows: Sequence[Expert],
        fusion: Fusion,
        inputs: Inputs,
        calibration: NDArray[Any] | None,
    ) -> None:
        super().__init__()
        self.net, self.fusion, self.inputs, self.rows = scoring.net, fusion, inputs, rows
        copies = {  # a program is saved without a warning if no tensor is a view
            score: {n: v.clone(memory_format=torch.contiguous_format) for n, v in state.items()}
            for score, state in scoring.fitted.states.items()
        }
        self.scoring = replace(scoring, fitted=Fitted(scoring.fitted.thresholds, copies))
        self.calibration = None if calibration is None else torch.tensor(calibration, device="cpu")

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what `forward` returns."""
        names = ("logits", "confidence", "p_value", "ood")
        return names[:2] if self.calibration is None else names

    def forward(self, image: Tensor, acceptance: Tensor | None = None) -> tuple[Tensor, ...]:
        """Logits `[N, K]`, confidences `[N]`, and if calibrated p-values and verdicts `[N]`.

        The confidence of an image with a score that is not finite is NaN, its p-value the smallest.
        """
        batch, done = self.scoring.run_part(self.inputs.normalised(image))
        scores = self.scoring.complete(batch).matrix(self.rows)
        conf = torch.where(scores.isfinite().all(0), sum_of_rows(self.fusion(scores)), torch.nan)
        if self.calibration is None or acceptance is None:
            return done.classified, conf
        smaller = (self.calibration <= conf.unsqueeze(1)).sum(1)  # see `conformal_p_values`
        p = (1 + smaller).double() / (1 + self.calibration.shape[0])
        return done.classified, conf, p, p <= 1 - acceptance + EQUAL


def float32_copy(net: nn.Module) -> nn.Module:
    """A copy of a network on the CPU, in float32 and in evaluation mode.

    Raises:
        ExportError: it cannot be copied.
    """
    core = unwrapped(net)
    try:
        return deepcopy(core).cpu().float().eval().requires_grad_(False)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        why = (str(error).strip().splitlines() or [""])[0]
        raise ExportError(
            f"{type(core).__name__} cannot be copied to the CPU in float32 ({why}): build it anew "
            "and load the detector with it"
        ) from error
