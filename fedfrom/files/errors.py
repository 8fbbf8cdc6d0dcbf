"""The error that a command ends with in one line."""


class BadInput(ValueError):
    """What the user gave can't be used: the message names it and says what to do."""
