"""ODIN's step from its formula to the tables: where the gradient is zero, and in which unit."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from fusenorm_openood import FuseNorm, Settings
from fusenorm_openood.cli.engines import Job, evaluate_run, read_postprocessor
from fusenorm_openood.evaluation import comparison
from fusenorm_openood.evaluation.runs import Run
from fusenorm_openood.method.scores.odin import odin_direction, odin_step
from tests.conftest import drawn_benchmark, make_net
from tests.preprocessing import PREPROCESSING

CIFAR10_STD = PREPROCESSING["cifar10"].std


def odin(net, images, noise, std=(1, 1, 1), temperature=1000):
    """Probability of the predicted class, by OpenOOD's formula."""
    images = images.clone().requires_grad_()
    logits = net(images) / temperature
    F.cross_entropy(logits, logits.argmax(1)).backward()
    sign = torch.ge(images.grad, 0).float() * 2 - 1
    moved = images.detach() - noise * sign / torch.tensor(std).view(1, 3, 1, 1)
    with torch.no_grad():
        return (net(moved).double() / temperature).softmax(1).amax(1)


def images_of(image_set):
    listed = image_set.images()
    return torch.stack([listed[i]["data"] for i in range(len(listed))])


def test_a_gradient_of_zero_counts_as_positive():
    images = torch.ones(1, 1, 1, 3, requires_grad=True)
    score = (images * torch.tensor([-1.0, 0.0, 2.0])).sum((1, 2, 3))  # 1, so class 0
    direction = odin_direction(images, torch.stack([score, -score], dim=1), 1000)
    moved = odin_step(images, direction, 0.5)
    assert moved.flatten().tolist() == [0.5, 0.5, 1.5]


@pytest.mark.parametrize("std", [None, (0.1, 0.2, 0.5)])
def test_fusenorm_divides_the_step_by_input_std(net, loader, std):
    images = torch.randn(7, 3, 16, 16)
    settings = Settings.published(temperature=1.0, noise=0.02, input_std=std, react_percentile=None)
    scored = FuseNorm(net, settings).fit(loader).infer([images])
    p = odin(net, images, 0.02, std or (1, 1, 1), temperature=1)
    np.testing.assert_allclose(scored.experts[-1], torch.logit(p), atol=1e-4)


def test_a_table_of_odin_counts_the_step_in_pixels_before_normalisation(tmp_path):
    benchmark, net = drawn_benchmark("cifar10", tmp_path), make_net(classes=10)
    config = read_postprocessor("odin", None, ["noise=0.05"])
    job = Job(config=config, benchmark=benchmark)
    _, conf, _ = evaluate_run(job, "native", Run(net)).scores["id"]["test"]
    images = images_of(benchmark.id["test"])
    np.testing.assert_allclose(conf, odin(net, images, 0.05, CIFAR10_STD), rtol=1e-6)


def test_a_comparison_counts_the_step_of_odin_alike(tmp_path, monkeypatch):
    benchmark, net = drawn_benchmark("cifar10", tmp_path, 10), make_net(classes=10)
    torch.nn.init.normal_(net.fc.weight)  # the range of a trained network's logits
    large_step, make_score = {"odin": {"noise": 0.5}}, comparison.make_score
    monkeypatch.setattr(
        comparison,
        "make_score",
        lambda name, arguments=None, **fixed: make_score(
            name, large_step.get(name, arguments), **fixed
        ),
    )
    table = comparison.compare(net, benchmark, progress=False).auroc

    def auroc(std):
        known, unknown = benchmark.id["test"], benchmark.near["tin"]
        conf = torch.cat([odin(net, images_of(s), 0.5, std) for s in (known, unknown)])
        return 100 * roc_auc_score([1] * 10 + [0] * 10, conf)

    assert table.tin["ODIN"] == pytest.approx(auroc(CIFAR10_STD))
    assert table.tin["ODIN"] != pytest.approx(auroc((1, 1, 1)))
