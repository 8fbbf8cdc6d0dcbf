"""The speed of merging adapters beside dense Algorithm 1 and peers, in one run: `python -m benchmarks.adapters`."""
