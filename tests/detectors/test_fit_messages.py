"""What a fit tells: that its images are too few, and how far it is."""

import re
import warnings
from contextlib import suppress

import pytest
import torch

from fusenorm_openood import FuseNorm, Settings
from fusenorm_openood.detectors.search import search
from fusenorm_openood.detectors.single import SingleScore
from fusenorm_openood.errors import FuseNormError
from tests.conftest import make_loader, make_net

OUTPUT = {"strong": ["output"]}


def warnings_of(detector, loader):
    """What a fit warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with suppress(FuseNormError):  # some of these cannot be fitted
            detector.fit(loader)
    return [str(w.message) for w in caught if "too few" in str(w.message)]


@pytest.mark.parametrize(
    ("make", "classes", "count", "enough"),
    [
        (FuseNorm, 4, 2, 20),
        (lambda net: FuseNorm(net, strong=["mds++"]), 4, 2, 36),
        (lambda net: FuseNorm(net, strong=["mds++"]), 4, 31, 36),  # 32 features and 4 classes
        (lambda net: FuseNorm(net, **OUTPUT), 4, 5, 20),
        (FuseNorm, 90, 15, 20),  # its experts need no image of each class
        (lambda net: FuseNorm(net, **OUTPUT, percentile_low=1.0), 4, 60, 100),
        (lambda net: FuseNorm(net, strong=["vim"]), 4, 20, 32),
        (lambda net: FuseNorm(net, strong=["knn"], neighbours=50), 4, 40, 51),
        (lambda net: FuseNorm(net, strong=["she"]), 60, 40, 60),
        (lambda net: SingleScore(net, "mds++"), 100, 50, 132),
        (lambda net: SingleScore(net, "knn"), 4, 30, 51),
        (lambda net: SingleScore(net, "react"), 4, 3, 20),
    ],
)
def test_too_few_images(make, classes, count, enough):
    net = make_net(classes=classes)
    loaders = [list(make_loader(count)), Unsized(make_loader(count))]
    for loader in loaders if isinstance(make(net), FuseNorm) else loaders[:1]:
        (message,) = warnings_of(make(net), loader)
        assert message.startswith(f"{count} ID images are too few")
        assert message.endswith(f"fit on at least {enough}")
    assert warnings_of(make(net), make_loader(enough)) == []


class Unsized:
    """A loader that does not say how many images it gives."""

    def __init__(self, loader):
        self.given = loader

    def __iter__(self):
        return iter(self.given)


def test_the_warning_comes_before_the_fit(net):
    class Counted(torch.utils.data.TensorDataset):
        read = 0

        def __getitem__(self, number):
            type(self).read += 1
            return super().__getitem__(number)

    images = Counted(torch.randn(17, 3, 16, 16))
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="17 ID images are too few"):
        warnings.simplefilter("error")
        FuseNorm(net).fit(torch.utils.data.DataLoader(images, 2))
    assert Counted.read == 2


def test_a_shorter_sampler_counts(net):
    images = make_loader(100).dataset
    sampler = torch.utils.data.SubsetRandomSampler(range(6))
    (message,) = warnings_of(FuseNorm(net), torch.utils.data.DataLoader(images, 3, sampler=sampler))
    assert re.match("6 ID images", message)


ENERGY = Settings.published(output="energy")


@pytest.mark.parametrize(
    ("work", "bars"),
    [
        (lambda net, loader, **p: FuseNorm(net).fit(loader, **p), ["fit"]),
        (lambda net, loader, **p: FuseNorm(net, ENERGY).fit(loader, **p), ["ReAct", "fit"]),
        (lambda net, loader, **p: SingleScore(net, "msp").score_loader(loader, **p), ["score"]),
        (lambda net, loader, **p: SingleScore(net, "msp").infer(loader, desc="of", **p), ["of"]),
        (lambda net, loader, **p: SingleScore(net, "react").fit(loader, **p), ["ReAct"]),
        (
            lambda net, loader, **p: search(net, ENERGY, {"base": [2]}, loader, [*loader], **p),
            ["ReAct", "APS", "APS"],
        ),
    ],
)  # fmt: skip
def test_every_pass_has_a_bar_on_request(net, loader, work, bars, capsys):
    work(net, loader)
    assert capsys.readouterr().err == ""
    work(net, loader, progress=True)
    assert re.findall(r"(\w+):   0%", capsys.readouterr().err) == bars
