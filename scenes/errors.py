"""Errors that the user can fix."""


class UserError(ValueError):
    """Bad input. The message names the file or option, what was found and what was expected.

    `main` prints it on one line, without a traceback, and exits with code 2.
    """


def first_line(error):
    """The first line of an error's message, or the error's type if it has none, for quoting in a
    `UserError`."""
    return next(iter(str(error).splitlines()), '') or type(error).__name__
