"""A Flower app that fine-tunes one transformer with several strategies on the same clients, and compares them."""
