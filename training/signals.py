"""Stopping a run: the first SIGINT or SIGTERM lets it save and exit; a second one, in a single process, exits
at once."""
import contextlib
import os
import signal


class Stopped(BaseException):
    """Work was given up because a signal asks the run to stop. Not an `Exception`, so `except Exception` lets
    it pass.

    Attributes:
      exit_code: the exit code by which a shell recognises the signal.
    """

    def __init__(self, exit_code):
        super().__init__(exit_code)
        self.exit_code = exit_code


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
        # with torchrun a second signal is ignored: it forwards each one, and kills processes that take too
        # long
        single_process = int(os.environ.get('WORLD_SIZE', 1)) == 1
        if self.requested:
            if single_process:
                os._exit(128 + number)
            return
        self.signal = number
        name = signal.Signals(number).name
        self.say(f'{name}: stopping; repeat it to stop at once' if single_process else f'{name}: stopping')
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
    def interruptible(self):
        """A block that the first signal ends at once with `Stopped`; not even begun if it has arrived
        already. Must not hold collective operations of several processes, unless all of them end afterwards,
        as in set-up."""
        try:
            self._interrupts = True  # before the check, so that no signal falls between the two
            self.check()
            yield
        finally:
            self._interrupts = False
