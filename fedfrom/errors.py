"""The error that a command ends with in one line."""


class BadInput(ValueError):
    """The user's input (an option, a folder, a package) can't be used; the message names it and says what to do."""
