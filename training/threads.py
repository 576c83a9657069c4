"""Keeps training fast beside other busy processes.

OpenMP's threads wait for each other by spinning, which is fastest while each has a core to itself. When other programs take
turns on the cores, a spinning thread burns the time in which its partner could run. libgomp spins three hundred times less
once it manages more threads than there are cores, so an idle thread team, created while the machine is busy and released
when it is quiet, makes the waiting threads sleep instead. The number of threads that compute stays the same, and so do the
results.
"""
import contextlib
import threading
import time
from pathlib import Path

import torch

# Seconds between looks at how long the main thread had to wait for a core.
CHECK_SECONDS = 0.5
# The machine is busy when the main thread waits for a core for more than this share of the time.
BUSY_SHARE = 0.1
# The machine is quiet again below this share.
QUIET_SHARE = 0.02
# A tensor of this size is summed by several threads, which creates a thread's own team.
PARALLEL_SIZE = 2 ** 20


class IdleTeam:
    """A thread whose OpenMP team counts as managed but does nothing until `release`."""

    def __init__(self):
        self.released = threading.Event()
        threading.Thread(target=self.hold, daemon=True).start()

    def hold(self):
        torch.zeros(PARALLEL_SIZE).sum()
        self.released.wait()

    def release(self):
        self.released.set()


def seconds_waited(path):
    """How long a thread has waited for a core, from Linux's scheduler statistics; None where there are none."""
    try:
        return int(path.read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None


@contextlib.contextmanager
def yield_when_busy():
    """In this block, OpenMP's threads sleep rather than spin while other processes keep the cores busy. Linux only;
    elsewhere it does nothing."""
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
    """Hold an `IdleTeam` whenever the thread of `path` has to wait for a core."""
    team, waited, at = None, seconds_waited(path), time.monotonic()
    while not ended.wait(CHECK_SECONDS):
        waited_before, at_before, waited, at = waited, at, seconds_waited(path), time.monotonic()
        share = (waited - waited_before) / (at - at_before)
        if team is None and share > BUSY_SHARE:
            team = IdleTeam()
        elif team is not None and share < QUIET_SHARE:
            team.release()
            team = None
    if team is not None:
        team.release()
