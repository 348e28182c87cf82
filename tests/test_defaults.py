"""Torch's default dtype and device change nothing: tensors follow from what they are made of."""

import numpy as np
import pytest
import torch
from PIL import Image

from fusenorm_openood import FuseNorm, Settings
from fusenorm_openood.data.lists import CpuLoader
from fusenorm_openood.data.preprocessing import EvalTransform, Preprocessing, train_transform
from fusenorm_openood.data.pseudo import KINDS
from fusenorm_openood.detectors.search import search
from fusenorm_openood.detectors.single import SingleScore
from fusenorm_openood.export.judge import Inputs
from fusenorm_openood.forward.recorded import RecordedLoader
from fusenorm_openood.kernels.devices import find_device
from fusenorm_openood.method.atf import atf_map
from fusenorm_openood.network import ResNet18_32x32, T2FNormNet
from fusenorm_openood.training.recipes import Recipe
from tests.forward.test_other_devices import FUSED
from tests.nets import CLASSES, Net, listed, some_images

DEFAULTS = {"float64": torch.float64, "meta": "meta"}
PRE = Preprocessing(12, (12, 12), "bilinear", (0.5,) * 3, (0.25,) * 3)
PIXELS = np.random.default_rng(0).integers(0, 256, (14, 16, 3), np.uint8)
NORM = ((0.5,) * 3, (0.25,) * 3)


@pytest.fixture(params=DEFAULTS)
def under(request):
    """Computes something without and with another default, for comparison."""
    value = DEFAULTS[request.param]

    def both(compute):
        plain = compute()
        try:
            if isinstance(value, str):
                torch.set_default_device(value)
            else:
                torch.set_default_dtype(value)
            other = compute()
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)
        same(other, plain)

    return both


def same(found, expected):
    if isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            same(*pair)
    elif isinstance(expected, torch.Tensor):
        assert (found.dtype, found.device) == (expected.dtype, expected.device)
        assert torch.equal(found, expected)
    else:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "name", ["published", "joint", "react", "odin in units of pixels", "all", "odin", "ebo"]
)
def test_fit_and_score(name, under, tmp_path):
    net, images, fit = (
        Net(),
        some_images(9),
        [(some_images(40, seed=2), torch.arange(40) % CLASSES)],
    )

    def compute():
        detector = FuseNorm(net, FUSED[name]) if name in FUSED else SingleScore(net, name)
        return detector.fit(fit).score(images), detector.infer(fit).conf

    under(compute)


def test_calibrate_save_load_and_explain(under, tmp_path):
    net, (images, fit, other) = Net(), (some_images(40, seed=s) for s in range(3))

    def compute():
        detector = FuseNorm(net).fit([fit], calibration=[other])
        detector.preprocessing = PRE
        detector.save(tmp_path / "it")
        loaded = FuseNorm.load(tmp_path / "it", net)
        explained = loaded.explain(images)
        return [
            *(loaded.p_values(images), loaded.is_ood(images, 0.9), loaded.predict(images)),
            *(explained.contributions, explained.normalised, *explained.maps.values()),
            *(loaded.score(Image.fromarray(PIXELS)), loaded.guarantee().low),
        ]

    under(compute)


def test_recorded_and_searched(under, tmp_path):
    net, stores, images = Net(), iter("ab"), [listed(some_images(20, seed=s)) for s in range(2)]

    def compute():
        store = tmp_path / next(stores)
        loaders = [RecordedLoader(i, store, {}, f"{n}", 7) for n, i in enumerate(images)]
        detector = FuseNorm(net, strong=("output", "nci")).fit(loaders[0])
        found = search(net, Settings(), {"alpha": [0.0, 1.0]}, loaders[0])
        return detector.infer(loaders[1]).conf, detector.infer(loaders[1]).label, found.auroc

    under(compute)


def test_images_and_loaders(under):
    image, images, few = Image.fromarray(PIXELS), listed(some_images(9)), some_images(3)

    def compute():
        torch.manual_seed(0)
        order = [b["label"] for b in CpuLoader(images, 2, shuffle=True)]
        order += Inputs.of(PRE, "uint8", None).examples()
        made = [KINDS[kind](few, torch.Generator().manual_seed(1)) for kind in KINDS]
        return [*order, *made, PRE(image), EvalTransform(NORM, (12, 8))(image), atf_map(made[0])]

    under(compute)


def test_networks(under):
    backbone, fit, images = ResNet18_32x32(4, width=4).eval(), some_images(20), some_images(3)

    def compute():
        assert find_device("cpu") == torch.device("cpu")
        net = T2FNormNet(backbone, 4).eval()
        return net.tau, FuseNorm(net).fit([fit]).score(images)

    under(compute)
    assert Recipe(id_data="digits").build(4)


def test_pixels_are_those_of_torchvision():
    from torchvision import transforms

    for image in (Image.fromarray(PIXELS), Image.fromarray(PIXELS[:, ::3])):
        expected = transforms.Normalize(*NORM)(transforms.ToTensor()(image))
        steps = train_transform(8, 8, NORM).transforms[-2:]
        found = steps[1](steps[0](image))
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()
