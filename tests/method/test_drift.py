"""Drift in a stream: against brute force, and by what uniform p-values and Ville promise."""

from functools import cache, partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fusenorm_openood.method import drift
from fusenorm_openood.method.conformal import conformal_p_values

ties = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=20)


@given(ties, ties, st.integers(0, 5), st.integers(0, 99))
def test_p_values_rank_each_confidence_among_all_before(conf, calibration, room, seed):
    random, most = np.random.default_rng(seed).random((len(conf), 2)), len(calibration) + room
    p, scores = drift.online_p_values(np.array(conf), sorted(calibration), random, most)
    kept = sorted(calibration)
    for found, x, (tie, leaves) in zip(p, conf, random, strict=True):
        below, equal = sum(c < x for c in kept), sum(c == x for c in kept)
        assert found == (below + tie * (equal + 1)) / (len(kept) + 1)
        kept = sorted([*kept, x])
        if len(kept) > most:
            kept.pop(int(leaves * len(kept)))
    assert scores == kept


def test_p_values_are_independent_with_a_bounded_number_of_scores():
    """Three in a row of 20,000 streams, of five calibration scores and no more."""
    generator, cells = np.random.default_rng(0), np.zeros((2, 4, 4, 4))
    for _ in range(20_000):
        calibration, conf = np.sort(generator.normal(size=5)), generator.normal(size=3)
        random = generator.random((3, 2))
        p, _ = drift.online_p_values(conf, calibration.tolist(), random, most=5)
        fixed = conformal_p_values(conf, calibration) - random[:, 0] / 6
        for found, values in zip(cells, (p, fixed), strict=True):
            found[tuple((4 * values).astype(int))] += 1
    ours, fixed = (stats.chisquare(found.ravel()).pvalue for found in cells)
    assert ours > 1e-3
    assert fixed < 1e-6  # that share their calibration scores, and are no less uniform one by one


def test_the_martingale_is_a_mixture_over_bets_and_start_times():
    p = np.random.default_rng(0).beta(0.5, 1, size=12)
    paths, capitals = drift.bet(p, drift.start(), 0)
    z = stats.norm.ppf(p)[:, None]
    means, deviations, shares = drift._MEANS, drift._DEVIATIONS, drift._SHARES
    density = stats.norm.pdf(z, means, deviations) / stats.norm.pdf(z)
    gains = 1 - shares + shares * density
    for rows in range(1, 13):
        waiting = 1 / np.log2(2 + np.arange(rows + 1))
        starts = -np.diff(waiting)
        total = sum(w * gains[t:rows].prod(axis=0).mean() for t, w in enumerate(starts))
        assert paths[rows - 1] == pytest.approx(np.log(total + waiting[-1]))
    first, state = drift.bet(p[:5], drift.start(), 0)
    rest, state = drift.bet(p[5:], state, 5)
    np.testing.assert_allclose(np.concatenate([first, rest]), paths, rtol=1e-9)
    np.testing.assert_allclose(state, capitals, rtol=1e-9)


def largest(streams: int, rows: int, fixed: bool = False) -> np.ndarray:
    """The largest logarithm of the martingale in each of some streams without drift."""
    found = []
    for seed in range(streams):
        generator = np.random.default_rng([seed, rows])
        calibration, conf = np.sort(generator.normal(size=50)), generator.normal(size=rows)
        random = generator.random((rows, 2))
        if fixed:
            p = conformal_p_values(conf, calibration) - random[:, 0] / 51
        else:
            p, _ = drift.online_p_values(conf, calibration.tolist(), random, most=100)
        found.append(drift.bet(p, drift.start(), 0)[0].max())
    return np.array(found)


def test_false_alarms_are_at_most_the_level():
    assert 0.02 < np.mean(largest(1000, 200) >= np.log(5)) < 0.2
    same = largest(50, 5000, fixed=True)  # compared with the same calibration images
    assert np.mean(same >= np.log(5)) > 0.5


@pytest.mark.parametrize("shift", ["lower", "higher", "wider", "narrower"])
def test_a_late_shift_is_found_in_each_direction(shift):
    generator = np.random.default_rng(1)
    mean = {"lower": -1, "higher": 1}.get(shift, 0)
    spread = {"wider": 2, "narrower": 0.5}.get(shift, 1)
    conf = np.concatenate([generator.normal(size=5000), generator.normal(mean, spread, 150)])
    scores = np.sort(generator.normal(size=200)).tolist()
    p, _ = drift.online_p_values(conf, scores, generator.random((len(conf), 2)))
    path, capitals = drift.bet(p, drift.start(), 0)
    assert 5000 <= np.argmax(path >= np.log(100)) < 5150
    assert drift.SHIFTS[int(np.argmax(capitals))] == shift


def test_bounds_hold_after_every_row_for_rates_that_change():
    """2,000 streams whose rate follows what was drawn: the mean of the rates is in the bounds."""
    generator, rows, missed = np.random.default_rng(0), 400, 0
    bounds = cache(partial(drift.rate_bounds, level=0.1))
    for _ in range(2000):
        uniform, count, total, inside = generator.random(rows), 0, 0.0, True
        for row in range(rows):
            rate = 0.05 if count % 2 else 0.3
            count, total = count + (uniform[row] < rate), total + rate
            if row in (4, 9, 19, 39, 79, 159, 399):
                low, high = bounds(int(count), row + 1)
                inside &= low <= total / (row + 1) <= high
        missed += not inside
    assert missed / 2000 <= 0.1


@given(st.integers(0, 1000), st.integers(0, 1000), st.sampled_from([0.5, 0.05, 0.001]))
def test_bounds_enclose_the_share_and_narrow_with_more_rows(count, others, level):
    rows = count + others
    low, high = drift.rate_bounds(count, rows, level)
    assert 0 <= low <= (count / rows if rows else 0) <= high <= 1
    more = drift.rate_bounds(100 * count, 100 * rows, level)
    assert low <= more[0] + 1e-9
    assert more[1] <= high + 1e-9
