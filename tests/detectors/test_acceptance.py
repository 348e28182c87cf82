"""The promise of calibration on real scores: 1,000 splits of a network's confidences in digits."""

import numpy as np
import pytest
from scipy import stats

from fusenorm_openood import FuseNorm, load_network
from fusenorm_openood.data.benchmarks import image_loader, load_benchmark
from fusenorm_openood.method.conformal import conformal_p_values, guarantee, rejects

SPLITS, ACCEPTANCE = 1000, 0.9


@pytest.fixture(scope="module")
def confidences(digits):
    """Confidences of all ID images, whose order says nothing."""
    data_root, checkpoint = digits
    benchmark = load_benchmark("digits", data_root)
    detector = FuseNorm(load_network(checkpoint)).fit(image_loader(benchmark.id["val"]))
    loaders = [image_loader(benchmark.id[split]) for split in ("train", "val", "test")]
    return np.concatenate([detector.score_loader(loader).numpy() for loader in loaders])


@pytest.mark.parametrize("n", [50, 200, 1000])
@pytest.mark.parametrize("ties", [False, True])
def test_the_accepted_share_keeps_its_promise(confidences, n, ties):
    generator = np.random.default_rng(n)
    pool = confidences.round(1) if ties else confidences
    tested = min(200, len(pool) - n)
    assert tested >= 100
    accepted, small = np.empty(SPLITS), np.empty(SPLITS)
    for split in range(SPLITS):
        drawn = generator.permutation(pool)[: n + tested]
        p = conformal_p_values(drawn[n:], drawn[:n])
        brute = (1 + (drawn[:n] <= drawn[n])[..., None].sum()) / (n + 1)
        assert p[0] == brute
        accepted[split] = np.count_nonzero(~rejects(p, ACCEPTANCE))
        small[split] = np.mean(p <= 0.05)
    k = int((1 - ACCEPTANCE) * (n + 1) + 1e-9)
    law = stats.betabinom(tested, n + 1 - k, k)
    assert guarantee(n, ACCEPTANCE).average == pytest.approx(law.mean() / tested)
    error = law.std() / np.sqrt(SPLITS)
    low, high = law.ppf([0.005, 0.995])
    assert np.mean(accepted < low) < 0.02  # never fewer than promised, and with ties more
    assert accepted.mean() > law.mean() - 3 * error
    if not ties:
        assert np.mean(accepted > high) < 0.02
        assert accepted.mean() < law.mean() + 3 * error
    assert small.mean() < 0.05 + 3 * small.std() / np.sqrt(SPLITS)  # super-uniform
