"""Stopping a run: the first SIGINT or SIGTERM lets it save and leave, the second one ends it at once."""
import contextlib
import os
import signal


class Stopped(BaseException):
    """Work was given up because the run is to stop. Not an error, so `except Exception` lets it through."""


class StopRequest:
    """Handles SIGINT and SIGTERM inside its `with` block.

        with StopRequest(say) as stop:
            for step in ...:
                ...                                           # always completed
                with suppress(Stopped), stop.interruptible():
                    ...                                       # given up when the first signal arrives
                if stop.requested:
                    break
        sys.exit(stop.exit_code)

    Args:
      say: called with a line when the first signal arrives.
    Attributes:
      signal: number of the first signal, None before it.
    """

    def __init__(self, say):
        self.say, self.signal, self._interrupts = say, None, False

    def __enter__(self):
        numbers = signal.SIGINT, signal.SIGTERM
        self.previous = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number, _):
        if self.requested:
            # torchrun forwards a signal that also reached this process, and kills processes that take too long
            if int(os.environ.get('WORLD_SIZE', 1)) == 1:
                os._exit(128 + number)
            return
        self.signal = number
        self.say(f'{signal.Signals(number).name}: stopping; repeat it to stop at once')
        if self._interrupts:
            self.check()

    @property
    def requested(self):
        """Whether a signal has arrived."""
        return self.signal is not None

    @property
    def exit_code(self):
        """The exit code by which a shell recognises the signal, 128 + its number; 0 without a signal."""
        return 128 + self.signal if self.requested else 0

    def check(self):
        """Raise `Stopped` if a signal has arrived."""
        if self.requested:
            raise Stopped(self.exit_code)

    @contextlib.contextmanager
    def interruptible(self, enabled=True):
        """A block that the first signal ends at once with `Stopped`; not even begun if it has arrived already.

        Args:
          enabled: False makes it an ordinary block. Several processes need that: a collective operation must not
            be interrupted in one of them, so they call `check` in between.
        """
        if not enabled:
            yield
            return
        try:
            self._interrupts = True  # before the check, so that no signal falls between the two
            self.check()
            yield
        finally:
            self._interrupts = False
