"""Keeps training fast while other processes use the cores.

OpenMP's threads wait for each other by spinning, which is fastest while each has a core to itself. When other
programs take turns on the cores, a spinning thread burns the time in which the thread that it waits for could
run. libgomp spins for 300,000 rounds, but only for 1,000 while it manages more threads than there are cores,
and then sleeps. So an idle team of threads is created while the machine is busy, and released when it is
quiet. The number of threads that compute stays the same, and so do the results.
"""
import contextlib
import threading
import time
from pathlib import Path

import torch

# The time that the main thread has waited for a core is read this often, in seconds.
CHECK_SECONDS = 0.5
# The machine is busy when the main thread waits for a core for more than this fraction of the time.
BUSY_FRACTION = 0.1
# The machine is quiet again when it waits for less than this fraction of the time.
QUIET_FRACTION = 0.02
# Summing a tensor of this size takes several threads, so that OpenMP creates a team for the calling thread.
PARALLEL_SIZE = 2 ** 20


class IdleTeam:
    """A thread with an OpenMP team of its own, which does nothing until `release`."""

    def __init__(self):
        self.released = threading.Event()
        threading.Thread(target=self.hold, daemon=True).start()

    def hold(self):
        torch.zeros(PARALLEL_SIZE).sum()
        self.released.wait()

    def release(self):
        self.released.set()


def seconds_waited(path):
    """How long a thread has waited for a core, from Linux's scheduler statistics; None where there are
    none."""
    try:
        return int(path.read_text(encoding='utf-8').split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None


@contextlib.contextmanager
def yield_when_busy():
    """In this block, OpenMP's threads sleep rather than spin while other processes keep the cores busy. Linux
    only; elsewhere the block is an ordinary one."""
    path = Path(f'/proc/self/task/{threading.get_native_id()}/schedstat')
    if seconds_waited(path) is None or torch.get_num_threads() < 2:
        yield
        return
    ended = threading.Event()
    watcher = threading.Thread(target=watch, args=(path, ended), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def watch(path, ended):
    """Hold an `IdleTeam` whenever the thread of `path` has to wait for a core, until `ended` is set."""
    team, waited, checked_at = None, seconds_waited(path), time.monotonic()
    while not ended.wait(CHECK_SECONDS):
        waited_before, checked_before = waited, checked_at
        waited, checked_at = seconds_waited(path), time.monotonic()
        fraction = (waited - waited_before) / (checked_at - checked_before)
        if team is None and fraction > BUSY_FRACTION:
            team = IdleTeam()
        elif team is not None and fraction < QUIET_FRACTION:
            team.release()
            team = None
    if team is not None:
        team.release()
