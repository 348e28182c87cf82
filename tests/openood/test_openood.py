"""FuseNorm inside the real OpenOOD."""

import pickle

import numpy as np
import pytest
import torch

from fusenorm_openood import FuseNorm, FuseNormPostprocessor
from fusenorm_openood.errors import OpenOODError
from fusenorm_openood.method.metrics import ood_metrics
from fusenorm_openood.network import ResNet18_32x32, T2FNormNet, WideResNet
from fusenorm_openood.openood.bridge import evaluate_with_openood
from fusenorm_openood.storage.configs import config_root, read_config
from tests.conftest import make_net
from tests.without_openood.test_postprocessor import config


def test_it_is_a_subclass_of_openoods_base_postprocessor():
    from openood.postprocessors import BasePostprocessor

    assert isinstance(FuseNormPostprocessor(config()), BasePostprocessor)


def test_openoods_configuration_object_is_accepted():
    from openood.utils import Config

    path = config_root() / "postprocessors" / "fusenorm.yml"
    postprocessor = FuseNormPostprocessor(Config(str(path)))
    assert postprocessor.settings == FuseNormPostprocessor(read_config(path)).settings
    again = pickle.loads(pickle.dumps(postprocessor))
    assert again.settings == postprocessor.settings


@pytest.mark.parametrize(
    ("ours", "module", "theirs"),
    [
        (lambda: ResNet18_32x32(10), "resnet18_32x32", "ResNet18_32x32"),
        (lambda: WideResNet(16, 2, 10), "wrn", "WideResNet"),
    ],
)
def test_networks_equal_openoods(ours, module, theirs):
    from importlib import import_module

    args = {"depth": 16, "widen_factor": 2} if module == "wrn" else {}
    reference = getattr(import_module(f"openood.networks.{module}"), theirs)(num_classes=10, **args)
    net = ours()
    net.load_state_dict(reference.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(images), reference.eval()(images))


def test_t2fnorm_equals_openoods():
    from openood.networks.t2fnorm_net import T2FNormNet as Reference

    torch.manual_seed(0)
    net = T2FNormNet(ResNet18_32x32(10, width=8), 10).eval()
    net.set_tau(0.1)
    reference = Reference(net.backbone, 10).eval()
    reference.load_state_dict(net.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(net(images), reference(images), rtol=0, atol=1e-6)
        scoring = reference.forward_ood_inference(images)
        torch.testing.assert_close(net.forward_ood_inference(images), scoring, rtol=0, atol=1e-6)
        # FuseNorm handles OpenOOD's network the same way as ours.
    detectors = [FuseNorm(n).fit([(images, None), (images + 1, None)]) for n in (net, reference)]
    torch.testing.assert_close(detectors[0].score(images), detectors[1].score(images))


def test_metrics_equal_openoods():
    from openood.evaluators.metrics import compute_all_metrics

    rng = np.random.default_rng(0)
    known, unknown = rng.normal(1, 1, 500).round(2), rng.normal(0, 1, 400).round(2)
    label = np.concatenate([np.zeros(500, int), np.full(400, -1)])
    conf = np.concatenate([known, unknown])
    expected = compute_all_metrics(conf, label, np.zeros(900, int))
    assert list(ood_metrics(known, unknown)) == expected[:4]


def test_an_unknown_id_data_set_raises(tmp_path):
    net = make_net()
    with pytest.raises(OpenOODError, match="no ID data set 'digits': choose --engine native"):
        evaluate_with_openood(
            net, FuseNormPostprocessor(config()), "digits", tmp_path, 8, 0, False, False
        )
