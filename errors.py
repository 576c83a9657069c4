"""The one kind of error that is the user's to mend."""


class UserError(ValueError):
    """Bad input. The message names the file or option, what was found and what was expected; `main` prints it, one line."""


def first_line(error):
    """What an error says, in one line, to be quoted in a `UserError`."""
    return next(iter(str(error).splitlines()), '') or type(error).__name__
