"""How fast images were scored, by a clock that the test moves."""

import pytest

from fusenorm_openood.forward import batches as module
from fusenorm_openood.forward.batches import Pace


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def run(clock, pace, batches, loading, scoring):
    def loader():
        for size in batches:
            clock.now += loading
            yield size
        clock.now += loading  # to find out that there are no more

    for size in pace.timed(loader()):
        clock.now += scoring
        pace.images += size


def test_time_is_counted_as_waiting_or_as_scoring(clock):
    pace = Pace()
    run(clock, pace, [10, 10, 5], loading=1.0, scoring=4.0)
    assert (pace.images, pace.seconds, pace.waited) == (25, 16.0, 4.0)
    run(clock, pace, [75], loading=2.0, scoring=0.0)
    assert (pace.images, pace.seconds, pace.waited) == (100, 20.0, 8.0)
    assert str(pace).startswith("5 images per second")
    assert "40% of the time was spent waiting for images: try more loader processes" in str(pace)


def test_advice_is_given_where_loading_limits(clock):
    pace = Pace()
    run(clock, pace, [10] * 10, loading=0.1, scoring=10.0)
    assert "1% of the time was spent waiting for images" in str(pace)
    assert "--num-workers" not in str(pace)


def test_without_images_nothing_is_divided_by_zero():
    assert str(Pace()).startswith("0 images per second")
