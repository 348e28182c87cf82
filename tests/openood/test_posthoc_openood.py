"""Post-hoc experts against OpenOOD's own postprocessors, on the same network and images."""

from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from fusenorm_openood.kernels.devices import on_device
from fusenorm_openood.method.scores import POSTHOC, make_score
from fusenorm_openood.method.scores.base import Features, Head
from fusenorm_openood.storage.configs import config_root
from tests.conftest import make_net

CLASSES = 10
CLASS_NAMES = {"fdbd": "fDBD", "ash": "ASH", "scale": "Scale"}


def images_of(n, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 16, 16, generator=g) * torch.rand(n, 1, 1, 1, generator=g) * 2


def sees(net, images):
    with torch.no_grad():
        logits, feature = net(images, return_feature=True)
    return Features(feature, logits)


def build(name, arguments):
    """OpenOOD's postprocessor of that name, with a configuration that counts as CIFAR-10."""
    module = import_module(f"openood.postprocessors.{name}_postprocessor")
    kind = getattr(module, f"{CLASS_NAMES.get(name, name.upper())}Postprocessor")
    section = SimpleNamespace(
        name=name,
        APS_mode=False,
        postprocessor_args=SimpleNamespace(**arguments),
        postprocessor_sweep=SimpleNamespace(),
    )
    return kind(SimpleNamespace(postprocessor=section, dataset=SimpleNamespace(name="cifar10")))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("knn", {"K": 5}),
        ("nci", {}),
        ("nci", {"alpha": 0.1}),
        ("gen", {}),
        ("gen", {"gamma": 0.5, "M": 4}),
        ("fdbd", {}),
        ("fdbd", {"distance_as_normalizer": False}),
        ("scale", {}),
        ("ash", {}),
        ("vim", {"dim": 12}),
        ("she", {}),
        ("she", {"metric": "cosine"}),
        ("she", {"metric": "euclidean"}),
    ],
    ids=str,
)
def test_scores_equal_openoods(name, arguments):
    if name == "knn":
        pytest.importorskip("faiss")
    net = make_net(classes=CLASSES)
    with torch.no_grad():
        net.fc.weight *= 60  # logits that differ by more than float32's rounding
    train, test = images_of(200, 1), images_of(40, 2)
    fit = sees(net, train)
    labels = fit.logits.argmax(1)
    labels[::7] = (labels[::7] + 1) % CLASSES  # images classified wrongly
    labels = torch.where(torch.bincount(labels, minlength=CLASSES)[labels] > 0, labels, 0)
    score = make_score(name, arguments)
    arguments = asdict(score)
    theirs = build(name, arguments)
    wrapped = net
    if name in ("ash", "scale"):
        module = import_module(f"openood.networks.{name}_net")
        wrapped = getattr(module, {"ash": "ASHNet", "scale": "ScaleNet"}[name])(net)
    batches = [{"data": train, "label": labels}]
    with on_device("cpu"):
        theirs.setup(wrapped, {"train": batches}, {})
        predicted, expected = theirs.postprocess(wrapped, test.clone())
    seen, head = sees(net, test), Head(net.fc.weight, net.fc.bias)
    got = score(seen, head, score.fit(score.sums(fit, labels), fit, head))
    if name not in ("ash", "scale"):
        assert torch.equal(predicted, seen.logits.argmax(1))
    expected = expected.double()
    # In SHE, OpenOOD has NaN for a class without images classified correctly.
    valid = expected.isfinite()
    assert valid.sum() >= 20
    difference = (got.double() - expected)[valid].abs().max()
    assert difference < 1e-4 * expected[valid].std()


@pytest.mark.parametrize("name", POSTHOC)
def test_configurations_have_openoods_arguments(name):
    import yaml
    from openood.utils import Config

    if name == "knn":
        pytest.importorskip("faiss")
    if find_spec(f"openood.postprocessors.{name}_postprocessor") is None:
        pytest.skip(f"OpenOOD has no {name}")
    path = config_root() / "postprocessors" / f"{name}.yml"
    section = Config(str(path)).postprocessor
    assert section.name == name
    given = yaml.safe_load(path.read_text())["postprocessor"].get("postprocessor_args", {})
    build(name, given)
