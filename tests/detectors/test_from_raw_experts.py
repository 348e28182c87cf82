"""The whole of each method, from the network's outputs to the confidence, written once more."""

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import spearmanr

from fusenorm_openood import FuseNorm, Settings, atf
from tests.conftest import make_loader
from tests.method.test_scores import head_tied

STRONG = [
    ("output", "logitgap", "fdbd", "head_mds"),
    ("output", "fdbd", "mds++"),
    ("output", "knn", "fdbd"),
]
TAPS = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]


def outputs_of(net, loader):
    """Block norms `[8, N]`, features `[N, D]` and logits `[N, K]` in float64."""
    images, norms = torch.cat([images for images, _ in loader]), {}
    handles = [
        net.get_submodule(tap).register_forward_hook(
            lambda module, args, output, tap=tap: norms.update({tap: atf(output)})
        )
        for tap in TAPS
    ]
    with torch.no_grad():
        logits, feature = net(images, return_feature=True)
    for handle in handles:
        handle.remove()
    norms = torch.stack([norms[tap] for tap in TAPS])
    return [values.double().numpy() for values in (norms, feature, logits)]


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def knn(x, known, rank=5):
    return [-np.sort(((known - row) ** 2).sum(1))[rank - 1] for row in x]


def class_means(known, classes):
    return {c: known[classes == c].mean(0) for c in np.unique(classes)}


def covariance(known, classes):
    """Sum of outer products of the residuals."""
    means = class_means(known, classes)
    residual = known - np.array([means[c] for c in classes])
    return residual.T @ residual


def mahalanobis(x, known, classes, images, ridge):
    precision = np.linalg.inv(covariance(known, classes) / images + ridge * np.eye(x.shape[1]))
    means = class_means(known, classes).values()
    return [-min((row - m) @ precision @ (row - m) for m in means) for row in x]


class Raw:
    """Scores `[3, N]` of the strong experts, from features and logits."""

    def __init__(self, net, feature, logits):
        self.weight = net.fc.weight.detach().double().numpy()
        self.feature, self.known, self.logits = feature, unit(feature), logits
        self.classes, self.n = logits.argmax(1), len(feature)
        self.ridge = 1e-3 * np.trace(covariance(self.known, self.classes) / self.n) / len(feature.T)

    def fdbd(self, feature, logits):
        scores, mean = [], self.feature.mean(0)
        for x, y in zip(feature, logits, strict=True):
            top = y.argmax()
            gaps = [
                (y[top] - y[c]) / np.linalg.norm(self.weight[top] - self.weight[c])
                for c in range(len(y))
                if c != top
            ]
            scores.append(sum(gaps) / np.linalg.norm(x - mean))
        return scores

    def of_id(self, name):
        """Each ID image without itself."""
        if name in ("output", "logitgap", "fdbd"):
            return self.of(name, self.feature, self.logits)
        if name == "head_mds":
            return [
                head_tied(self.known[i : i + 1], self.known, self.classes, self.weight, i)[0]
                for i in range(self.n)
            ]
        scores = []
        for i in range(self.n):
            x, others = self.known[i : i + 1], np.arange(self.n) != i
            known, classes = self.known[others], self.classes[others]
            if name == "knn":
                scores += knn(x, known)
            else:
                scores += mahalanobis(x, known, classes, self.n, self.ridge)
        return scores

    def of(self, name, feature, logits):
        if name == "output":
            return logsumexp(logits, axis=1)
        if name == "fdbd":
            return self.fdbd(feature, logits)
        if name == "logitgap":
            ordered = -np.sort(-logits, axis=1)
            return ordered[:, 0] - ordered[:, 1:21].mean(1)
        if name == "knn":
            return knn(unit(feature), self.known)
        if name == "head_mds":
            return head_tied(unit(feature), self.known, self.classes, self.weight)
        return mahalanobis(unit(feature), self.known, self.classes, self.n, self.ridge)


def log_m(norms, known):
    v = np.log(known)
    m, s = v.mean(1), v.std(1)
    correlation = np.corrcoef(v) + 0.001 * np.eye(len(v))
    u = (np.log(norms) - m[:, None]) / s[:, None]
    return 0.5 * np.log(np.einsum("ln,ln->n", u, np.linalg.solve(correlation, u)) / len(v))


def far_off(norms, known):
    of_id = log_m(known, known)
    left_out = of_id - np.log(1 - (len(known) * np.exp(2 * of_id) + 1) / known.shape[1])
    second = np.sort(left_out)[-2]  # the percentile 99.9 of fewer than 1000 images
    limit = max(left_out.mean() + 2.5 * left_out.std(), second)
    return 16 * np.maximum(0, log_m(norms, known) - limit) / left_out.std()


def joint_penalty(norms, known):
    of_id = log_m(known, known)
    left_out = of_id - np.log(1 - (len(known) * np.exp(2 * of_id) + 1) / known.shape[1])
    return np.minimum(10, np.exp((log_m(norms, known) - left_out.mean()) / left_out.std() - 3))


@pytest.mark.parametrize("strong", STRONG, ids=str)
@pytest.mark.parametrize("penalty", ["deviation", "joint"])
def test_the_confidence_is_the_formula_of_the_raw_experts(net, strong, penalty):
    loader, unknown = make_loader(120), make_loader(40, seed=5, scale=1.2)
    with torch.no_grad():
        net.fc.weight *= 30  # logits that differ by more than float32's rounding
    method = {"deviation": Settings.deviation, "joint": Settings}[penalty]
    detector = FuseNorm(net, method(strong=strong)).fit(loader)

    id_norms, *id_outputs = outputs_of(net, loader)
    norms, *outputs = outputs_of(net, unknown)
    raw = Raw(net, *id_outputs)
    known = np.array([raw.of_id(name) for name in strong])
    scores = np.array([raw.of(name, *outputs) for name in strong])
    low, high = np.percentile(known, [5, 95], axis=1)[..., None]
    assert (scores > high).any()  # the clip matters
    if penalty == "deviation":
        lowest, highest = np.percentile(id_norms, [5, 95], axis=1)[..., None]
        z = (norms - lowest) / (highest - lowest)
        largest = np.maximum(0, np.maximum(-z, z - 1)).max(0)
        expected = np.minimum((scores - low) / (high - low), 1).mean(0)
        expected -= np.minimum(1, 2**largest - 1) + far_off(norms, id_norms)
        assert (largest > 0).any()
        assert 0 < (far_off(norms, id_norms) > 0).mean() < 1
    else:
        in_sample = np.array([raw.of(name, *id_outputs) for name in strong])
        pairs = zip(known, in_sample, strict=True)
        weights = [max(0, spearmanr(*pair).statistic) for pair in pairs]
        of_id = np.minimum(known, high)
        z = (np.minimum(scores, high) - of_id.mean(1)[:, None]) / of_id.std(1)[:, None]
        penalties = joint_penalty(norms, id_norms)
        expected = np.average(z, axis=0, weights=weights) - penalties
        assert (penalties > 0.5).any()
    np.testing.assert_allclose(detector.score_loader(unknown), expected, rtol=1e-3, atol=2e-3)
