"""Errors that the user can fix, and how they are shown."""
import contextlib
import sys


class UserError(ValueError):
    """Bad input. The message names the file or option, what was found and what was expected.

    `main` prints it on one line, without a traceback, and exits with code 2.
    """


def first_line(error):
    """The first line of an error's message, or the error's type if it has none, for quoting in a
    `UserError`."""
    return next(iter(str(error).splitlines()), '') or type(error).__name__


def print_any_text():
    """Let standard output escape the characters that its encoding does not have, as standard error does:
    file names may contain any."""
    with contextlib.suppress(AttributeError):  # a notebook has an output of its own
        sys.stdout.reconfigure(errors='backslashreplace')
