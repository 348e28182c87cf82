"""Networks whose outputs are no logits: probabilities, their logarithms, evidence."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fusenorm_openood import FuseNorm
from fusenorm_openood.detectors.single import SingleScore
from fusenorm_openood.errors import TapError, ZeroRangeError
from fusenorm_openood.network.understanding import understand
from tests.nets import Custom, Net, energies, some_images, within

IMAGES = some_images(40)


class Ending(Net):
    """What is made of logits, or of the logits of several heads."""

    def __init__(self, end, heads=1, scale=1.0):
        super().__init__()
        self.end, self.scale = end, scale
        self.others = nn.ModuleList(nn.Linear(8, 5) for _ in range(heads - 1))
        self.eval()

    def logits(self, x):
        f = self.feature(x)
        return [self.scale * head(f) for head in (self.fc, *self.others)]

    def forward(self, x):
        logits = self.logits(x)
        return self.end(logits[0] if len(logits) == 1 else logits)


UNDONE = {
    "sigmoid": torch.sigmoid,
    "log of a sigmoid": F.logsigmoid,
    "sigmoid by hand": lambda z: 1 / (1 + (-z).exp()),
    "softplus": F.softplus,
    "evidence by softplus": lambda z: F.softplus(z) + 1,
    "evidence by exp": lambda z: z.exp() + 1,
    "evidence by relu": lambda z: z.relu() + 1,
    "exp": torch.exp,
    "softmax": lambda z: z.softmax(1),
    "log-probabilities": lambda z: z.log_softmax(1),
    "dict with its name": lambda z: {"logits": z.log_softmax(1)},
}


@pytest.fixture(scope="module")
def expected():
    return FuseNorm(Net(), taps=["a.0", "b.0"]).fit([IMAGES]).infer([IMAGES])


@pytest.mark.parametrize("kind", UNDONE)
def test_the_logits_before_an_activation_are_scored(kind, expected):
    scored = FuseNorm(Ending(UNDONE[kind]), taps=["a.0", "b.0"]).fit([IMAGES]).infer([IMAGES])
    np.testing.assert_allclose(scored.experts, expected.experts, rtol=1e-5, atol=1e-6)
    assert np.array_equal(scored.pred, expected.pred)


@pytest.mark.parametrize(
    "end",
    [
        lambda z: (z, z.sigmoid()),
        lambda z: (z.softmax(1), z),
        lambda z: {"p": z.log_softmax(1), "z": z},
        lambda z: (z.detach().sigmoid(), z.detach()),
    ],
)
def test_logits_beside_their_activation_are_taken_wherever_they_come_from(end):
    net = Ending(end, scale=50.0)
    detector = FuseNorm(net, strong=["output"], taps=["a.0", "b.0"]).fit([IMAGES])
    with torch.no_grad():
        expected = net.logits(IMAGES)[0].double().logsumexp(1)
    got = torch.tensor(detector.infer([IMAGES]).experts[-1])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


NO_LOGITS = {
    "scaled sigmoid": (lambda z: (3 * z).sigmoid(), 1),
    "per cent": (lambda z: 100 * (3 * z).sigmoid(), 1),
    "clamped sigmoid": (lambda z: (3 * z).sigmoid().clamp(1e-3, 1 - 1e-3), 1),
    "softmax": (lambda z: (3 * z).softmax(1), 1),
    "softplus": (lambda z: F.softplus(3 * z), 1),
    "evidence": (lambda z: F.softplus(3 * z) + 1, 1),
    "kernels": (lambda z: (-((z - 1) ** 2)).exp(), 1),
    "ensemble": (lambda zs: torch.stack([z.softmax(1) for z in zs]).mean(0), 3),
}


@pytest.mark.parametrize("kind", NO_LOGITS)
def test_outputs_whose_logits_are_unknown_are_one_error(kind):
    with pytest.raises(TapError, match=r"which are no logits: wrap it so that its forward"):
        understand(Ending(*NO_LOGITS[kind]), IMAGES)


def test_detectors_and_baselines_raise_that_error():
    net = Ending(*NO_LOGITS["softmax"])
    for use in (lambda: FuseNorm(net).fit([IMAGES]), lambda: SingleScore(net, "msp").score(IMAGES)):
        with pytest.raises(TapError, match="which are no logits"):
            use()


LOG_PROBABILITIES = {
    "temperature": (lambda z: (3 * z).log_softmax(1), 1),
    "logarithm": (lambda z: (3 * z).softmax(1).log(), 1),
    "logsumexp": (lambda z: 3 * z - (3 * z).logsumexp(1, keepdim=True), 1),
    "ensemble": (lambda zs: torch.stack([z.softmax(1) for z in zs]).mean(0).log(), 3),
    "mixture": (
        lambda zs: torch.stack([z.log_softmax(1) for z in zs]).logsumexp(0) - np.log(3.0),
        3,
    ),
    "without a graph": (lambda z: (3 * z).detach().log_softmax(1), 1),
}


@pytest.mark.parametrize("kind", LOG_PROBABILITIES)
def test_log_probabilities_are_recognised(kind):
    assert understand(Ending(*LOG_PROBABILITIES[kind]), IMAGES).activation == "log_softmax"


@pytest.mark.parametrize("kind", ["temperature", "ensemble"])
def test_the_energy_of_log_probabilities_is_an_error_and_their_msp_is_right(kind):
    net = Ending(*LOG_PROBABILITIES[kind])
    taps = ["a.0", "b.0"]
    for use in (
        lambda: FuseNorm(net, taps=taps, strong=["output"]).fit([IMAGES]),
        lambda: FuseNorm(net, taps=taps, strong="auto", react_percentile=90.0).fit([IMAGES]),
        lambda: SingleScore(net, "ebo", temperature=1.0).score(IMAGES),
    ):
        with pytest.raises(ZeroRangeError, match=r"log-probabilities.*'msp'"):
            use()
    with torch.no_grad():
        p = net(IMAGES).double().exp()
    for output in ("msp", "mls", "odin"):
        settings = {"output": output, "strong": ["output"], "noise": 0.0, "taps": taps}
        got = FuseNorm(net, **settings).fit([IMAGES]).infer([IMAGES]).experts[-1]
        if output == "msp":
            top = p.amax(1)
            torch.testing.assert_close(
                torch.tensor(got), (top / (1 - top)).log(), rtol=1e-4, atol=1e-4
            )
    torch.testing.assert_close(SingleScore(net, "msp").score(IMAGES), p.amax(1).float())


LOGITS = {
    "small": lambda z: 0.5 + 0.05 * z,  # all in (0, 1)
    "tanh": lambda z: 3 * (z / 3).tanh(),
    "relu": lambda z: z.relu(),
    "distances": lambda z: -(z - torch.arange(5.0)).square(),
    "gated": lambda z: z.abs() * z.sigmoid(),
    "layer norm": lambda z: F.layer_norm(z, (5,)),
    "log-odds": lambda z: z.sigmoid().log() - (1 - z.sigmoid()).log(),
}


@pytest.mark.parametrize("kind", LOGITS)
def test_other_outputs_are_logits_as_before(kind):
    net = Ending(LOGITS[kind])
    structure = understand(net, IMAGES)
    assert structure.activation == ""
    assert not structure.head.before_softmax
    with torch.no_grad():
        torch.testing.assert_close(SingleScore(net, "mls").score(IMAGES), net(IMAGES).amax(1))


@pytest.mark.parametrize("frozen", [True, False])
def test_a_learned_scale_is_no_activation(frozen):
    cosine = within(torch.no_grad)  # the graph leads from the logits to the scale alone
    net = Custom(lambda net, x: net.scale.exp() * cosine(net, x).abs(), scale=torch.tensor(0.3))
    net.requires_grad_(not frozen)
    got = FuseNorm(net, taps=["a.0", "b.0"], strong=["output"]).fit([IMAGES]).infer([IMAGES])
    torch.testing.assert_close(torch.tensor(got.experts[-1]), energies(net, IMAGES))


@pytest.mark.parametrize("offset", [0.01, -3.0])
def test_a_range_that_is_rounding_of_the_logits_is_no_range(offset):
    def shifted(net, x):  # the energy of large logits is a constant
        z = 1e3 * Net.forward(net, x)
        return z - z.logsumexp(1, keepdim=True) + offset

    with pytest.raises(ZeroRangeError, match="'output' are both"):
        FuseNorm(Custom(shifted), strong=["output"]).fit([IMAGES])
    FuseNorm(Custom(shifted), strong=["output"], output="msp").fit([IMAGES])


@pytest.mark.parametrize("value", [-1e4, float("-inf")])
def test_masked_classes_are_no_scale(value):
    net = Ending(lambda z: z.index_fill(1, torch.tensor([1, 3]), value))
    detector = FuseNorm(net, strong=["output"]).fit([IMAGES])
    with torch.no_grad():
        expected = net.logits(IMAGES)[0][:, [0, 2, 4]].double().logsumexp(1)
    torch.testing.assert_close(torch.tensor(detector.infer([IMAGES]).experts[-1]), expected)
