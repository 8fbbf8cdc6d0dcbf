"""Linear algebra that no method owns: products kept as factors, tensors a block at a time, what is rounding."""
