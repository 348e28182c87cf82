"""Processes of `torchrun`: their shares, their waits and their output."""

import pytest

from fusenorm_openood.errors import ConfigError
from fusenorm_openood.storage import torchrun
from fusenorm_openood.storage.torchrun import Process, among_peers, this_process, wait_until

PAIR = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}


@pytest.fixture
def pair(monkeypatch):
    """This process is the second of two."""
    for name, value in PAIR.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "left",
    [
        {"WORLD_SIZE": ""},
        {"WORLD_SIZE": "2", "RANK": "0"},  # of a cluster's job without torchrun
        {"WORLD_SIZE": "2", "RANK": "1"},
        {"RANK": "3"},
        {"WORLD_SIZE": " ", "RANK": "1", "LOCAL_RANK": "1"},
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
    ],
)
def test_what_is_left_in_the_environment_makes_no_process(left, monkeypatch):
    for name in PAIR:
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert this_process() == Process(0, 0, 1)


@pytest.mark.parametrize(
    "wrong",
    [{"RANK": "2"}, {"RANK": "-1"}, {"RANK": "x"}, {"WORLD_SIZE": "two"}, {"LOCAL_RANK": "9"}],
)
def test_numbers_that_no_launcher_gives_are_one_sentence(pair, wrong, monkeypatch):
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"below WORLD_SIZE, got .*: start with torchrun"):
        this_process()


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shares_are_all_of_the_work_and_none_of_it_twice(world):
    for numbers in ([], [0], [5], range(7), [1, 3, 5, 7]):
        shares = [Process(rank, rank, world).share(numbers) for rank in range(world)]
        assert sorted(number for share in shares for number in share) == list(numbers)


class Clock:
    """A clock that only sleeping moves."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_wait_ends_with_what_was_found_or_when_its_time_is_over(monkeypatch):
    clock, answers = Clock(), iter([None, [], [3]])
    monkeypatch.setattr(torchrun, "time", clock)
    assert wait_until(lambda: next(answers)) == [3]
    begun = clock.now
    assert not wait_until(lambda: False, 9.0)
    assert 9.0 <= clock.now - begun < 9.0 + torchrun.PATIENCE


def test_only_the_first_process_prints(pair, capsys, monkeypatch):
    with among_peers() as process:
        print("twice")
        assert process == Process(1, 1, 2)
    print("once")
    monkeypatch.setenv("RANK", "0")
    with among_peers():
        print("first")
    assert capsys.readouterr().out == "once\nfirst\n"
