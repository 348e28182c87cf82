"""The state of a stream: kept whole between updates, and refused where it does not belong."""

import json

import numpy as np
import pytest

from fusenorm_openood import FuseNorm
from fusenorm_openood.detectors.watch import Position, Watch
from fusenorm_openood.errors import CalibrationError, ConfigError, NonFiniteError, UnwritableError
from fusenorm_openood.method import drift
from fusenorm_openood.method.conformal import conformal_p_values, rejects, threshold
from tests.conftest import make_loader, make_net

CALIBRATION = np.random.default_rng(0).normal(size=200)
STREAM = np.concatenate([np.random.default_rng(1).normal(m, size=300) for m in (0, -1)]).round(2)


def test_a_stream_in_pieces_is_the_same_as_in_one(tmp_path):
    path = tmp_path / "state.json"
    whole = Watch(CALIBRATION).update(STREAM, unreadable=3)
    for number, part in enumerate(np.array_split(STREAM, 7)):
        watch = Watch(CALIBRATION[::-1], path=path)
        pieces = watch.update(part, int(number < 3), {"rows.csv": Position(number, "a")})
    assert (
        watch.positions == {"rows.csv": Position(6, "a")} == Watch(CALIBRATION, path=path).positions
    )
    assert pieces == Watch(CALIBRATION, path=path).now
    for found, expected in zip(pieces, whole, strict=True):
        assert found == (pytest.approx(expected) if isinstance(expected, float) else expected)
    assert 300 < whole.alarm_row < 400
    assert whole.log10_largest >= 2
    assert (whole.rows, whole.unreadable, whole.shift) == (600, 3, "lower")
    p = conformal_p_values(STREAM, CALIBRATION)
    assert whole.rejected == np.count_nonzero(rejects(p, 0.95))
    assert whole.rate_low > whole.promised_high
    assert whole.above_promise


def test_by_group_other_frequencies_are_no_alarm(tmp_path):
    draw, alarms = np.random.default_rng(0), np.zeros(3)
    for number in range(50):
        means = {"a": 0.0, "b": 4.0, "c": -2.0}
        known = {name: draw.normal(mean, size=60) for name, mean in means.items()}
        known["c"] = known["c"][:0]
        groups = draw.choice([*means], 300, p=[0.2, 0.3, 0.5])
        conf = draw.normal([means[name] for name in groups])
        watch = Watch(known, level=0.1, path=tmp_path / f"{number}.json")
        for part, of in zip(np.array_split(conf, 3), np.array_split(groups, 3), strict=True):
            found = watch.update(part, groups=of)
        watches = Watch(known, level=0.1), Watch(np.concatenate([*known.values()]), level=0.1)
        assert watches[0].update(conf, groups=groups) == pytest.approx(found)
        shifted = Watch(known, level=0.1).update(conf - 2 * (groups != "c"), groups=groups)
        alarms += found.alarm, watches[1].update(conf).alarm, shifted.alarm
    only = draw.normal(size=3000)  # of one group: all are rejected by its own threshold
    now = Watch(known).update(only, groups=["a"] * 3000)
    assert now.rejected == np.count_nonzero(only < threshold(np.sort(known["a"]), 0.95))
    assert not now.above_promise
    assert alarms[0] <= 5 + 3 * 2.1  # in 50 streams at a level of 10 %
    assert min(alarms[1:]) > 45
    for wrong, why in ((None, "300 confidences, got 0"), (["d"] * 300, "unknown group 'd'")):
        with pytest.raises(ConfigError, match=why):
            watch.update(conf, groups=wrong)


def test_where_all_groups_are_pooled_all_confidences_are_ranked_among_all(tmp_path):
    draw, path = np.random.default_rng(0), tmp_path / "state.json"
    known = {str(number): draw.normal(size=2) for number in range(50)}
    everything = np.concatenate([*known.values()])
    conf, groups = draw.normal(-1, size=60), draw.integers(50, size=60)  # mostly one of each
    Watch(known, path=path).update(conf[:20], groups=groups[:20])
    found = Watch(known, path=path).update(conf[20:], groups=groups[20:])
    assert found.alarm
    assert found == pytest.approx(Watch(everything).update(conf), nan_ok=True)


def test_nothing_is_known_before_the_first_row():
    now = Watch(CALIBRATION).update([])
    assert (now.rows, now.rate_low, now.rate_high, now.alarm) == (0, 0, 1, False)
    assert now.log10_martingale == 0


def test_scores_that_are_compared_with_are_at_most_ten_thousand(tmp_path):
    path = tmp_path / "state.json"
    many = np.random.default_rng(2).normal(size=drift.KEPT + 500)
    assert not Watch(many, path=path).update(STREAM[:300]).alarm
    assert path.stat().st_size < 120_000


def test_an_update_that_fails_changes_nothing(tmp_path):
    path = tmp_path / "state.json"
    watch = Watch(CALIBRATION, path=path)
    before = watch.update(STREAM[:10])
    with pytest.raises(NonFiniteError, match="row 12 of the stream must be a finite confidence"):
        watch.update([0.0, np.nan])
    path.unlink()
    path.mkdir()
    with pytest.raises(UnwritableError):
        watch.update(STREAM[10:20])
    assert watch.now == before


def test_a_state_that_does_not_belong_is_refused(tmp_path):
    path = tmp_path / "state.json"
    Watch(CALIBRATION, path=path).update(STREAM)
    cases = [
        ((CALIBRATION[1:],), {}, "was begun with calibration"),
        ((CALIBRATION,), {"acceptance": 0.9}, "was begun with acceptance 0.95, got 0.9"),
        ((CALIBRATION,), {"level": 0.05}, "was begun with level 0.01, got 0.05: give another"),
    ]
    for given, options, why in cases:
        with pytest.raises(ConfigError, match=why):
            Watch(*given, path=path, **options)
    known = json.loads(path.read_text())
    damaged = [{**known, "rows": "x"}, {**known, "scores": "x"}, {**known, "log_capitals": []}, []]
    damaged.append({**known, "scores": {"of a group": known["scores"]}})
    for text in (*map(json.dumps, damaged), "{"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="is no state of a stream"):
            Watch(CALIBRATION, path=path)


def test_a_detector_watches_with_its_calibration_scores():
    detector = FuseNorm(make_net()).fit(make_loader(60))
    with pytest.raises(CalibrationError, match="call calibrate"):
        detector.watch()
    detector.calibrate(make_loader(30, seed=2))
    with pytest.raises(CalibrationError, match="needs at least 99"):
        detector.watch(acceptance=0.99)
    watch = detector.watch(level=0.05)
    assert watch.now == Watch(detector.calibration_scores_, level=0.05).now
    scored = detector.infer(make_loader(60, seed=3, scale=9))
    assert watch.update(scored.conf).shift == "lower"
    watch = detector.calibrate(make_loader(30, seed=2), by="predicted").watch()
    assert watch.update(scored.conf, groups=scored.pred).rows == 60
