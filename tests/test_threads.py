"""Threads that sleep instead of spinning while the machine is busy."""
import threading
import time

import pytest
import torch

from training import threads
from training.threads import IdleTeam, seconds_waited, watch, yield_when_busy


class FakeTeam:
    """Records when teams are created and released."""
    events = []  # noqa: RUF012 - emptied by the fixture

    def __init__(self):
        self.events.append('created')

    def release(self):
        self.events.append('released')


@pytest.fixture
def events(monkeypatch):
    FakeTeam.events.clear()
    monkeypatch.setattr(threads, 'IdleTeam', FakeTeam)
    return FakeTeam.events


class Clock:
    """Stands for the event that ends `watch`: each wait takes a second, until the fractions are used up."""

    def __init__(self, monkeypatch, fractions):
        self.now, self.waited, self.fractions = 0.0, 5.0, list(fractions)
        monkeypatch.setattr(threads.time, 'monotonic', lambda: self.now)
        monkeypatch.setattr(threads, 'seconds_waited', lambda path: self.waited)

    def wait(self, timeout):
        if not self.fractions:
            return True
        self.now, self.waited = self.now + 1.0, self.waited + self.fractions.pop(0)
        return False


@pytest.mark.parametrize('fractions, expected', [
    ([], []), ([0.0, 0.05, 0.09], []), ([0.5], ['created', 'released']),
    ([0.5, 0.5, 0.05, 0.5], ['created', 'released']),             # neither busy nor quiet: it stays as it is
    ([0.5, 0.01, 0.05, 0.5], ['created', 'released', 'created', 'released'])])
def test_a_team_is_held_while_the_machine_is_busy(monkeypatch, events, fractions, expected):
    watch(None, Clock(monkeypatch, fractions))
    assert events == expected


def test_an_idle_team_ends_when_it_is_released():
    before = threading.active_count()
    team = IdleTeam()
    assert threading.active_count() == before + 1
    team.release()
    deadline = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_block_ends_its_thread(monkeypatch, events):
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    monkeypatch.setattr(threads, 'seconds_waited', lambda path: 0.0)
    before = threading.active_count()
    with pytest.raises(KeyError), yield_when_busy():
        assert threading.active_count() == before + 1
        raise KeyError
    assert threading.active_count() == before


def test_without_statistics_the_block_is_an_ordinary_one(monkeypatch, tmp_path):
    (tmp_path / 'schedstat').write_text('nothing')
    assert seconds_waited(tmp_path / 'schedstat') is None and seconds_waited(tmp_path / 'missing') is None
    monkeypatch.setattr(threads, 'seconds_waited', lambda path: None)
    before = threading.active_count()
    with yield_when_busy():
        assert threading.active_count() == before
