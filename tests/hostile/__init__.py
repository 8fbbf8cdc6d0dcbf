"""Hostile input: a clear error or a correct merge, whatever records, states, files, configs and arguments hold.

A few hundred cases run with all other tests. Fresh ones by the thousand:

    python -m pytest tests/hostile --hypothesis-profile=hostile
"""
