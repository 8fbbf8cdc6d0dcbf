"""Federated strategies on many paired seeds: a grid of FroM's powers p and k, then the grid's best against others.

The way through: `plan` says which strategies run on which clients and seeds, `running` runs what is not on disk yet,
`report` makes tables and pictures of what is.
"""
