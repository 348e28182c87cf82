"""The whole way from pixels to a verdict as one module, which can be traced."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from math import floor
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fusenorm_openood.data.preprocessing import Normalization, Preprocessing, to_unit
from fusenorm_openood.errors import ConfigError, ExportError
from fusenorm_openood.export.resize import Resize
from fusenorm_openood.forward.experts import Expert, Scoring
from fusenorm_openood.method.calibration import Calibration
from fusenorm_openood.method.fusion import Fusion
from fusenorm_openood.method.joint import sum_of_rows
from fusenorm_openood.method.validation import COUNT
from fusenorm_openood.network.running import unwrapped

Dtype = Literal["uint8", "uint16", "float32"]
OUTPUTS = ("logits", "confidence", "rank")
ERROR = 5e-5  # of confidences of ID images in float32; see `thresholds`


class Inputs(NamedTuple):
    """What an exported program is given."""

    shape: tuple[int, ...]  # of one image, `[C, H, W]`
    dtype: torch.dtype
    normalization: Normalization | None  # of values in [0, 1]; None = they are normalised already
    span: tuple[float, float] = (0, 255)  # the values of pixels that are 0 and 1
    resize: Resize | None = None  # None = images are resized and cropped already

    @classmethod
    def of(
        cls,
        preprocessing: Preprocessing | None,
        dtype: str | None,
        shape: Sequence[int] | None,
        resize_from: tuple[int, int] | None = None,
    ) -> "Inputs":
        """The inputs of a detector; see `FuseNorm.export`.

        ConfigError for a dtype or a shape that is missing, or not that of the preprocessing.
        """
        own = "uint8" if preprocessing is None else preprocessing.dtype
        dtype = dtype or own
        if dtype not in (own, "float32"):
            either = " or ".join(dict.fromkeys((own, "float32")))
            raise ConfigError(f"dtype must be {either}, got {dtype!r}")
        if preprocessing is None:
            if resize_from is not None:
                raise ConfigError(
                    "resize_from needs a preprocessing, and this detector has none: set "
                    "detector.preprocessing"
                )
            if shape is None or len(shape) != 3:
                raise ConfigError(
                    f"this detector has no preprocessing, and shape is {shape!r}: set "
                    "detector.preprocessing, or give shape=(C, H, W)"
                )
            return cls(tuple(shape), torch.float32, None)
        known = (preprocessing.channels, *preprocessing.crop)
        if shape is not None and tuple(shape) != known:
            raise ConfigError(f"shape must be that of the preprocessing, {known}, got {shape!r}")
        normalization = preprocessing.mean, preprocessing.std
        inputs = cls(known, getattr(torch, dtype), normalization, preprocessing.span)
        if resize_from is None:
            return inputs
        if len(np.atleast_1d(resize_from)) != 2:
            raise ConfigError(f"resize_from must be a height and a width, got {resize_from!r}")
        resize_from = COUNT("height", resize_from[0]), COUNT("width", resize_from[1])
        resize = Resize.of(preprocessing, *resize_from)
        return inputs._replace(shape=(preprocessing.channels, *resize_from), resize=resize)

    def examples(self) -> Tensor:
        """Noise and stripes `[4, C, H, W]`, always the same."""
        generator, size = torch.Generator().manual_seed(0), (4, *self.shape)
        if self.normalization is None:
            drawn = torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")
        else:
            low, high = map(floor, self.span)
            drawn = torch.randint(low, high + 1, size, generator=generator, device="cpu")
        drawn[-1, ..., ::2] = drawn.max()
        return drawn.to(self.dtype)

    def normalised(self, image: Tensor) -> Tensor:
        """What the network takes."""
        if self.normalization is None:
            return image
        unit = to_unit(self.resize(image) if self.resize else image, self.span)
        mean, std = (
            torch.tensor(values, dtype=unit.dtype, device=unit.device).view(-1, 1, 1)
            for values in self.normalization
        )
        return (unit - mean) / std


class _InFloat32(TorchFunctionMode):
    """Context in which what is float64 elsewhere is float32, which every runtime has."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.double:
            return args[0].float()
        if kwargs.get("dtype") is torch.float64:
            kwargs["dtype"] = torch.float32
        return func(*args, **kwargs)


def thresholds(calibration: ArrayLike, error: float = ERROR) -> NDArray[np.float32]:
    """What confidences in float32 are compared with, in place of calibration scores `[n]`.

    They are lower by `error`, relative to scores above 1, and rounded down. So where a confidence
    is at most `error` from float64's, ties stay ties, and its rank is that of float64 or, less than
    2 `error` below a calibration score, larger: no image is rejected in addition, and the guarantee
    holds.
    """
    scores = np.sort(np.asarray(calibration, np.float64))
    lowered = scores - error * np.maximum(1, abs(scores))
    rounded = lowered.astype(np.float32)
    down: NDArray[np.float32] = np.nextafter(rounded, np.float32(-np.inf))
    return np.where(rounded > lowered, down, rounded)


