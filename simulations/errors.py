"""The one exception that ends a simulation because of what its user asked for."""


class BadInput(ValueError):
    """An option, folder or package that the simulation can't work with: one line that names it and the remedy."""
