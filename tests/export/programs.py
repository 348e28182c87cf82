"""Run exported programs, and the detectors that are exported."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fusenorm_openood import FuseNorm, Settings
from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.export.judge import error_of
from fusenorm_openood.export.program import find_target, is_new_enough

CAN_EXPORT = is_new_enough() and all(map(find_spec, ("onnx", "onnxscript", "onnxruntime")))
needs_export = pytest.mark.skipif(not CAN_EXPORT, reason="needs the extra export and its torch")

Program = Callable[[Tensor], dict[str, np.ndarray]]  # from images to outputs by name
SIZE = 16
PREPROCESSING = Preprocessing(SIZE, (SIZE, SIZE), "bilinear", (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def drawn_pixels(count: int, seed: int, size: int = SIZE) -> Tensor:
    """Images `[N, 3, H, W]` in uint8 of varying brightness and contrast."""
    generator = torch.Generator().manual_seed(seed)
    contrast = torch.rand(count, 1, 1, 1, generator=generator) * 60
    level = torch.rand(count, 3, 1, 1, generator=generator) * 255
    noise = torch.randn(count, 3, size, size, generator=generator)
    return (level + contrast * noise).clamp(0, 255).to(torch.uint8)


def write_images(folder: Path, count: int, seed: int) -> Path:
    folder.mkdir()
    for number, image in enumerate(drawn_pixels(count, seed).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(folder / f"{number:03}.png")
    return folder


def normalised(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (PREPROCESSING.mean, PREPROCESSING.std))
    return (pixels.float() / 255 - mean) / std


def fitted(net: nn.Module, settings: Settings | None = None, calibrated: bool = True) -> FuseNorm:
    """A detector for pixels, with 60 ID images and 39 calibration images."""
    detector = FuseNorm(net, settings).fit([normalised(drawn_pixels(60, 1))])
    detector.preprocessing = PREPROCESSING
    return detector.calibrate([normalised(drawn_pixels(39, 2))]) if calibrated else detector


def loaded(path: Path) -> Program:
    """The program in a file."""
    run = find_target(path, None).load(path)
    return lambda pixels: run(pixels.numpy())


def error(detector: FuseNorm) -> float:
    """What a program's confidences may differ by: more than 1e-5 for networks without training."""
    statistics = detector.check_fitted()
    return error_of(statistics.fusion, statistics.id_scores)


def assert_agrees(detector: FuseNorm, run: Program, pixels: Tensor) -> None:
    """The program says of pixels what the detector says."""
    found, atol = run(pixels), error(detector)
    pred, conf = detector.predict(normalised(pixels))
    assert found["logits"].argmax(1).tolist() == pred.tolist()
    np.testing.assert_allclose(found["confidence"], conf, rtol=atol, atol=atol)
    if detector.calibration_scores_ is None:
        assert list(found) == ["logits", "confidence"]
        return
    calibration = detector.calibration_
    cells = [calibration.cell(k if calibration.by else 0) for k in pred.tolist()]
    p = detector.p_values(normalised(pixels)).numpy()
    assert found["rank"].dtype == np.int32
    for rank, c, p_value, cell in zip(found["rank"], conf.numpy(), p, cells, strict=True):
        below = cell - c
        if ((below <= 0) | (below > 2 * atol * (1 + abs(cell)))).all():
            assert rank == np.rint(p_value * (1 + len(cell)))
