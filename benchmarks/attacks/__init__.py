"""Attacks of 1 to 3 clients of 10 against FedFroM and Flower's own strategies: `python -m benchmarks.attacks`.

The way through: `rounds` has what honest clients send, `attacks` what attackers send in their place, `contenders` the
strategies, `bench` measures one against the other, `tables` and `figures` show it. `federation` trains, and
`tradeoff` has what the defaults of the screening were chosen by.
"""
