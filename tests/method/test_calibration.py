"""p-values by group: by brute force, by their law, and what is pooled."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fusenorm_openood.errors import CalibrationError, ConfigError
from fusenorm_openood.method.calibration import Calibrated, Calibration
from fusenorm_openood.method.conformal import guarantee, rejects

SPLITS, TESTED, ACCEPTANCE = 1000, 40, 0.9


def calibration(scores, group, groups, least=19, by="predicted"):
    scores, group = np.asarray(scores, np.float64), np.asarray(group, np.int64)
    names = tuple(map(str, range(groups)))
    history = (Calibrated("2026-01-01T00:00:00+00:00", len(scores), "a test"),)
    return Calibration(scores, scores[None], history, by, names, group, least)


def compared_with(scores, group, of, least):
    """The rule of `Calibration`, one image at a time."""
    counts = [group.count(g) for g in range(4)]
    if counts[of] >= least:
        return [s for s, g in zip(scores, group, strict=True) if g == of]
    pool = [s for s, g in zip(scores, group, strict=True) if counts[g] <= least]
    return pool if len(pool) >= least else scores


known = st.lists(st.tuples(st.integers(-4, 4), st.integers(0, 3)), min_size=1, max_size=40)


@given(known, known, st.integers(1, 9), st.sampled_from([0.5, 0.8, 0.9]))
def test_p_values_are_those_of_brute_force(images, tested, least, acceptance):
    scores, group = map(list, zip(*images, strict=True))
    conf, of = map(np.array, zip(*tested, strict=True))
    found = calibration(scores, group, 4, least)
    cells = [compared_with(scores, group, g, least) for g in of]
    expected = [
        (1 + sum(s <= c for s in cell)) / (len(cell) + 1)
        for c, cell in zip(conf, cells, strict=True)
    ]
    p = found.p_values(conf, of)
    np.testing.assert_array_equal(p, expected)
    assert (rejects(p, acceptance) >= rejects(p, (1 + acceptance) / 2)).all()
    try:
        cuts = found.thresholds(acceptance)
    except CalibrationError:
        assert min(len(compared_with(scores, group, g, least)) for g in range(4)) < 9
    else:
        np.testing.assert_array_equal(conf < cuts[of], rejects(p, acceptance))


@pytest.fixture(scope="module")
def drawn():
    """Confidences of 2,100 images of seven classes, some less confident, and their classes."""
    pred = np.arange(2100) % 7
    return np.random.default_rng(1).normal(size=2100) - 0.5 * pred, pred


def failures(conf, pred, counts, by):
    """The classes of which other shares are accepted than Beta-binomial laws allow, in any way.

    Splits at random make the images exchangeable, however they depend on each other.
    """
    rng, classes = np.random.default_rng(0), len(counts)
    accepted = np.empty((SPLITS, classes))
    pools = [conf[pred == k] for k in range(classes)]
    for split in range(SPLITS):
        drawn = [rng.choice(p, n + TESTED, False) for p, n in zip(pools, counts, strict=True)]
        scores = np.concatenate([d[TESTED:] for d in drawn])
        group = np.repeat(range(classes), counts)
        found = calibration(scores, group if by else 0 * group, classes if by else 1, by=by)
        tested = np.concatenate([d[:TESTED] for d in drawn])
        of = np.repeat(range(classes), TESTED)
        p = found.p_values(tested, of if by else 0 * of)
        accepted[split] = (~rejects(p, ACCEPTANCE)).reshape(classes, TESTED).sum(1)
    failed = []
    for k, n in enumerate(counts):
        rank = int((1 - ACCEPTANCE) * (n + 1) + 1e-9)
        law = stats.betabinom(TESTED, n + 1 - rank, rank)
        low, high = law.ppf([0.005, 0.995])
        beyond = np.mean((accepted[:, k] < low) | (accepted[:, k] > high))
        off = abs(accepted[:, k].mean() - law.mean()) / (law.std() / np.sqrt(SPLITS))
        if beyond > 0.02 or off > 3.5:
            failed.append(k)
    return failed


@pytest.mark.parametrize("n", [19, 50, 200])
def test_each_class_has_the_acceptance_that_it_is_promised(drawn, n):
    assert failures(*drawn, [n] * 7, "predicted") == []


def test_marginal_p_values_promise_nothing_for_a_class(drawn):
    imbalanced = [200] + [20] * 6
    assert len(failures(*drawn, imbalanced, None)) > 3
    assert failures(*drawn, imbalanced, "predicted") == []


def test_p_values_of_pooled_classes_are_valid_for_these_together():
    """Also where chance decides which classes have enough images."""
    rng, level, found = np.random.default_rng(0), 0.2, []
    for _ in range(20_000):
        group = rng.choice(4, 26, p=[0.4, 0.3, 0.2, 0.1])
        scores = rng.normal(size=26) - 2.0 * group
        known = calibration(scores[1:], group[1:], 4, least=5)
        if group[0] in known.pooled and known.is_pooled:
            found += known.p_values(scores[:1], group[:1]).tolist()
    assert len(found) > 1000
    assert np.mean(np.array(found) <= level) < level + 2.6 * np.sqrt(level / len(found))


def test_the_guarantee_of_a_group_is_that_of_its_images():
    found = calibration(np.arange(70.0), [0] * 30 + [1] * 20 + [2] * 11 + [3] * 9, 5)
    assert found.pooled == [2, 3, 4]
    assert found.guarantee(0.9, group=0) == replace(guarantee(30, 0.9), of="ID images of group 0")
    pooled = found.guarantee(0.9, group=4)
    assert (pooled.images, pooled.of) == (20, "ID images of the 3 pooled groups together")
    with pytest.raises(ConfigError, match="group must be one of 0, 1, 2, 3, 4, got None"):
        found.guarantee(0.9)
    few = calibration(np.arange(40.0), [0] * 35 + [1] * 5, 2)
    assert len(few.cell(1)) == 40
    with pytest.raises(CalibrationError, match="nothing is promised for group '1'"):
        few.guarantee(0.9, group=1)


def test_too_few_images_for_an_acceptance_name_the_group():
    found = calibration(np.arange(150.0), [0] * 120 + [1] * 30, 2)
    with pytest.raises(CalibrationError, match=r"got 30 for group '1' \(with least=99 it is pool"):
        found.check_enough(0.99)
    calibration(found.scores, found.group, 2, least=99).check_enough(0.99)
