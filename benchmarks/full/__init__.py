"""Full models: a round's merge beside FedAvg, mergekit and a plain copy, in one run: `python -m benchmarks.full`."""
