"""Stopping a run: the first SIGINT or SIGTERM asks for it, the second does it at once."""
import os
import signal


class Stopped(Exception):
    """The run was asked to stop while it made an output that can be given up."""


class StopRequest:
    """Catches SIGINT and SIGTERM while it is entered.

        with StopRequest(say) as stop:
            for step in …:
                …                                    # a step is finished, whatever comes
                stop.unless_stopped(make_an_output)  # which is given up
                if stop.signal:
                    save and leave with stop.exit_code
    """

    def __init__(self, say):
        self.say, self.signal, self.interruptible = say, None, False

    def __enter__(self):
        self.previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number, _):
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        self.say(f'{signal.Signals(number).name}: stopping after this step; once more to stop at once')
        if self.interruptible:
            raise Stopped

    @property
    def exit_code(self):
        """What a shell expects of a process that a signal ended; 0 if none came."""
        return 128 + self.signal if self.signal else 0

    def unless_stopped(self, make, *arguments):
        """`make(*arguments)`, which the first signal ends at once by `Stopped`; not begun after a signal."""
        self.interruptible = True
        try:
            if self.signal is None:
                make(*arguments)
        except Stopped:
            pass
        finally:
            self.interruptible = False
