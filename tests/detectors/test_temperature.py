"""The temperature of the settings is that of the output expert."""

import numpy as np
import pytest
import torch

from fusenorm_openood import FuseNorm

IMAGES = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(7)) * 2


@pytest.mark.parametrize("temperature", [0.5, 5.0])
def test_the_temperature_reaches_the_output_expert(net, loader, temperature):
    settings = {"react_percentile": None, "temperature": temperature}
    with torch.no_grad():
        logits = net(IMAGES).double() / temperature
    energy = FuseNorm(net, output="energy", **settings).fit(loader).infer([IMAGES]).experts[8]
    np.testing.assert_allclose(energy, temperature * logits.logsumexp(1), rtol=1e-5)
    p = logits.softmax(1).amax(1)
    odds = FuseNorm(net, output="msp", **settings).fit(loader).infer([IMAGES]).experts[8]
    np.testing.assert_allclose(odds, (p / (1 - p)).log(), rtol=1e-4, atol=1e-5)
