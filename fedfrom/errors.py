"""The error that a command ends with in one line."""


class BadInput(ValueError):
    """What the user gave (an option, a folder, a package) can't be used: names it and says what to do."""
