"""Statistics, fusion and detector equal the functions that the method's own README prints."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fusenorm_openood import FuseNorm, Settings, compute_id_statistics, fuse
from fusenorm_openood.method.fusion import penalty
from fusenorm_openood.network import WideResNet
from tests import document
from tests.conftest import make_loader, make_net
from tests.oracle import assert_atf_close

Z = st.one_of(st.floats(-3, 4), st.sampled_from([0.0, 1.0]))


@pytest.mark.parametrize(("low", "high"), [(0.1, 99.9), (1, 99.9), (0, 100)])
def test_statistics_are_the_documents(low, high):
    scores = np.random.default_rng(0).normal(size=(5, 700)) * [[1], [10], [1e-4], [1e3], [1]]
    s = compute_id_statistics(scores, low, high)
    expected = document.compute_id_statistics(scores, low, high)
    np.testing.assert_array_equal([s.mean, s.std, s.lower, s.upper], expected)


@given(arrays(np.float64, (2, 20), elements=Z), arrays(np.float64, (3, 20), elements=Z))
def test_fusion_is_the_documents(strong, weak):
    fused, delta = document.fuse_norm(strong, weak)
    np.testing.assert_allclose(fuse(strong, weak), fused[0], atol=1e-12)
    np.testing.assert_allclose(penalty(weak), delta[0], atol=1e-12)


def test_a_detector_makes_its_confidence_as_the_document_does(net, loader):
    detector = FuseNorm(net, Settings.published(percentile_low=0.1)).fit(loader)
    known = detector.infer(loader).experts
    scored = detector.infer(make_loader(seed=5, scale=1.1))
    _, _, low, high = document.compute_id_statistics(known)
    z = (scored.experts - low[:, None]) / (high - low)[:, None]
    strong = [detector.experts.index(name) for name in ("layer4.0", "output")]
    weak = [row for row in range(9) if row not in strong]
    fused, delta = document.fuse_norm(z[strong], z[weak])
    assert 0 < (delta < 1).mean() < 1  # some penalties are at the cap, some are not
    np.testing.assert_allclose(scored.conf, fused[0], rtol=1e-9, atol=1e-9)


# The settings of the published notebooks; blocks count from 0.
NOTEBOOKS = [
    ("ResNet-18", "CIFAR-100", 0.05, 0.20, 0.5, 6),
    ("WRN-16-8", "CIFAR-100", 0.05, 0.20, 0.0, 4),
    ("ResNet-18", "ImageNet-100", 0.15, 0.35, 0.85, 6),
    ("WRN-16-8", "ImageNet-100", 0.10, 0.25, 0.0, 5),
]


@pytest.mark.parametrize(
    ("network", "id_data", "k_min", "k_max", "alpha", "block"), NOTEBOOKS, ids=lambda v: str(v)
)
def test_the_notebooks_settings_give_the_documents_confidence(
    loader, network, id_data, k_min, k_max, alpha, block
):
    torch.manual_seed(0)
    net = make_net() if network == "ResNet-18" else WideResNet(16, 1, 10).eval()
    settings = Settings.published(k_min=k_min, k_max=k_max, alpha=alpha, strong=(block, "output"))
    detector = FuseNorm(net, settings).fit(loader)
    assert (settings.output_expert.temperature, settings.react_percentile) == (1000, 90)
    known = detector.infer(loader).experts
    scored = detector.infer(make_loader(seed=5, scale=1.1))
    images = torch.cat([images for images, _ in make_loader(seed=5, scale=1.1)])
    maps = {}
    tap = net.get_submodule(detector.taps[block])
    handle = tap.register_forward_hook(lambda module, args, output: maps.update(x=output))
    with torch.no_grad():
        net(images)
    handle.remove()
    norms = torch.from_numpy(scored.experts[block]).float()
    assert_atf_close(norms, maps["x"], 1e-4, k_min, k_max, alpha=alpha)
    _, _, low, high = document.compute_id_statistics(known, 1, 99.9)
    z = (scored.experts - low[:, None]) / (high - low)[:, None]
    last = len(detector.taps)
    weak = [row for row in range(last) if row != block]
    fused, _ = document.fuse_norm(z[[block, last]], z[weak])
    np.testing.assert_allclose(scored.conf, fused[0], rtol=1e-9, atol=1e-9)
