import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from fusenorm_openood.errors import DataError
from fusenorm_openood.evaluation import comparison
from fusenorm_openood.evaluation.comparison import Confidences, difference_interval


def auroc(known, unknown):
    labels = np.r_[np.ones(len(known)), np.zeros(len(unknown))]
    return roc_auc_score(labels, np.r_[known, unknown])


def simulated(seed, shift, images=60, decimals=None):
    g = np.random.default_rng(seed)
    known, near, far = g.normal(shift, 1, images), g.normal(0, 1, 40), g.normal(-1, 1, 30)
    values = [known, near, far]
    if decimals is not None:
        values = [np.round(v, decimals) for v in values]
    return Confidences(values[0], values[1:])


@pytest.mark.parametrize("decimals", [None, 0])
@pytest.mark.parametrize("values", [2**23, 300])
def test_the_interval_is_that_of_a_plain_loop_over_the_same_draws(decimals, values, monkeypatch):
    ours, other = simulated(0, 1.0, decimals=decimals), simulated(1, 0.5, decimals=decimals)
    monkeypatch.setattr(comparison, "COUNTS", values)
    interval = difference_interval(ours, other, level=0.9, draws=50, seed=3)
    generator, gains = np.random.default_rng(3), []
    step = max(values // 100, 1)  # images of the ID set and of the largest OOD set
    for start in range(0, 50, step):
        sizes = [60, 40, 30]
        drawn = [generator.integers(size, size=(min(step, 50 - start), size)) for size in sizes]
        for known, *unknown in zip(*drawn, strict=True):
            means = []
            for m in (ours, other):
                pairs = zip(m.ood, unknown, strict=True)
                means.append(np.mean([auroc(m.id[known], conf[index]) for conf, index in pairs]))
            gains.append(means[0] - means[1])
    np.testing.assert_allclose(interval, np.percentile(gains, [5, 95]), rtol=0, atol=1e-12)


def test_a_method_does_not_differ_from_itself():
    assert difference_interval(simulated(0, 1.0), simulated(0, 1.0)) == (0.0, 0.0)


def test_the_true_difference_lies_within_most_intervals():
    # Normal scores of unit variance: AUROC = Phi(shift / sqrt 2).
    true = 0.5 * (0.8413 - 0.7602) + 0.5 * (0.9831 - 0.9661)
    shifts, inside = (np.sqrt(2) * 1.0, np.sqrt(2) * 0.7071), 0
    for seed in range(40):
        ours, other = (simulated(2 * seed + i, s, 200) for i, s in enumerate(shifts))
        low, high = difference_interval(ours, other, draws=200, seed=seed)
        inside += low <= true <= high
    assert inside >= 33


@pytest.mark.parametrize(
    ("ours", "other"),
    [
        (simulated(0, 1.0), simulated(0, 1.0, images=59)),
        (Confidences([], [[1.0]]), Confidences([], [[1.0]])),
        (Confidences([1.0], [[]]), Confidences([1.0], [[]])),
        (Confidences([1.0], []), Confidences([1.0], [])),
    ],
)
def test_other_numbers_of_images_are_an_error(ours, other):
    with pytest.raises(DataError, match="same ID and OOD images"):
        difference_interval(ours, other)
