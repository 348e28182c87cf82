"""Every setting reaches the scores: a detector's confidences recomputed by hand."""

import numpy as np
import pytest
import torch

from fusenorm_openood import FuseNorm
from fusenorm_openood.errors import NotFittedError
from tests.conftest import make_loader

IMAGES = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(7)) * 2


@pytest.mark.parametrize(
    "chosen",
    [
        {"weights": (0.3, 1.0)},
        {"base": 3.0, "cap": 0.05},
        {"strong": ("layer1.0", "output", "layer4.1"), "weights": (1.0, 2.0, 3.0), "cap": 0.5},
        {"percentile_low": 10.0, "percentile_high": 60.0, "base": 1.5},
    ],
)
def test_confidences_are_the_fusion_that_the_settings_describe(net, loader, chosen):
    detector = FuseNorm(net, output="energy", react_percentile=None, **chosen).fit(loader)
    scored, s = detector.infer([IMAGES]), detector.settings
    known = detector.infer(loader).experts
    low, high = np.percentile(known, [s.percentile_low, s.percentile_high], axis=1, keepdims=True)
    z = (scored.experts - low) / (high - low)
    strong = [detector.experts.index(name) for name in detector.strong]
    weights = np.array(s.weights or [1] * len(strong))
    weak = np.delete(z, strong, axis=0)
    deviation = np.maximum(np.maximum(-weak, weak - 1), 0).max(axis=0)
    expected = weights @ z[strong] / weights.sum() - np.minimum(s.cap, s.base**deviation - 1)
    np.testing.assert_allclose(scored.conf, expected, rtol=1e-9)
    assert deviation.min() < deviation.max()


@pytest.mark.parametrize("temperature", [0.5, 5.0])
def test_the_temperature_reaches_the_output_expert(net, loader, temperature):
    settings = {"react_percentile": None, "temperature": temperature}
    with torch.no_grad():
        logits = net(IMAGES).double() / temperature
    energy = FuseNorm(net, output="energy", **settings).fit(loader).infer([IMAGES]).experts[-1]
    np.testing.assert_allclose(energy, temperature * logits.logsumexp(1), rtol=1e-5)
    p = logits.softmax(1).amax(1)
    odds = FuseNorm(net, output="msp", **settings).fit(loader).infer([IMAGES]).experts[-1]
    np.testing.assert_allclose(odds, (p / (1 - p)).log(), rtol=1e-4, atol=1e-5)


def test_a_fit_that_fails_leaves_the_detector_unfitted(net, loader):
    detector = FuseNorm(net, output="energy").fit(loader)
    bad = make_loader()
    bad.dataset.tensors[0][3, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinity|not finite"):
        detector.fit(bad)
    assert not detector.is_fitted
    with pytest.raises(NotFittedError, match=r"call fit\(loader\) first"):
        detector.score(IMAGES)
