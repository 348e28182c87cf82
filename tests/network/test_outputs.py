"""Logits are found in whatever a network returns."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fusenorm_openood import FuseNorm
from fusenorm_openood.detectors.single import SingleScore
from fusenorm_openood.errors import TapError
from fusenorm_openood.network.running import tensors_in
from tests.nets import CLASSES, Custom, Net, some_images

IMAGES = some_images(20)


@dataclass
class Output:
    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] = ()


class ModelOutput(OrderedDict):  # as Hugging Face's: keys and attributes
    def __getattr__(self, name):
        return self[name]

    def __getitem__(self, key):
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


Named = namedtuple("Named", ["feature", "logits"])
Unnamed = namedtuple("Unnamed", ["feature", "scores"])

KINDS = {
    "dataclass": lambda y, f: Output(logits=y, hidden_states=(f, f)),
    "ModelOutput": lambda y, f: ModelOutput(hidden=f, logits=y),
    "dict": lambda y, f: {"features": f, "logits": y},
    "dict without the name": lambda y, f: {"features": f, "prediction": y},
    "UserDict": lambda y, f: UserDict(out=y),
    "nested": lambda y, f: {"out": {"logits": y}, "aux": f},
    "(logits, feature)": lambda y, f: (y, f),
    "(feature, logits)": lambda y, f: (f, y),
    "[logits, None]": lambda y, f: [y, None],
    "(logits, classes)": lambda y, f: (y, y.argmax(1)),
    "logits twice": lambda y, f: (y, y),
    "feature of other rank": lambda y, f: (f[:, None], y),
    "namedtuple": lambda y, f: Named(f, y),
    "namedtuple without the name": lambda y, f: Unnamed(f, y),
    "attribute": lambda y, f: Output(loss=f.mean(), logits=y),
}


def returning(wrap):
    return Custom(lambda net, x: wrap(net.fc(f := net.feature(x)), f))


SETTINGS = {"strong": ["output", "fdbd"], "react_percentile": 90.0, "taps": ["b.1"]}


@pytest.fixture(scope="module")
def expected():
    return FuseNorm(Net(), **SETTINGS).fit([IMAGES]).infer([IMAGES])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_output_scores_as_the_logits_alone(kind, expected):
    net = returning(KINDS[kind])
    scored = FuseNorm(net, **SETTINGS).fit([IMAGES]).infer([IMAGES])
    torch.testing.assert_close(scored.experts, expected.experts)
    torch.testing.assert_close(scored.conf, expected.conf)
    assert scored.pred.tolist() == expected.pred.tolist()


@pytest.mark.parametrize("kind", ["(feature, logits)", "ModelOutput"])
def test_odin_and_baselines_read_the_logits_alike(kind):
    net = returning(KINDS[kind])
    for name, args in (("odin", {"temperature": 10.0, "noise": 0.01}), ("msp", {})):
        expected = SingleScore(Net(), name, **args).score(IMAGES)
        torch.testing.assert_close(SingleScore(net, name, **args).score(IMAGES), expected)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda y, f: (y, y * 2 + f[:, :CLASSES], f.detach() @ f.detach().T), "several tensors"),
        (lambda y, f: {"a": y, "b": 2 * f}, r"\(a \[2, 5\], b \[2, 8\]\)"),
        (lambda y, f: y.mean(0), r"logits \[B, K\], or one logit \[B, 1\], got \[5\] for 2"),
        (lambda y, f: y.mean(0)[:2], r"got \[2\] for 3 image"),
        (lambda y, f: y.repeat(4, 1), r"got \[8, 5\] for 2 image"),
        (lambda y, f: y.argmax(1), "got Tensor for 2 image"),
        (lambda y, f: None, "got NoneType for 2 image"),
        (lambda y, f: {}, "got dict for 2 image"),
        (lambda y, f: y[..., None, None], r"got \[2, 5, 1, 1\] for 2 image"),
        (lambda y, f: (y.mean(), "text"), r"got \[\] for 2 image"),
    ],
)
def test_outputs_without_clear_logits_are_one_error(wrap, message):
    net = returning(wrap)
    for use in (
        lambda: FuseNorm(net, strong=["output"], output="odin").fit([IMAGES]),
        lambda: SingleScore(net, "msp").score(IMAGES[:2]),
    ):
        with pytest.raises(TapError, match=message) as caught:
            use()
        assert "wrap it so that its forward returns" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_network_that_changes_its_output_later_is_an_error():
    net = Net()
    detector = FuseNorm(net, strong=["output"]).fit([IMAGES])
    net.forward = lambda x: torch.cat([net.fc(net.feature(x))] * 2)
    with pytest.raises(TapError, match=r"got \[40, 5\] for 20 image"):
        detector.score(IMAGES)


def test_tensors_of_a_nested_output_with_their_paths():
    x, y, z = torch.zeros(1), torch.ones(2), torch.ones(3)
    output = {"a": (x, [y, 3, "text", torch.ones(2).long()]), "b": Output(logits=z)}
    found = list(tensors_in(output))
    assert [path for path, _ in found] == [("a", 0), ("a", 1, 0), ("b", "logits")]
    assert all(one is other for (_, one), other in zip(found, (x, y, z), strict=True))
