"""Stopping a run: the first SIGINT or SIGTERM asks for it, the second does it at once."""
import contextlib
import os
import signal


@contextlib.contextmanager
def held_back():
    """Signals wait until the block ends: for calls that would leave a child process behind if they were torn apart."""
    if not hasattr(signal, 'pthread_sigmask'):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Stopped(BaseException):
    """The run was asked to stop while it did what can be given up. No error: `except Exception` lets it through."""


class StopRequest:
    """Catches SIGINT and SIGTERM while it is entered.

        with StopRequest(say) as stop:
            …                              # given up by Stopped, until
            stop.interruptible = False
            for step in …:
                …                                    # a step is finished, whatever comes
                stop.unless_stopped(make_an_output)  # which is given up
                if stop.signal:
                    save and leave with stop.exit_code
    """

    def __init__(self, say):
        self.say, self.signal, self.interruptible = say, None, True
        self.interrupted = self.patient = False

    def __enter__(self):
        self.previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number, _):
        if self.signal is not None:
            if int(os.environ.get('WORLD_SIZE', 1)) > 1:  # torchrun sends its own, and in the end one that cannot be caught
                return
            os._exit(128 + number)
        self.signal = number
        self.say(f'{signal.Signals(number).name}: stopping; once more to stop at once')
        if self.interruptible:
            raise Stopped(self.exit_code)

    @property
    def exit_code(self):
        """What a shell expects of a process that a signal ended; 0 if none came."""
        return 128 + self.signal if self.signal else 0

    def unless_stopped(self, make, *arguments, otherwise=None):
        """`make(*arguments)`, which the first signal ends at once by `Stopped`: `interrupted` is true then. Not begun after
        a signal: `otherwise()` in its place. With `patient` set, a signal neither ends nor prevents it."""
        try:
            self.interruptible = not self.patient
            if self.signal is None or self.patient:
                make(*arguments)
            elif otherwise is not None:
                otherwise()
            self.interruptible = False
        except Stopped:
            self.interrupted = True
        finally:
            self.interruptible = False
