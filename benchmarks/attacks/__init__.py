"""Attacks of 1 to 3 clients of 10 against FedFroM and Flower's own strategies: `python -m benchmarks.attacks`.

`rounds` has the replies of honest clients, `attacks` the replies of attackers in their place, and `contenders` the
strategies. `bench` measures every attack on every strategy; `tables` and `figures` show the outcomes. `federation`
trains clients. `tradeoff` measures what the defaults of the screening were chosen by.
"""
