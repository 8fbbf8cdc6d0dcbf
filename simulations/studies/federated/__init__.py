"""Federated strategies on many paired seeds: a grid of FroM's powers p and k, then the grid's best against others.

`plan` declares the study and computes its cells, one Flower simulation for all strategies of one seed. `tables` and
`figures` are its views, and `summary` writes them.
"""
