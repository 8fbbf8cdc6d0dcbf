"""Section 5.2 of the paper: adapters and models of QNLI, RTE and WNLI under one head, merged by every method.

`cells` declares the study and computes it, `findings` are its views of the frame, and `tables`, `figures`, `heatmaps`
and `summary` write them.
"""
