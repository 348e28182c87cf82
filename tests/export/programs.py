"""Run exported programs, and the detectors that are exported."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fusenorm_openood import FuseNorm, Settings
from fusenorm_openood.data.preprocessing import Preprocessing
from fusenorm_openood.export.program import is_new_enough

CAN_EXPORT = is_new_enough() and all(map(find_spec, ("onnx", "onnxscript", "onnxruntime")))
needs_export = pytest.mark.skipif(not CAN_EXPORT, reason="needs the extra export and its torch")

Program = Callable[..., dict[str, np.ndarray]]  # (image, acceptance=None) -> outputs by name
NAMES = ("logits", "confidence", "p_value", "ood")
SIZE = 16
PREPROCESSING = Preprocessing(SIZE, (SIZE, SIZE), "bilinear", (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def drawn_pixels(count: int, seed: int, size: int = SIZE) -> Tensor:
    """Images `[N, 3, H, W]` in uint8 of varying brightness and contrast."""
    generator = torch.Generator().manual_seed(seed)
    contrast = torch.rand(count, 1, 1, 1, generator=generator) * 60
    level = torch.rand(count, 3, 1, 1, generator=generator) * 255
    noise = torch.randn(count, 3, size, size, generator=generator)
    return (level + contrast * noise).clamp(0, 255).to(torch.uint8)


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
    return _onnx(path) if path.suffix == ".onnx" else _pt2(path)


def _onnx(path: Path) -> Program:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(image: Tensor, acceptance: float | None = None) -> dict[str, np.ndarray]:
        given = {"image": image.numpy()}
        if acceptance is not None:
            given["acceptance"] = np.array(acceptance)
        return dict(zip(names, session.run(None, given), strict=True))

    return run


def _pt2(path: Path) -> Program:
    module = torch.export.load(path).module()

    def run(image: Tensor, acceptance: float | None = 0.95) -> dict[str, np.ndarray]:
        given = () if acceptance is None else (torch.tensor(acceptance, dtype=torch.float64),)
        outputs = module(image, *given)
        return {n: o.detach().numpy() for n, o in zip(NAMES, outputs, strict=False)}

    return run


def assert_agrees(detector: FuseNorm, run: Program, pixels: Tensor, atol: float = 1e-5) -> None:
    """The program says of pixels what the detector says."""
    found = run(pixels)
    pred, conf = detector.predict(normalised(pixels))
    assert found["logits"].argmax(1).tolist() == pred.tolist()
    np.testing.assert_allclose(found["confidence"], conf, rtol=atol, atol=atol)
    if detector.calibration_scores_ is None:
        assert list(found) == ["logits", "confidence"]
        return
    reference = detector.calibration_scores_
    far = np.abs(conf.numpy()[:, None] - reference).min(1) > 2 * atol * (1 + conf.abs().numpy())
    p, ood = detector.p_values(normalised(pixels)), detector.is_ood(normalised(pixels))
    np.testing.assert_allclose(found["p_value"][far], p.numpy()[far], rtol=1e-12)
    assert found["ood"][far].tolist() == ood.numpy()[far].tolist()
    assert found["ood"].dtype == bool
