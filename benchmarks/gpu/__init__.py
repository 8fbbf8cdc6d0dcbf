"""Merging and federated LoRA on a CUDA device beside the CPU, in one run: `python -m benchmarks.gpu`."""
