"""The one kind of error that is the user's to mend."""


class UserError(ValueError):
    """Bad input. The message names the file or option, what was found and what was expected; `main` prints it, one line."""
