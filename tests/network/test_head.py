"""The layers that make the logits are found on the way back from them, whatever they are."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fusenorm_openood import FuseNorm
from fusenorm_openood.detectors.single import SingleScore
from fusenorm_openood.errors import TapError
from fusenorm_openood.forward.passes import forward_pass, head_of
from fusenorm_openood.network.understanding import find_shares, understand
from tests.nets import BLOCKS, CLASSES, Net, some_images

IMAGES = some_images(40)
PERCENTILE = 80.0


class Plain(Net):
    def head(self, feature):
        return self.fc(feature)

    def forward(self, x):
        return self.head(self.feature(x))


class Later(Plain):
    def __init__(self):
        super().__init__()
        self.projection = nn.Linear(CLASSES, CLASSES)  # registered last, runs first
        self.unused = nn.Linear(8, CLASSES)
        self.before = nn.Linear(8, 8)

    def feature(self, x):
        return self.before(super().feature(x))


class Temperature(Plain):
    def head(self, feature):
        return self.fc(feature) / 0.3


class NoBias(Plain):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, CLASSES, bias=False)


class Nested(Plain):
    def __init__(self):
        super().__init__()
        inner = nn.Sequential(nn.Linear(8, CLASSES), nn.Identity())
        self.fc = nn.Sequential(nn.Dropout(0.5), inner)


class TwoHeads(Plain):  # as DeiT, averaged
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(8, CLASSES)

    def head(self, feature):
        return (self.fc(feature) + self.other(feature.tanh())) / 2

    def clipped(self, feature, c):
        return (self.fc(feature.clamp(max=c)) + self.other(feature.tanh().clamp(max=c))) / 2

    def inputs(self, feature):
        return torch.cat([feature, feature.tanh()], 1)


class LogSoftmax(Plain):
    def forward(self, x):
        return self.head(self.feature(x)).log_softmax(1)


class Softmax(Plain):
    def forward(self, x):
        return self.head(self.feature(x)).softmax(1)


class Cosine(Plain):  # the logits are no linear function of what the layer is given
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, CLASSES, bias=False)

    def head(self, feature):
        return self.fc(F.normalize(feature)) / 0.1

    def clipped(self, feature, c):
        return self.fc(F.normalize(feature).clamp(max=c)) / 0.1

    def inputs(self, feature):
        return F.normalize(feature)


class NormalisedAfter(Plain):  # the logits are no linear function of the layer's output
    def head(self, feature):
        return F.layer_norm(self.fc(feature), (CLASSES,))


class ConvHead(Plain):  # as SqueezeNet: a convolution, then pooling
    def __init__(self):
        super().__init__()
        self.fc = nn.Conv2d(8, CLASSES, 1)

    def feature(self, x):
        return self.b(self.a(self.stem(x)))

    def head(self, feature):
        return self.fc(feature).mean((2, 3))


class TokenHead(ConvHead):  # a linear layer on tokens, then their mean
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, CLASSES)

    def feature(self, x):
        return super().feature(x).flatten(2).mT

    def head(self, feature):
        return self.fc(feature).mean(1)


class ConvOnPixel(ConvHead):  # as EfficientFormer and timm's ConvNets: pooling, then a convolution
    def feature(self, x):
        return super().feature(x).mean((2, 3), keepdim=True)

    def head(self, feature):
        return self.fc(feature).flatten(1)


class Whole(ConvHead):  # a convolution with a kernel as large as its input
    def __init__(self):
        super().__init__()
        self.fc = nn.Conv2d(8, CLASSES, 6)


KINDS = [
    *(Plain, Later, Temperature, NoBias, Nested, TwoHeads, LogSoftmax, Softmax),
    *(Cosine, NormalisedAfter, ConvHead, TokenHead, ConvOnPixel, Whole),
]


def by_hand(net, images, percentile=PERCENTILE, fit_images=IMAGES):
    """ReAct's threshold, and the logits of images with the head's input clipped at it."""
    inputs = getattr(net, "inputs", lambda feature: feature)
    clipped = getattr(net, "clipped", lambda feature, c: net.head(feature.clamp(max=c)))
    with torch.no_grad():
        threshold = float(np.percentile(inputs(net.feature(fit_images)).numpy(), percentile))
        return threshold, clipped(net.feature(images), threshold)


@pytest.mark.parametrize("kind", KINDS)
def test_react_clips_what_the_head_is_given(kind):
    net = kind().eval()
    baseline = SingleScore(net, "react", percentile=PERCENTILE).fit([IMAGES])
    threshold, logits = by_hand(net, IMAGES[:7])
    assert baseline.threshold_ == pytest.approx(threshold)
    torch.testing.assert_close(
        baseline.score(IMAGES[:7]).float(), logits.logsumexp(1), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_fusenorm_reacts_alike(kind):
    net = kind().eval()
    settings = {"strong": ["output"], "output": "mls", "react_percentile": PERCENTILE}
    detector = FuseNorm(net, **settings).fit([IMAGES])
    assert detector.taps == BLOCKS
    got = torch.tensor(detector.infer([IMAGES]).experts[-1])
    torch.testing.assert_close(got.float(), by_hand(net, IMAGES)[1].amax(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_predictions_are_the_networks_before_any_softmax(kind):
    net = kind().eval()
    baseline = SingleScore(net, "mls")
    with torch.no_grad():
        logits = net.head(net.feature(IMAGES))
    pred, conf = baseline.predict(IMAGES)
    torch.testing.assert_close(conf.float(), logits.amax(1))
    assert torch.equal(pred, logits.argmax(1))


@pytest.mark.parametrize("kind", [k for k in KINDS if k is not NormalisedAfter])
def test_the_default_settings_work(kind):
    net = kind().eval()
    scored = FuseNorm(net).fit([IMAGES]).infer([IMAGES])
    assert np.isfinite(scored.experts).all()
    with torch.no_grad():
        logits = net.head(net.feature(IMAGES)).double()
    np.testing.assert_allclose(scored.experts[4], logits.logsumexp(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in (Cosine, NormalisedAfter)])
def test_the_logits_are_a_linear_map_of_the_feature(kind):
    net = kind().eval()
    structure = understand(net, IMAGES)
    assert structure.head.is_linear == (
        kind not in (ConvHead, TokenHead)
    )  # clipped before its mean
    with torch.no_grad():
        logits = net.head(net.feature(IMAGES))
        done = forward_pass(net, IMAGES, structure)
    weight, bias = head_of(net, structure)
    torch.testing.assert_close(F.linear(done.feature, weight, bias), logits, rtol=1e-4, atol=1e-4)


def test_scale_on_two_heads_scales_both_of_their_inputs():
    class Positive(TwoHeads):  # SCALE's factor is finite on features that are not negative
        def feature(self, x):
            return super().feature(x).abs()

    net = Positive().eval()
    with torch.no_grad():
        feature = net.feature(IMAGES)
        f = torch.cat([feature, feature.tanh()], 1)
        cut = torch.sort(f, 1).values[:, int(f.shape[1] * 0.5)].unsqueeze(1)
        factor = (f.sum(1) / f.where(f >= cut, 0).sum(1)).exp().unsqueeze(1)
        logits = (net.fc(factor * feature) + net.other(factor * feature.tanh())) / 2
    got = SingleScore(net, "scale", percentile=50).score(IMAGES)
    torch.testing.assert_close(got.float(), logits.logsumexp(1), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # torch announces that it will be removed
def test_a_dynamically_quantised_head():
    net = Plain()
    quantised = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, torch.qint8)
    baseline = SingleScore(quantised, "react", percentile=PERCENTILE).fit([IMAGES])
    with torch.no_grad():
        feature = quantised.feature(IMAGES)
        threshold = float(np.percentile(feature.numpy(), PERCENTILE))
        exact = F.linear(
            feature.clamp(max=threshold),
            quantised.fc.weight().dequantize(),
            quantised.fc.bias(),
        )
    assert baseline.threshold_ == pytest.approx(threshold)
    torch.testing.assert_close(
        baseline.score(IMAGES).float(), exact.logsumexp(1), rtol=0.02, atol=0.02
    )
    assert torch.isfinite(FuseNorm(quantised).fit([IMAGES]).score(IMAGES)).all()


class Headless(Net):
    """Logits that come from no layer with a weight matrix: distances to prototypes."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Identity()
        self.prototypes = nn.Parameter(torch.randn(CLASSES, 8))

    def forward(self, x):
        return -torch.cdist(self.feature(x), self.prototypes)


