"""Explanations: contributions that add up to the confidence, and maps that add up to the norms."""

import numpy as np
import pytest
import torch
import torchvision

from fusenorm_openood import FuseNorm, Settings
from tests.conftest import assert_undisturbed, state_of
from tests.nets import Net, energies, outputs_of, some_images

IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(9)) * 1.5
SETTINGS = {
    "default": Settings(),
    "weights": Settings(weights=(1.0, 2.0, 1.0, 0.5)),
    "strong tap": Settings(strong=("layer4.0", "output")),
    "deviation": Settings.deviation(),
    "published": Settings.published(),
    "no weak": Settings(taps=("layer4.0",), strong=("layer4.0", "output")),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_contributions_add_up_to_the_confidence_and_maps_to_the_norms(net, loader, settings):
    detector = FuseNorm(net, settings).fit(loader)
    before = state_of(net)
    why = detector.explain(IMAGES)
    assert_undisturbed(net, before)
    for images in (IMAGES, IMAGES * 30):
        contributions = detector.explain(images, with_maps=False).contributions
        np.testing.assert_allclose(contributions.sum(0), detector.score(images), rtol=1e-9)
    np.testing.assert_array_equal(why.conf, detector.score(IMAGES))
    assert why.experts == detector.experts
    for row, (tap, output) in enumerate(
        zip(detector.taps, outputs_of(net, detector.taps, IMAGES), strict=True)
    ):
        assert why.maps[tap].shape == (6, *output.shape[2:])
        assert (why.maps[tap] >= 0).all()
        np.testing.assert_allclose(why.maps[tap].sum((1, 2)), why.scores[row], rtol=1e-5)


def test_contributions_are_compared_with_their_mean_over_the_id_images():
    net, known, new = Net(), some_images(40), some_images(8, seed=3)
    with torch.no_grad():
        net.fc.weight *= 30
    of_id, of_new = (energies(net, images).numpy() for images in (known, new))
    low, high = np.percentile(of_id, [5, 95])
    of_id, of_new = (np.minimum((scores - low) / (high - low), 1) for scores in (of_id, of_new))
    detector = FuseNorm(net, Settings.deviation(strong=["output"], cap=0.0)).fit([known])
    why = detector.explain(new, with_maps=False)
    expected = np.zeros((5, 8))  # no penalty, and so no contribution of a layer
    expected[4] = of_id.mean() - of_new
    assert of_id.mean() > 0.2
    np.testing.assert_allclose(why.below_mean, expected, rtol=1e-4, atol=1e-5)
    below = expected[4] > 0
    assert [name == "output" for name in why.objected] == below.tolist()
    assert 0 < below.sum() < len(below)


def test_tokens_have_heat_maps_on_their_grid():
    torch.manual_seed(0)
    net = torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=4).eval()
    with torch.no_grad():
        net.heads.head.weight.normal_(std=0.1)
    images = torch.randn(12, 3, 32, 32)
    detector = FuseNorm(net, output="energy", strong=["output"]).fit([images])
    why = detector.explain(images[0])
    assert {tuple(heat.shape) for heat in why.maps.values()} == {(1, 2, 2)}
    assert why.conf.shape == (1,)