def error_of(fusion: Fusion, id_scores: NDArray[np.float64]) -> float:
    """By how much confidences of ID images differ in float32: `ERROR`, or more if it is seen here.

    Where the scores `[L, N]` of an expert hardly vary, as at ODIN's temperature, their last digit
    in float32 counts.
    """
    exact, scores = deepcopy(fusion), torch.from_numpy(id_scores)
    conf = sum_of_rows(exact(scores)), sum_of_rows(exact.float()(scores.float()))
    return max(ERROR, 8 * float((conf[0] - conf[1]).abs().max()))


def compared_with(calibration: Calibration, error: float = ERROR) -> dict[str, NDArray[Any]]:
    """The constants of a program that confidences are compared with; see `Judge`.

    They have two dimensions, like what they are compared with: OpenVINO renames others. No stride
    is 0, which ExecuTorch refuses in a program that was quantised.
    """
    cells = [thresholds(cell, error) for cell in calibration.cells]
    constants: dict[str, NDArray[Any]] = {"thresholds": np.concatenate(cells).reshape(1, -1)}
    if calibration.by is not None:
        constants["cell"] = np.repeat(range(len(cells)), [*map(len, cells)]).reshape(1, -1)
        constants["cell_of"] = calibration.cell_of
    return constants


def facts_of(calibration: Calibration, acceptance: float) -> dict[str, Any]:
    """What a program's metadata say of its calibration; CalibrationError for too few images."""
    most = calibration.max_ranks(acceptance)
    counts = [len(calibration.cell(group)) for group in range(len(most))]
    return {
        "acceptance": acceptance,
        "calibration_by": calibration.by,
        "calibration_least": calibration.least,
        "calibration_images": counts if calibration.by else counts[0],
        "max_rank": most if calibration.by else most[0],
    }


class Judge(nn.Module):
    """Logits, confidences and ranks of a batch of images, in float32.

    The network is in eval mode, on the CPU, in float32; `rows` are in the order of the fusion.
    """

    thresholds: Tensor | None  # `[1, n]`, sorted within each set of calibration scores
    cell: Tensor | None  # by group: the number of the set of each threshold `[1, n]`
    cell_of: Tensor | None  # by group: that of the set of each class `[K]`

    def __init__(
        self,
        scoring: Scoring,
        rows: Sequence[Expert],
        fusion: Fusion,
        inputs: Inputs,
        calibration: Calibration | None,
        error: float = ERROR,
    ) -> None:
        super().__init__()
        self.net, self.inputs, self.rows, self.error = scoring.net, inputs, rows, error
        self.fusion = deepcopy(fusion).float()
        copies = {  # a program is saved without a warning if no tensor is a view
            score: {n: v.clone(memory_format=torch.contiguous_format) for n, v in state.items()}
            for score, state in scoring.fitted.states.items()
        }
        self.scoring = replace(scoring, fitted=replace(scoring.fitted, states=copies))
        for name in ("thresholds", "cell", "cell_of"):
            self.register_buffer(name, None)
        if calibration is not None:
            for name, constant in compared_with(calibration, error).items():
                setattr(self, name, torch.from_numpy(constant))
        self.outputs = OUTPUTS[:2] if calibration is None else OUTPUTS

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Logits `[N, K]`, confidences `[N]`, and if calibrated ranks `[N]` in int32.

        A rank is 1 + the number of calibration scores, those of the predicted class where these
        are apart, that are not larger than the confidence. If a pixel or a score is not finite, the
        confidence is NaN and the rank 1.
        """
        with _InFloat32():
            images = self.inputs.normalised(image)
            batch, done = self.scoring.run_part(images)
            scores = self.scoring.complete(batch).matrix(self.rows)
            conf = sum_of_rows(self.fusion(scores))
        # Some runtimes have no `isfinite`, and some make 0 of NaN in a ReLU.
        conf = conf + _zeros(scores.T)
        if image.is_floating_point():
            conf = conf + _zeros(image.flatten(1))
        if self.thresholds is None:
            return done.classified, conf
        return done.classified, conf, self.ranks(conf, done.pred, self.thresholds)

    def ranks(self, conf: Tensor, pred: Tensor, thresholds: Tensor) -> Tensor:
        """Ranks of confidences `[N]` of images with these predicted classes `[N]`."""
        smaller = thresholds <= conf.unsqueeze(1)
        if self.cell is not None and self.cell_of is not None:
            cell = torch.index_select(self.cell_of, 0, pred)  # whose name all runtimes keep
            smaller = smaller & (self.cell == cell.unsqueeze(1))
        return 1 + smaller.to(torch.int32).sum(1, dtype=torch.int32)


def _zeros(values: Tensor) -> Tensor:
    """0 for each row of values `[N, V]` that are finite, else NaN: `[N]`."""
    return (values - values).sum(1)


def float32_copy(net: nn.Module) -> nn.Module:
    """A copy of a network on the CPU, in float32 and in evaluation mode.

    ExportError if it cannot be copied.
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