class Channels(Net):  # the last layer with a weight makes channels, not classes
    def __init__(self):
        super().__init__()
        self.fc = nn.Identity()

    def forward(self, x):
        return self.feature(x)[:, :CLASSES] + 0


@pytest.mark.parametrize("kind", [Headless, Channels])
def test_without_a_head_one_error_says_the_way_out(kind):
    net = kind().eval()
    with pytest.raises(TapError, match=r"set strong=\['output'\]"):
        FuseNorm(net).fit([IMAGES])
    with pytest.raises(TapError, match="set react_percentile=None"):
        FuseNorm(net, strong=["output"], react_percentile=90.0).fit([IMAGES])
    with pytest.raises(TapError, match="ReAct needs the layers"):
        SingleScore(net, "react", percentile=90.0).fit([IMAGES])
    with torch.no_grad():
        expected = net(IMAGES).double().logsumexp(1)
    detector = FuseNorm(net, strong=["output"]).fit([IMAGES])
    torch.testing.assert_close(torch.tensor(detector.infer([IMAGES]).experts[-1]), expected)


def test_probabilities_whose_logits_are_unknown_are_one_error():
    class Probabilities(Headless):
        def forward(self, x):
            return super().forward(x).softmax(1)

    for strong in ("auto", ["output"]):
        with pytest.raises(TapError, match="returns probabilities"):
            FuseNorm(Probabilities().eval(), strong=strong).fit([IMAGES])


def test_a_head_that_is_applied_twice_is_none():
    class Twice(Plain):
        def head(self, feature):
            return self.fc(feature) + self.fc(feature.flip(1))

    assert understand(Twice(), IMAGES).head.names == ()


def test_a_head_that_is_initialised_to_zero():
    net = Plain()
    nn.init.zeros_(net.fc.weight)
    nn.init.zeros_(net.fc.bias)
    structure = understand(net, IMAGES)
    assert structure.head.names == ("fc",)
    assert structure.head.shares == (1.0,)


def test_shares_are_found_by_least_squares():
    a, b = torch.randn(2, 4, 6)
    assert find_shares([a], a / 0.3)[0] == pytest.approx((1 / 0.3,))
    assert find_shares([a, b], (a + b) / 2) == ((0.5, 0.5), True)
    assert find_shares([a, b], a + b) == ((1.0, 1.0), True)
    assert not find_shares([a, b], a * b)[1]
